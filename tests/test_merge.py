"""Merging: the output stays, the module is plain, and what can't be merged is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from lora_param import (
    AdapterError,
    LoRAError,
    TargetError,
    disable_lora,
    fingerprint,
    lora_disabled,
    lora_merged,
    merge_lora,
    register_lora,
)

from .cases import shake
from .merge_cases import adapted


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
    with pytest.raises(LoRAError, match="Halved stands behind adapter 'a', so one"):
        merge_lora(layer, "b")
    weight = layer.weight.detach().clone()
    merge_lora(layer)
    torch.testing.assert_close(layer.weight, weight)


def pair_of(a: str, b: str, rows: bool = False) -> nn.Linear:
    layer = nn.Linear(6, 4).double()
    for kind, name, block in ((a, "a", "[0:2]"), (b, "b", "[2:4]")):
        register_lora(layer, rank=2, kind=kind, adapter=name, target=f"weight{block * rows}")
    shake(layer)
    return layer


@pytest.mark.parametrize("kinds", [("dora", "lora"), ("lora", "dora"), ("dora", "dora")])
def test_an_adapter_is_not_merged_past_one_that_it_does_not_add_to(kinds: tuple[str, str]) -> None:
    layer = pair_of(*kinds)
    with pytest.raises(LoRAError, match=r"weight: .* stands behind adapter 'a', so one can't be"):
        merge_lora(layer, "b")
    assert [each.adapter for each in layer.parametrizations.weight] == ["a", "b"]


@pytest.mark.parametrize(
    ("kinds", "rows", "merged"),
    [
        (("dora", "lora"), False, "a"),
        (("lora", "dora"), False, "a"),
        (("dora", "lora"), True, "b"),
        (("lora", "lora"), False, "b"),
    ],
)
def test_one_of_two_is_merged_where_that_keeps_what_is_read(
    kinds: tuple[str, str], rows: bool, merged: str
) -> None:
    layer = pair_of(*kinds, rows=rows)
    weight = layer.weight.detach().clone()
    merge_lora(layer, merged)
    torch.testing.assert_close(layer.weight, weight)


def test_an_adapter_that_is_off_is_in_nobodys_way() -> None:
    layer = pair_of("dora", "lora")
    disable_lora(layer, "a")
    weight = layer.weight.detach().clone()
    merge_lora(layer, "b")
    assert torch.equal(layer.weight, weight)


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
