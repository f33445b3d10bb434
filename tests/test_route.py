"""Batches whose rows have adapters of their own, held against one adapter at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from lora_param import (
    lora_routed,
    lora_selected,
    named_lora_parameters,
    register_lora,
)

from .cases import CASES, Case, shake
from .kinds import KINDS

NAMES = ("a", "b", "c")
UNLIKE = {"attention": 1, "attention kdim vdim": 1, "transformer layer": 1}
FIRST = {"rnn": 1, "gru bidirectional": 1, "lstm projected": 1} | UNLIKE
"""Where cases have their rows, if not in front."""

ROWS = 6
KIND_NAMES = [name for name in KINDS if name != "statistics"]


def widened(x: Tensor, dim: int) -> Tensor:
    """Return an input of six rows made of one of any number."""
    copies = [x.roll(shift, -1) for shift in range(ROWS)]
    return torch.cat(copies, dim).narrow(dim, 0, ROWS).contiguous()


def build(case: Case, *kinds: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    layer, inputs = case.build(torch.float64)
    for name, kind in zip(NAMES, kinds if kinds[1:] else kinds * len(NAMES), strict=True):
        case.adapt(layer, name, kind)
        shake(layer, name)
    for module in layer.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return layer, tuple(widened(x, FIRST.get(case.id, 0)) for x in inputs)


def dims_of_outputs(case: Case, count: int) -> list[int]:
    first = FIRST.get(case.id, 0)
    if "attention" in case.id:
        return [first, 0][:count]
    if case.id in {"rnn", "gru bidirectional", "lstm", "lstm projected"}:
        return [first, 1, 1][:count]
    return [first] * count


def leaves(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]


def one_by_one(
    layer: nn.Module, case: Case, inputs: tuple[Tensor, ...], rows: list[dict[str, float]]
) -> list[Tensor]:
    """Run each row alone under its own selection."""
    dim = FIRST.get(case.id, 0)
    results = []
    for row, setting in enumerate(rows):
        with lora_selected(layer, setting):
            results.append(leaves(layer(*(x.narrow(dim, row, 1) for x in inputs))))
    dims = dims_of_outputs(case, len(results[0]))
    return [torch.cat(parts, d) for parts, d in zip(zip(*results, strict=True), dims, strict=True)]


def gradients(layer: nn.Module, outputs: list[Tensor]) -> dict[str, Tensor | None]:
    layer.zero_grad()
    total = sum(leaf.square().sum() for leaf in outputs)
    if total.requires_grad:  # type: ignore[union-attr]
        total.backward()  # type: ignore[union-attr]
    return {
        name: None if p.grad is None else p.grad.clone() for name, p in named_lora_parameters(layer)
    }


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10 * max(1.0, want.abs().max().item()))


SETTINGS: list[Any] = [None, "a", "b", {"a": 0.5, "b": -1.5}, ["a", "b"]]


def check_against_one_by_one(
    layer: nn.Module, case: Case, inputs: tuple[Tensor, ...], entries: list[Any], training: bool
) -> None:
    """Compare a routed batch's outputs and gradients with those of its rows, run alone."""
    rows = [dict(e) if isinstance(e, dict) else dict.fromkeys(e or (), 1.0) for e in entries]
    for module in layer.modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.training = training
    want = one_by_one(layer, case, inputs, rows)
    want_gradients = gradients(layer, want)
    layer.zero_grad(set_to_none=True)
    with lora_routed(layer, entries, dim=FIRST.get(case.id)):
        got = leaves(layer(*inputs))
        got_gradients = gradients(layer, got)
    for a, b in zip(got, want, strict=True):
        close(a, b)
    for name, gradient in want_gradients.items():
        other = got_gradients[name]
        assert (gradient is None) == (other is None), name
        if gradient is not None and other is not None:
            close(other, gradient)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", KIND_NAMES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_row_gives_what_its_setting_gives_alone(case: Case, kind: str, training: bool) -> None:
    layer, inputs = build(case, kind)
    draws = torch.Generator().manual_seed(len(case.id))
    mixes = "dora" not in kind and case.id != "sequential"  # which has statistics
    choice = SETTINGS if mixes else SETTINGS[:3]
    entries = [choice[i] for i in torch.randint(len(choice), (ROWS,), generator=draws).tolist()]
    check_against_one_by_one(layer, case, inputs, entries, training)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(CASES), st.booleans())
def test_any_kinds_on_any_layer_route_any_rows(
    data: st.DataObject, case: Case, training: bool
) -> None:
    kinds = data.draw(st.tuples(*[st.sampled_from(KIND_NAMES)] * len(NAMES)), "kinds")
    layer, inputs = build(case, *kinds)
    strengths = {
        name: st.just(1.0) if "dora" in kind else st.sampled_from([-1.5, 0.0, 0.5, 1.0])
        for name, kind in zip(NAMES, kinds, strict=True)
    }
    count = 1 if case.id == "sequential" else len(NAMES)  # of statistics a row has one's
    names = st.lists(st.sampled_from(NAMES), max_size=count, unique=True)
    entry = names.flatmap(lambda own: st.fixed_dictionaries({n: strengths[n] for n in own}))
    row = st.sampled_from([None, *NAMES]) | entry
    entries = data.draw(st.lists(row, min_size=ROWS, max_size=ROWS), "entries")
    check_against_one_by_one(layer, case, inputs, entries, training)


def linear(**options: Any) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(6, 5).double()
    for index, name in enumerate(NAMES):
        register_lora(layer, rank=1 + index, alpha=2.0 + index, adapter=name, **options)
    shake(layer)
    return layer
