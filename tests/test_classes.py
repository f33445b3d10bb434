"""The class of an adapted module: types, properties, assignment, and reading a weight once."""

from __future__ import annotations

import copy
from abc import ABC
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lora_param import (
    LoRAError,
    LoRAParametrization,
    TargetError,
    fingerprint,
    lora_disabled,
    lora_parameters,
    register_lora,
    remove_lora,
)

from .cases import adapted, shake


def test_an_adapted_layer_is_still_of_its_type() -> None:
    layer = adapted(nn.Linear(6, 5))
    assert isinstance(layer, nn.Linear)
    assert parametrize.is_parametrized(layer, "weight")
    assert parametrize.type_before_parametrizations(layer) is nn.Linear


def test_equal_layers_share_one_class() -> None:
    first, second = adapted(nn.Linear(6, 5)), adapted(nn.Linear(3, 2))
    assert type(first) is type(second)


def test_a_class_with_a_metaclass_can_be_adapted() -> None:
    class Abstract(nn.Linear, ABC):
        pass

    layer = adapted(Abstract(6, 5))
    assert isinstance(layer, Abstract)
    remove_lora(layer)
    assert type(layer) is Abstract


def test_torchs_own_removal_from_one_module_leaves_its_siblings_and_copies() -> None:
    layer = adapted(nn.Linear(6, 5))
    twin, sibling = copy.deepcopy(layer), adapted(nn.Linear(6, 5))
    expected, sibling_expected = layer.weight.clone(), sibling.weight.clone()
    parametrize.remove_parametrizations(twin, "weight")
    assert type(twin) is nn.Linear
    assert torch.equal(twin.weight, expected)
    assert torch.equal(layer.weight, expected)
    assert torch.equal(sibling.weight, sibling_expected)


def test_torchs_own_removal_of_one_of_two_tensors_leaves_the_other_adapted() -> None:
    cell = adapted(nn.LSTMCell(4, 5))
    expected = cell.weight_hh.clone()
    parametrize.remove_parametrizations(cell, "weight_ih", leave_parametrized=False)
    assert isinstance(cell.weight_ih, nn.Parameter)
    assert torch.equal(cell.weight_hh, expected)
    cell(torch.ones(2, 4))
    remove_lora(cell)
    assert type(cell) is nn.LSTMCell


def test_assigning_to_an_adapted_weight_says_what_to_do_instead() -> None:
    layer = adapted(nn.Linear(6, 5))
    before = fingerprint(layer)
    with pytest.raises(
        LoRAError, match=r"assign to parametrizations\.weight\.original under no_grad"
    ):
        layer.weight = torch.zeros(5, 6)
    assert fingerprint(layer) == before


def test_parameters_called_like_a_dictionarys_methods_can_be_adapted() -> None:
    class Memory(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.keys, self.values = (nn.Parameter(torch.randn(4, 3)) for _ in range(2))

    memory = Memory()
    before = memory.keys
    adapted(memory, target="*")
    assert not torch.equal(memory.keys, before)
    remove_lora(memory)
    assert memory.keys is before


READ_OFTEN = {
    "attention": lambda: nn.MultiheadAttention(8, 2),
    "attention kdim vdim": lambda: nn.MultiheadAttention(8, 2, kdim=8, vdim=8),
    "lstm": lambda: nn.LSTM(8, 5, 2, bidirectional=True),
    "gru": lambda: nn.GRU(8, 5),
}


@pytest.mark.parametrize("layer", READ_OFTEN)
@pytest.mark.parametrize("grad", [True, False])
def test_a_forward_computes_each_weight_once(layer: str, grad: bool) -> None:
    model, x = adapted(READ_OFTEN[layer]()), torch.randn(3, 2, 8)
    calls = []
    for entry in model.modules():
        if isinstance(entry, LoRAParametrization):
            entry.register_forward_hook(lambda *args: calls.append(args))
    with torch.set_grad_enabled(grad):
        model(x, x, x) if "attention" in layer else model(x)
    assert len(calls) == len(list(lora_parameters(model))) // 2


def test_between_forwards_a_weight_is_computed_anew() -> None:
    lstm, x = adapted(nn.LSTM(4, 5)), torch.randn(3, 2, 4)
    with torch.no_grad():
        before = lstm(x)[0]
    shake(lstm)
    after = lstm(x)[0]
    assert not torch.equal(after, before)
    assert after.requires_grad


class Watched(nn.LSTM):
    """Looks at its weight without a graph before it uses it."""

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            self.norm = self.weight_hh_l0.norm()
        return super().forward(x)


def test_a_weight_read_without_a_graph_still_gets_its_gradient() -> None:
    lstm = adapted(Watched(4, 5))
    lstm(torch.randn(3, 2, 4))[0].sum().backward()
    assert all(factor.grad is not None for factor in lora_parameters(lstm))


def test_switching_inside_a_cache_shows_at_once() -> None:
    layer, x = nn.Linear(6, 5).requires_grad_(False), torch.randn(2, 6)
    before = layer(x)
    adapted(layer)
    with parametrize.cached():
        assert not torch.equal(layer(x), before)
        with lora_disabled(layer):
            assert torch.equal(layer(x), before)


def test_entries_of_a_parameter_list_can_be_adapted_and_a_slice_says_no() -> None:
    entries = nn.ParameterList([torch.randn(4, 3), torch.randn(4, 3)])
    before = entries[0].detach().clone()
    assert register_lora(entries, rank=2, target="*") == ["0", "1"]
    shake(entries)
    assert not torch.equal(entries[0], before)
    assert len(list(entries)) == 2
    with pytest.raises(LoRAError, match="a slice of an adapted ParameterList would hold copies"):
        entries[0:1]


def test_a_copy_of_an_adapted_parameter_dictionary_says_no() -> None:
    entries = nn.ParameterDict({"a": torch.randn(4, 3)})
    register_lora(entries, rank=2, target="a")
    with pytest.raises(LoRAError, match=r"would lose its adapters; use copy\.deepcopy"):
        entries.copy()


@pytest.mark.parametrize("value", [nn.Parameter(torch.zeros(5, 6)), torch.zeros(5, 6), None])
def test_replacing_an_adapted_weight_in_any_way_is_refused(value: Any) -> None:
    layer = adapted(nn.Linear(6, 5))
    with pytest.raises(LoRAError, match="can't assign to an adapted weight"):
        layer.weight = value


class Doubling(nn.ParameterList):
    """Reads its entries in a way of its own."""

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(index) * 2


def test_a_parameter_list_keeps_its_own_way_of_reading() -> None:
    entries = Doubling([torch.ones(4, 3)])
    register_lora(entries, rank=1, target="*")
    assert torch.equal(entries[0], torch.full((4, 3), 2.0))


def test_a_change_of_scale_shows_inside_a_cache() -> None:
    layer = adapted(nn.Linear(6, 5))
    with parametrize.cached():
        before = layer.weight
        layer.parametrizations.weight[0].scale *= 2
        assert not torch.equal(layer.weight, before)


@pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.LSTM(4, 5), nn.MultiheadAttention(4, 2)])
def test_resetting_an_adapted_layer_is_refused(layer: nn.Module) -> None:
    adapted(layer)
    reset = getattr(layer, "reset_parameters", None) or layer._reset_parameters
    before = fingerprint(layer)
    with pytest.raises(LoRAError, match="the draws would go into a temporary sum and be lost"):
        reset()
    assert fingerprint(layer) == before


@pytest.mark.parametrize(
    "write",
    [nn.init.ones_, lambda weight: weight.data.fill_(1), lambda weight: weight.detach().zero_()],
)
def test_what_is_written_into_a_read_weight_reaches_neither_original_nor_adapter(write) -> None:
    layer = adapted(nn.Linear(6, 5))
    before, read = fingerprint(layer), layer.weight.clone()
    write(layer.weight)
    assert fingerprint(layer) == before
    assert torch.equal(layer.weight, read)


def test_reading_inside_a_cache_sees_an_adapter_switched_off() -> None:
    layer = adapted(nn.Linear(6, 5))
    with parametrize.cached():
        assert not torch.equal(layer.weight, layer.parametrizations.weight.original)
        with lora_disabled(layer):
            assert layer.weight is layer.parametrizations.weight.original


def test_an_adapted_layer_is_a_leaf_of_a_symbolic_trace() -> None:
    graph = torch.fx.symbolic_trace(nn.Sequential(adapted(nn.Linear(6, 5)))).graph
    assert [node.op for node in graph.nodes] == ["placeholder", "call_module", "output"]


class HalvedBias(nn.Linear):
    """A layer whose bias is computed."""

    @property
    def bias(self) -> Tensor:  # type: ignore[override]
        return self._parameters["bias"] * 0.5  # type: ignore[operator]


class LookedBias(nn.Linear):
    """A layer that changes the bias it is asked for."""

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        return value * 0.5 if name == "bias" else value


@pytest.mark.parametrize("kind", [HalvedBias, LookedBias])
def test_a_bias_is_what_reading_it_gives(kind: Any) -> None:
    layer, x = nn.Linear(4, 3), torch.randn(2, 4)
    layer.__class__ = kind
    expected = layer(x)
    register_lora(layer, rank=2, target="weight")
    assert torch.equal(layer(x), expected)


class FromTable(nn.Linear):
    """A layer that takes its weight out of torch's table."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self._parameters["weight"].T  # type: ignore[union-attr]


def test_a_weight_that_is_taken_out_of_a_table_is_refused() -> None:
    layer = FromTable(4, 3)
    with pytest.raises(TargetError, match=r"weight: FromTable\.forward takes it out of _parameter"):
        register_lora(layer, rank=2)
    assert register_lora(layer, target=(), train="bias") == ["bias"]
