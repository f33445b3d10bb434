"""The adapters' own tensors: their names, and loading all of them or none."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_param import (
    StateDictError,
    load_lora_state_dict,
    lora_parameters,
    lora_state_dict,
    named_lora_parameters,
    register_lora,
)

from .cases import shake
from .state_cases import net


def names(adapter: str, *others: str) -> list[str]:
    parts = ("lora_A", "lora_B", *others)
    return [f"{index}.weight.{adapter}.{part}" for index in (0, 1) for part in parts]


def test_names_are_weight_adapter_and_factor() -> None:
    assert list(lora_state_dict(net())) == names("default", "_extra_state")


def test_names_do_not_depend_on_what_else_is_registered() -> None:
    assert list(lora_state_dict(net("a", "b"), "b")) == list(lora_state_dict(net("b")))


def test_an_optimizer_gets_exactly_what_trains() -> None:
    model = net("a", "b")
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert list(map(id, lora_parameters(model))) == list(map(id, trainable))
    assert [name for name, _ in named_lora_parameters(model, "a")] == names("a")


def test_the_state_dict_is_detached_and_shares_memory() -> None:
    model = net()
    state = lora_state_dict(model)
    for name, parameter in named_lora_parameters(model):
        assert not state[name].requires_grad
        assert state[name].data_ptr() == parameter.data_ptr()


def test_loading_copies_every_factor() -> None:
    source, model = net("a", "b"), net("a", "b")
    load_lora_state_dict(model, lora_state_dict(source))
    for a, b in zip(lora_parameters(model), lora_parameters(source), strict=True):
        assert torch.equal(a, b)
        assert a is not b


def test_loading_one_adapter_leaves_the_other() -> None:
    source, model = net("a"), net("a", "b")
    before = {name: t.clone() for name, t in lora_state_dict(model, "b").items()}
    load_lora_state_dict(model, lora_state_dict(source), "a")
    assert all(torch.equal(t, before[name]) for name, t in lora_state_dict(model, "b").items())
    assert torch.equal(model[0].weight, model[0].weight)


def test_loading_converts_to_the_adapters_dtype() -> None:
    source, model = net(dtype=torch.float64), net(dtype=torch.bfloat16)
    load_lora_state_dict(model, lora_state_dict(source))
    for a, b in zip(lora_parameters(model), lora_parameters(source), strict=True):
        assert torch.equal(a, b.to(torch.bfloat16))


A = "0.weight.default.lora_A"


BROKEN: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("missing", lambda s: s.pop(A), f"missing: {A}"),
    ("unexpected", lambda s: s.update(junk=torch.ones(1)), "unexpected: junk"),
    ("misshapen", lambda s: s.update({A: torch.ones(3, 6)}), rf"{A} is \(3, 6\), should be \(2, 6\)"),
    ("transposed", lambda s: s.update({A: s[A].T}), rf"{A} is \(6, 2\), should be \(2, 6\)"),
    ("integer", lambda s: s.update({A: torch.ones(2, 6).int()}), f"{A} is torch.int32"),
    ("complex", lambda s: s.update({A: torch.ones(2, 6) * 1j}), f"{A} is torch.complex64"),
    ("no tensor", lambda s: s.update({A: [1.0]}), f"{A} is list"),
    ("two faults", lambda s: (s.pop(A), s.update(junk=1)), f"missing: {A}; unexpected: junk"),
    ("infinite", lambda s: s[A].fill_(math.nan), f"not finite: {A}"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("breaking", "message"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN]
)
def test_a_state_dict_that_does_not_fit_is_refused_whole(
    breaking: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    model = net()
    state = {name: tensor.clone() for name, tensor in lora_state_dict(net()).items()}
    before = {name: tensor.clone() for name, tensor in lora_state_dict(model).items()}
    breaking(state)
    with pytest.raises(StateDictError, match=f"nothing was loaded: .*{message}"):
        load_lora_state_dict(model, state)
    assert all(torch.equal(t, before[name]) for name, t in lora_state_dict(model).items())


@pytest.mark.parametrize("state", [None, [], "adapter.safetensors"])
def test_what_is_no_mapping_is_refused(state: Any) -> None:
    with pytest.raises(StateDictError, match="a state dict must be a mapping, got"):
        load_lora_state_dict(net(), state)


def test_factors_can_be_exchanged_through_views_of_each_other() -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    register_lora(model, rank=2)
    shake(model)
    state = lora_state_dict(model)
    before = {name: tensor.clone() for name, tensor in state.items()}
    load_lora_state_dict(model, {f"{1 - int(name[0])}{name[1:]}": t for name, t in state.items()})
    for name, tensor in lora_state_dict(model).items():
        assert torch.equal(tensor, before[f"{1 - int(name[0])}{name[1:]}"])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(2, 5, device="meta"), "without values to copy"),
        (torch.ones(2, 5).to_sparse(), "without values to copy"),
        (torch.full((2, 5), 1e300, dtype=torch.float64), "not finite"),
    ],
)
def test_a_value_that_cannot_be_taken_over_is_refused_before_any_is(value, message: str) -> None:
    model = net()
    before = {name: tensor.clone() for name, tensor in lora_state_dict(model).items()}
    state = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    state["1.weight.default.lora_A"] = value
    with pytest.raises(StateDictError, match=f"nothing was loaded: .*{message}"):
        load_lora_state_dict(model, state)
    assert all(torch.equal(t, before[name]) for name, t in lora_state_dict(model).items())


def test_values_that_share_memory_with_the_factors_by_another_storage_are_copied_first() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 3))
    register_lora(model, rank=1)
    shake(model)
    first, second = "0.weight.default.lora_B", "1.weight.default.lora_B"
    old = {name: each.clone() for name, each in lora_state_dict(model).items()}
    new = lora_state_dict(model)
    new[first], new[second] = (torch.from_numpy(new[name].numpy()) for name in (second, first))
    load_lora_state_dict(model, new)
    assert torch.equal(lora_state_dict(model)[first], old[second])
    assert torch.equal(lora_state_dict(model)[second], old[first])
