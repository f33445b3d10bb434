"""Folding adapters into the weights for good."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from lora_param import (
    AdapterError,
    LoRAError,
    TargetError,
    base_state_dict,
    disable_lora,
    fingerprint,
    lora_disabled,
    lora_merged,
    merge_lora,
    register_lora,
    remove_lora,
)

from .cases import CASES, Case, outputs, shake


def adapted(*adapters: str) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(6, 5)
    for adapter in adapters:
        register_lora(layer, rank=2, adapter=adapter)
    shake(layer)
    return layer


def test_the_merged_weight_is_exactly_what_was_read() -> None:
    layer = adapted("a", "b")
    weight, original = layer.weight.detach().clone(), layer.parametrizations.weight.original
    merge_lora(layer)
    assert layer.weight is original
    assert torch.equal(layer.weight, weight)
    assert layer.weight.requires_grad


@pytest.mark.parametrize(("merged", "left"), [("a", "b"), ("b", "a")])
def test_merging_one_of_two_keeps_the_other(merged: str, left: str) -> None:
    layer, x = adapted("a", "b"), torch.randn(3, 6)
    expected = layer(x)
    with lora_disabled(layer, left):
        without = layer(x)
    merge_lora(layer, merged)
    torch.testing.assert_close(layer(x), expected)
    with lora_disabled(layer):
        torch.testing.assert_close(layer(x), without)


def test_merging_inside_autocast_bakes_in_no_rounding() -> None:
    layer, twin = adapted("a"), adapted("a")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        merge_lora(layer)
    merge_lora(twin)
    assert torch.equal(layer.weight, twin.weight)


def test_merging_inside_a_cache_takes_the_current_factors() -> None:
    layer, twin = adapted("a"), adapted("a")
    with parametrize.cached():
        assert layer.weight is not None
        for each in (layer, twin):
            torch.manual_seed(1)
            shake(each)
        merge_lora(layer)
    merge_lora(twin)
    assert torch.equal(layer.weight, twin.weight)


def test_a_disabled_adapter_is_not_merged_in_silence() -> None:
    layer = adapted("a", "b")
    disable_lora(layer, "b")
    before = fingerprint(layer)
    with pytest.raises(
        AdapterError, match="weight: adapter 'b' is disabled, so merging would change"
    ):
        merge_lora(layer)
    assert fingerprint(layer) == before
    merge_lora(layer, "a")


def test_a_merge_that_overflows_is_refused() -> None:
    layer = nn.Linear(6, 5).half()
    register_lora(layer, rank=2, dtype=torch.float32)
    for factor in layer.parametrizations.weight[0].parameters():
        nn.init.constant_(factor, 1e3)
    before = fingerprint(layer)
    with pytest.raises(
        LoRAError, match=r"weight: the merged weight would not be finite in torch\.float16"
    ):
        merge_lora(layer)
    assert fingerprint(layer) == before


def test_a_weight_tied_since_registering_is_refused() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 6), "head": adapted("a")})
    model["embed"].weight = model["head"].parametrizations.weight.original
    before = fingerprint(model)
    with pytest.raises(
        TargetError, match=r"head.weight: embed.weight is the same Parameter, and merging"
    ):
        merge_lora(model)
    assert fingerprint(model) == before


def test_a_norm_in_front_that_cannot_hold_the_sum_is_refused() -> None:
    layer = parametrizations.spectral_norm(nn.Linear(6, 5)).eval()
    register_lora(layer, rank=2)
    shake(layer)
    state = copy.deepcopy(layer.state_dict())
    with pytest.raises(
        LoRAError, match="_SpectralNorm, in front of the adapter, can't take the merged"
    ):
        merge_lora(layer)
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())


class OneWay(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.tanh()


def test_a_parametrization_in_front_without_an_inverse_is_refused() -> None:
    layer = parametrize.register_parametrization(nn.Linear(6, 5), "weight", OneWay())
    register_lora(layer, rank=2)
    with pytest.raises(
        LoRAError, match="OneWay, in front of the adapter, can't take the merged weight"
    ):
        merge_lora(layer)


def test_a_parametrization_behind_is_applied_to_the_merged_weight() -> None:
    layer = adapted("a")
    parametrize.register_parametrization(layer, "weight", OneWay())
    weight = layer.weight.detach().clone()
    merge_lora(layer)
    assert torch.equal(layer.weight, weight)
    assert [type(entry) for entry in layer.parametrizations.weight] == [OneWay]


def test_one_of_two_adapters_around_a_parametrization_is_refused() -> None:
    layer = adapted("a")
    parametrize.register_parametrization(layer, "weight", Halved())
    register_lora(layer, rank=2, adapter="b")
    shake(layer)
    with pytest.raises(LoRAError, match="Halved stands between the adapters"):
        merge_lora(layer, "b")
    weight = layer.weight.detach().clone()
    merge_lora(layer)
    torch.testing.assert_close(layer.weight, weight)


class Halved(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 2


def test_merging_on_the_meta_device_leaves_a_plain_module() -> None:
    layer = nn.Linear(6, 5, device="meta")
    register_lora(layer, rank=2)
    merge_lora(layer)
    assert type(layer) is nn.Linear


def test_merging_through_a_parametrization_inside_autocast_rounds_nothing() -> None:
    layers = [parametrizations.weight_norm(nn.Linear(6, 5)) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    for layer in layers:
        torch.manual_seed(0)
        register_lora(layer, rank=2)
        shake(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        merge_lora(layers[0])
    merge_lora(layers[1])
    assert torch.equal(layers[0].weight, layers[1].weight)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_in_a_merged_block_the_model_is_plain_and_gives_the_same(case: Case) -> None:
    layer, inputs = case.build(torch.float64)
    types = [type(each) for each in layer.modules()]
    case.adapt(layer)
    shake(layer)
    layer.eval()
    before, expected = state(layer), outputs(layer, inputs)
    with lora_merged(layer):
        assert [type(each) for each in layer.modules()] == types
        actual = outputs(layer, inputs)
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want.detach())
    assert state(layer) == before
    assert all(torch.equal(*pair) for pair in zip(outputs(layer, inputs), expected, strict=True))


def state(model: nn.Module) -> list[Any]:
    """Take down all of a model: objects, bits, classes, flags and order."""
    return [
        [(name, type(each), each.training) for name, each in model.named_modules()],
        [
            (name, id(p), p.requires_grad, p.detach().numpy().tobytes())
            for name, p in model.named_parameters()
        ],
        list(model.state_dict()),
    ]


def test_a_merged_block_that_raises_gives_everything_back() -> None:
    layer = adapted("a", "b")
    before = state(layer)

    def block() -> None:
        with lora_merged(layer):
            layer.weight.data.zero_()
            raise KeyError

    with pytest.raises(KeyError):
        block()
    assert state(layer) == before


def test_what_a_merged_block_does_besides_stays() -> None:
    model = nn.Sequential(adapted("a"), nn.Dropout())
    with torch.inference_mode(), lora_merged(model):
        model.eval()
        model[0].note = "seen"
    assert not any(each.training for each in model.modules())
    assert model[0].note == "seen"


def test_a_merged_block_leaves_out_what_is_disabled() -> None:
    layer = adapted("a", "b")
    disable_lora(layer, "b")
    expected = layer.weight.clone()
    with lora_merged(layer):
        assert torch.equal(layer.weight, expected)
    disable_lora(layer)
    original = layer.parametrizations.weight.original.clone()
    with lora_merged(layer):
        layer.weight.data.zero_()
    assert torch.equal(layer.weight, original)


def test_a_merged_block_keeps_anothers_parametrization() -> None:
    layer = parametrizations.weight_norm(nn.Linear(6, 5))
    parametrize.register_parametrization(layer, "bias", nn.Tanh())
    register_lora(layer, rank=2)
    shake(layer)
    before, expected = state(layer), layer.weight.clone()
    with lora_merged(layer):
        assert torch.equal(layer.weight, expected)
        assert parametrize.is_parametrized(layer, "bias")
    assert state(layer) == before


def test_a_merged_block_needs_an_adapter() -> None:
    with (
        pytest.raises(AdapterError, match="there is no weight with an adapter"),
        lora_merged(nn.Linear(3, 2)),
    ):
        pass


@pytest.mark.parametrize("verb", [register_lora, remove_lora, merge_lora, base_state_dict])
def test_the_verbs_are_refused_in_a_merged_block(verb: Callable[[nn.Module], Any]) -> None:
    model = nn.Sequential(adapted("a"), nn.Linear(5, 4))
    before = state(model)
    with lora_merged(model), pytest.raises(LoRAError, match="can't be called in a lora_merged"):
        verb(model)
    assert state(model) == before


def test_a_copy_made_in_a_merged_block_is_plain() -> None:
    layer = adapted("a")
    expected = layer.weight.clone()
    with lora_merged(layer):
        twin = copy.deepcopy(layer)
    assert type(twin) is nn.Linear
    assert torch.equal(twin.weight, expected)
    register_lora(twin, rank=2)


def test_what_replaces_a_weight_in_a_merged_block_is_lost_and_nothing_else() -> None:
    layer = adapted("a")
    before = state(layer)
    with lora_merged(layer):
        parametrizations.weight_norm(layer)
    assert state(layer) == before


def test_a_merged_block_keeps_orders_and_modes_that_somebody_has_changed() -> None:
    layer = adapted("a")
    layer.extra, layer.gain = nn.Tanh(), nn.Parameter(torch.ones(5))
    layer._parameters["bias"] = layer._parameters.pop("bias")
    layer.parametrizations.weight[0].eval()
    before = state(layer)
    with lora_merged(layer):
        pass
    assert state(layer) == before


def test_in_a_merged_block_the_parameters_are_in_the_bases_order() -> None:
    plain = nn.LSTM(4, 5)
    lstm = copy.deepcopy(plain)
    register_lora(lstm, rank=2, target="weight_hh_l0")
    with lora_merged(lstm):
        assert list(lstm.state_dict()) == list(plain.state_dict())


class Turned(nn.Module):
    """A product, which autocast would round; in training it counts."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Parameter(torch.linalg.qr(torch.randn(6, 6))[0], requires_grad=False)
        self.register_buffer("reads", torch.tensor(0))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        self.reads += self.training
        return weight @ self.turn

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return weight @ self.turn.T


def turned() -> nn.Linear:
    torch.manual_seed(0)
    layer = parametrize.register_parametrization(nn.Linear(6, 5), "weight", Turned())
    register_lora(layer, rank=2)
    shake(layer)
    return layer


def test_anothers_product_is_rounded_by_no_autocast_and_reads_nothing_in_training() -> None:
    layer, twin = turned(), turned()
    reads = int(layer.parametrizations.weight[0].reads)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with lora_merged(layer):
            merged = layer.weight.detach().clone()
        merge_lora(layer)
    with lora_merged(twin):
        assert torch.equal(twin.weight, merged)
    merge_lora(twin)
    assert torch.equal(
        layer.parametrizations.weight.original, twin.parametrizations.weight.original
    )
    assert layer.parametrizations.weight[0].reads == reads


def test_a_weight_that_is_infinite_already_can_be_merged() -> None:
    layer = adapted("a")
    with torch.no_grad():
        layer.parametrizations.weight.original[1, 2] = -torch.inf
    merge_lora(layer)
    assert layer.weight[1, 2] == -torch.inf


class Third(nn.Module):
    """Has an inverse that is off by so much, beside rounding."""

    def __init__(self, off: float) -> None:
        super().__init__()
        self.off = off

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 3

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 3 * (1 + self.off)


def test_an_inverse_may_be_off_by_rounding_alone() -> None:
    layers = []
    for off in (0.0, 1e-4):
        layers.append(parametrize.register_parametrization(nn.Linear(60, 50), "weight", Third(off)))
        register_lora(layers[-1], rank=2)
        shake(layers[-1])
    merge_lora(layers[0])
    with pytest.raises(LoRAError, match="Third, in front of the adapter, can't take the merged"):
        merge_lora(layers[1])


def test_several_in_front_of_an_adapter_are_inverted_from_the_last() -> None:
    layer = parametrize.register_parametrization(nn.Linear(6, 5), "weight", Halved())
    parametrize.register_parametrization(layer, "weight", Raised())
    register_lora(layer, rank=2)
    shake(layer)
    expected = layer.weight.detach().clone()
    merge_lora(layer)
    torch.testing.assert_close(layer.weight, expected)


class Raised(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + 1

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return weight - 1
