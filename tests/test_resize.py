"""Resizing adapters, held against the updates themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lora_param import (
    AdapterError,
    LoRAError,
    combine_lora,
    lora_parameters,
    named_lora_parameters,
    resize_lora,
    select_lora,
)

from .test_combine import layer, update


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_resizing_keeps_the_best_of_the_update_and_its_scale(rank: int) -> None:
    model = layer({"a": 3, "b": 2})
    before, scale = update(model, "a"), model.parametrizations.weight[0].scale  # type: ignore[union-attr]
    [fit] = resize_lora(model, rank, "a")
    values = torch.linalg.svdvals(before)
    assert fit.error == pytest.approx((values[rank:].norm() / values.norm()).item(), abs=1e-12)
    assert ((update(model, "a") - before).norm() / before.norm()).item() == pytest.approx(fit.error, abs=1e-12)  # fmt: skip
    delta: Any = model.parametrizations.weight[0]  # type: ignore[union-attr]
    assert (delta.rank, delta.scale) == (rank, pytest.approx(scale))
    assert delta.lora_B.shape == (6, rank)


def test_new_room_is_trained() -> None:
    model = layer({"a": 2})
    resize_lora(model, 4)
    optimizer = torch.optim.SGD(lora_parameters(model), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(9, 7).double()).square().sum().backward()
        optimizer.step()
    assert torch.linalg.matrix_rank(update(model, "a")) == 4


def test_resizing_keeps_switches_and_flags() -> None:
    model = layer({"a": 3, "b": 2})
    delta: Any = model.parametrizations.weight[0]  # type: ignore[union-attr]
    select_lora(model, {"b": 0.5})
    resize_lora(model, 2)
    assert model.parametrizations.weight[0] is delta  # type: ignore[index]
    assert [p.requires_grad for p in lora_parameters(model)] == [False, False, True, True]
    select_lora(model, ["a", "b"])
    assert all(p.requires_grad for p in lora_parameters(model))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: resize_lora(m, 0), LoRAError, "rank must be a positive integer"),
        (lambda m: resize_lora(m, 2, "c"), AdapterError, "an adapter 'c'"),
    ],
)
def test_resizing_refuses_what_it_cannot_do(
    call: Callable[[nn.Module], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(layer({"a": 2, "b": 3}))


def test_only_pairs_are_resized() -> None:
    with pytest.raises(AdapterError, match="no pair of factors to resize"):
        resize_lora(layer({"a": 2}, "dense"), 2)


def anchored() -> Any:
    model = layer({"a": 2, "b": 2}, init="pissa")
    model.parametrizations.weight[0].shift_A.requires_grad_(False)  # type: ignore[union-attr]
    return model


def test_an_anchored_pair_is_plain_when_it_is_resized() -> None:
    model = anchored()
    before = update(model, "a")
    resize_lora(model, 5, "a")
    torch.testing.assert_close(update(model, "a"), before, rtol=0, atol=1e-12)
    assert not [name for name in model.state_dict() if "weight.0.start" in name]
    combine_lora(model, {"a": 1}, adapter="again")
    torch.testing.assert_close(update(model, "again"), before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("selected", [["a", "b"], "b"])
def test_resizing_keeps_each_factors_flag(selected: Any) -> None:
    model = anchored()
    select_lora(model, selected)
    resize_lora(model, 5, "a")
    select_lora(model, ["a", "b"])
    flags = {name: p.requires_grad for name, p in named_lora_parameters(model)}
    assert (flags["weight.a.lora_A"], flags["weight.a.lora_B"]) == (False, True)
