"""The block in which adapters are merged: plain inside, everything back behind it."""

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
    base_state_dict,
    disable_lora,
    lora_merged,
    merge_lora,
    register_lora,
    remove_lora,
)

from .cases import CASES, Case, outputs, shake
from .merge_cases import adapted


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
