"""A delta's numbers are state: they are saved with its tensors, and loaded or refused by name."""

from __future__ import annotations

import copy
import io
import json
import pickle
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor, nn

from lora_param import (
    LoRAError,
    LoRAParametrization,
    StateDictError,
    combine_lora,
    load_lora_state_dict,
    lora_routed,
    lora_state_dict,
    register_lora,
    resize_lora,
    select_lora,
)

from .cases import shake

KEY = "weight.default._extra_state"


def layer(alpha: float = 2.0, dropout: float = 0.0, rank: int = 2) -> nn.Linear:
    module = nn.Linear(6, 5)
    register_lora(module, rank=rank, alpha=alpha, dropout=dropout)
    shake(module)
    return module


def numbers(module: nn.Module) -> dict[str, Any]:
    return module.parametrizations.weight[0].numbers


def through_torch(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)


WAYS = {
    "state dict": lambda a, b: b.load_state_dict(a.state_dict(), strict=True),
    "state dict, assigned": lambda a, b: b.load_state_dict(a.state_dict(), assign=True),
    "state dict, through a file": lambda a, b: b.load_state_dict(through_torch(a.state_dict())),
    "state dict, through safetensors": lambda a, b: b.load_state_dict(load(save(a.state_dict()))),
    "adapters": lambda a, b: load_lora_state_dict(b, lora_state_dict(a)),
    "adapters, through a file": lambda a, b: load_lora_state_dict(
        b, through_torch(lora_state_dict(a))
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_loading_takes_numbers_over(way: str) -> None:
    source, model, x = layer(16.1, 0.25), layer(2.0), torch.randn(3, 6)
    WAYS[way](source, model)
    assert numbers(model) == {"rank": 2, "alpha": 16.1, "scaling": "lora", "dropout": 0.25}
    model.bias.data.copy_(source.bias)
    model.parametrizations.weight.original.data.copy_(source.parametrizations.weight.original)
    assert torch.equal(model.eval()(x), source.eval()(x))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_them(duplicate: Any) -> None:
    assert numbers(duplicate(layer(16.1, 0.25))) == numbers(layer(16.1, 0.25))


def test_converting_a_model_leaves_them_exact() -> None:
    model = layer(16.1, 0.25).bfloat16()
    other = layer()
    load_lora_state_dict(other, lora_state_dict(model))
    assert numbers(other)["alpha"] == 16.1


def spoiled(**changes: Any) -> Tensor:
    said = {"kind": "lora", **numbers(layer()), **changes}
    content = {name: value for name, value in said.items() if value is not ...}
    return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)


SPOILED = {
    "another rank": (spoiled(rank=1), "its rank must be 2, got 1"),
    "another kind": (spoiled(kind="dense"), "its kind must be 'lora', got 'dense'"),
    "other rows": (spoiled(rows="0:2"), "its rows must be None, got '0:2'"),
    "one missing": (
        spoiled(alpha=...),
        r"a lora delta has \['rank', 'alpha', 'scaling', 'dropout'\], got",
    ),
    "one too many": (spoiled(beta=1.0), "a lora delta has"),
    "alpha no number": (spoiled(alpha="x"), "alpha must be a finite number"),
    "alpha infinite": (spoiled(alpha=float("inf")), "alpha must be a finite number"),
    "dropout of one": (spoiled(dropout=1.0), "dropout must satisfy 0 <= dropout < 1, got 1.0"),
    "no JSON": (torch.arange(5, dtype=torch.uint8), "must hold a delta's kind and numbers"),
    "floats": (torch.randn(3), "must hold a delta's kind and numbers, got Tensor"),
    "no tensor": ("lora", "must hold a delta's kind and numbers, got str"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_numbers_that_are_no_pairs_are_refused_and_nothing_is_loaded(case: str) -> None:
    value, message = SPOILED[case]
    model = layer()
    before = {name: tensor.clone() for name, tensor in lora_state_dict(model).items()}
    state = {name: tensor + 1 for name, tensor in before.items()} | {KEY: value}
    with pytest.raises(StateDictError, match=message) as error:
        load_lora_state_dict(model, state)
    assert KEY in str(error.value)
    for name, tensor in lora_state_dict(model).items():
        assert torch.equal(tensor, before[name])


def test_a_state_without_them_is_refused() -> None:
    model = layer()
    state = {name: each for name, each in lora_state_dict(model).items() if name != KEY}
    with pytest.raises(StateDictError, match=f"missing: {KEY}"):
        load_lora_state_dict(model, state)


def test_a_plain_checkpoint_leaves_them_as_they_are() -> None:
    model = layer(16.1, 0.25)
    model.load_state_dict(nn.Linear(6, 5).state_dict(), strict=True)
    assert numbers(model) == {"rank": 2, "alpha": 16.1, "scaling": "lora", "dropout": 0.25}


def test_setting_the_scale_or_alpha_acts_at_once_and_is_saved() -> None:
    model, x = layer(), torch.randn(3, 6)
    entry = model.parametrizations.weight[0]
    before = model(x)
    entry.scale = 4.0
    assert (entry.alpha, entry.scale) == (8.0, 4.0)
    assert not torch.equal(model(x), before)
    entry.alpha = 2
    assert entry.scale == 1.0
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("value", [torch.tensor(2.0), float("nan"), "2", True, None])
def test_a_scale_that_is_no_number_is_refused(value: Any) -> None:
    entry = LoRAParametrization(5, 6, 2)
    with pytest.raises(LoRAError, match="scale must be a finite number, got"):
        entry.scale = value
    assert entry.scale == 1.0


@pytest.mark.parametrize("value", [4, 0, "2", 2.0, True])
def test_a_rank_that_its_factors_have_not_is_refused(value: Any) -> None:
    entry = LoRAParametrization(5, 6, 2)
    with pytest.raises(LoRAError, match=r"its rank must be 2, got .*; resize_lora"):
        entry.rank = value
    assert (entry.rank, entry.scale) == (2, 1.0)


@settings(max_examples=200, deadline=None)
@given(st.floats(-1e30, 1e30), st.floats(0, 0.999), st.integers(1, 5), st.sampled_from([1.0, 3.0]))
def test_any_numbers_come_back_to_the_bit(
    alpha: float, dropout: float, rank: int, other: float
) -> None:
    source, model = layer(alpha, dropout, rank), layer(other, 0.0, rank)
    model.load_state_dict(source.state_dict(), strict=True)
    assert numbers(model) == numbers(source)
    assert numbers(model) == {"rank": rank, "alpha": alpha, "scaling": "lora", "dropout": dropout}


def two_adapters() -> nn.Linear:
    module = layer()
    register_lora(module, rank=2, adapter="b")
    shake(module)
    return module


def routed(model: nn.Linear, strength: Any) -> Tensor:
    with lora_routed(model, [{"default": strength}, None]):
        return model(torch.ones(2, 6))[0]


ASKED = {
    "alpha": lambda model, n: register_lora(model, rank=2, alpha=n, adapter="c"),
    "select": lambda model, n: select_lora(model, {"default": n}),
    "route": routed,
    "combine": lambda model, n: combine_lora(model, {"default": n}, adapter="c"),
    "strength": lambda model, n: setattr(model.parametrizations.weight[0], "strength", n),
}


@pytest.mark.parametrize("call", ASKED)
def test_any_real_number_is_taken_where_one_is_asked_for_and_kept_as_a_float(call: str) -> None:
    results = []
    for number in (0.5, np.float32(0.5), Fraction(1, 2)):
        torch.manual_seed(0)
        model = two_adapters()
        said = ASKED[call](model, number)
        results.append([said, *model.state_dict().values()])
    for other in results[1:]:
        assert str(other) == str(results[0])


@pytest.mark.parametrize("call", ASKED)
@pytest.mark.parametrize(
    "number",
    [True, "0.5", 1j, torch.tensor(0.5, requires_grad=True), 10**400],
    ids=["a bool", "a text", "complex", "a tensor", "too large"],
)
def test_what_is_no_number_is_refused_where_one_is_asked_for(call: str, number: Any) -> None:
    with pytest.raises(LoRAError, match=r"(?s)must be a finite number.*; give a number"):
        ASKED[call](two_adapters(), number)


def test_a_whole_number_of_another_type_is_a_rank() -> None:
    model = layer()
    register_lora(model, rank=np.int64(100), adapter="lowered")
    assert model.parametrizations.weight[1].numbers["rank"] == 5
    assert [fit.rank for fit in resize_lora(model, np.int64(3), "default")] == [3]
    [fit] = combine_lora(model, {"default": 1, "lowered": 1}, adapter="c", rank=np.int32(1))
    assert fit.rank == 1


IDIOMS = {
    "made half": lambda state: {name: value.half() for name, value in state.items()},
    "averaged": lambda state: {name: value * 0.5 + value * 0.5 for name, value in state.items()},
}


@pytest.mark.parametrize("idiom", IDIOMS)
def test_what_is_done_to_every_tensor_of_a_state_leaves_them_readable(idiom: str) -> None:
    source, model = layer(16.1, 0.25), layer()
    model.load_state_dict(IDIOMS[idiom](source.state_dict()), strict=True)
    assert numbers(model) == numbers(source)


def test_states_can_be_copied_into_each_other() -> None:
    source, model = layer(16.1, 0.25), layer()
    state = model.state_dict()
    for name, value in source.state_dict().items():
        state[name].copy_(value)
    model.load_state_dict(state)
    assert numbers(model) == numbers(source)


def test_torch_names_the_weight_whose_numbers_do_not_fit() -> None:
    model, other = nn.Sequential(layer(rank=2)), nn.Sequential(layer(rank=1))
    with pytest.raises(
        RuntimeError, match=r"0\.parametrizations\.weight\.0\._extra_state: its rank"
    ):
        model.load_state_dict(other.state_dict())


def test_numbers_taken_over_before_a_fault_are_given_back() -> None:
    model, source = (nn.Sequential(layer(alpha), layer(alpha)) for alpha in (2.0, 16.0))
    for adapted, strength in ((model, 0.3), (source, 0.5)):
        select_lora(adapted, {"default": strength})
    before = lora_state_dict(model)
    state = {**lora_state_dict(source), f"1.{KEY}": spoiled(rank=1)}
    with pytest.raises(StateDictError, match=rf"1\.{KEY}: its rank must be 2"):
        load_lora_state_dict(model, state)
    assert all(torch.equal(each, before[name]) for name, each in lora_state_dict(model).items())
