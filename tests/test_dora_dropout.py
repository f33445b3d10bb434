"""DoRA with dropout, which drops from all that isn't the base."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 as everybody calls it
from transformers.pytorch_utils import Conv1D

from lora_param import lora_parameters, register_lora
from lora_param.deltas import dora as kind

from .cases import adapted, shake
from .test_dora import dora, original_of


@pytest.mark.parametrize("small", [kind.SMALL, 0])
@pytest.mark.parametrize("make", [lambda: nn.Linear(9, 8), lambda: Conv1D(8, 9)])
def test_dropout_drops_from_all_but_the_base(
    make: Callable[[], Any], small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kind, "SMALL", small)
    layer, x = make().double(), torch.randn(5, 9).double()
    plain = copy.deepcopy(layer)
    dora(layer, dropout=0.5).train()
    torch.manual_seed(0)
    got = layer(x)
    torch.manual_seed(0)
    dropped = F.dropout(x, 0.5)
    with torch.no_grad():
        difference = layer.eval().weight - original_of(layer)
    difference = difference.T if isinstance(layer, Conv1D) else difference
    torch.testing.assert_close(got, plain(x) + F.linear(dropped, difference))


def test_one_that_drops_gives_gradients_to_what_it_stands_on() -> None:
    layer, x = adapted(nn.Linear(9, 8), adapter="a").double(), torch.randn(5, 9).double()
    register_lora(layer, rank=2, adapter="b", kind="dora", dropout=0.5)
    shake(layer, "b")
    torch.manual_seed(0)
    y = layer(x)
    torch.manual_seed(0)
    dropped = F.dropout(x, 0.5)
    beneath, read = layer.parametrizations.weight[0](original_of(layer)), layer.eval().weight
    want = F.linear(x, beneath, layer.bias) + F.linear(dropped, read - beneath)
    found = (torch.autograd.grad(o.square().sum(), [*lora_parameters(layer)]) for o in (y, want))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)


def test_one_that_drops_nothing_may_stand_on_one_that_drops() -> None:
    layer, x = adapted(nn.Linear(9, 8), adapter="a", dropout=0.5), torch.randn(5, 9)
    register_lora(layer, rank=2, kind="dora")
    assert not torch.equal(layer(x), layer(x))  # and nothing warns of a dropout that is left out


def test_a_copy_that_was_made_for_inference_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kind, "SMALL", 0)
    layer, x = dora(nn.Linear(9, 8)), torch.randn(5, 9)
    with torch.inference_mode():
        torch.testing.assert_close(copy.deepcopy(layer)(x), layer(x))
