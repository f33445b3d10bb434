"""Dropout in front of an adapter, in activation space alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from lora_param import LoRAError, TargetError, disable_lora, register_lora

from .activation_cases import (
    WEIGHT_SPACE,
    Reading,
)
from .cases import CASES, Case, adapted, floats, shake

DROPPING = {
    "linear": (lambda: nn.Linear(8, 5), floats(4, 8)),
    "conv1d": (lambda: nn.Conv1d(8, 5, 1), floats(4, 8, 3)),
    "transformers Conv1D": (lambda: Conv1D(5, 8), floats(4, 8)),
}


@pytest.mark.parametrize("layer", DROPPING)
def test_dropout_drops_the_adapters_input_alone(layer: str) -> None:
    model, (x,) = DROPPING[layer][0](), DROPPING[layer][1]()
    base = model(x)
    adapted(model, dropout=0.5, alpha=6.0)
    update = model.eval()(x) - base
    model.train()
    torch.manual_seed(0)
    dropped = model(x) - base
    torch.manual_seed(0)
    expected = model.eval()(nn.functional.dropout(x, 0.5)) - model(torch.zeros_like(x))
    with_base = copy.deepcopy(model)
    disable_lora(with_base)
    torch.manual_seed(0)
    expected -= with_base(nn.functional.dropout(x, 0.5)) - with_base(torch.zeros_like(x))
    torch.testing.assert_close(dropped, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(dropped, update)


@pytest.mark.parametrize("kind", DROPPING)
def test_dropout_is_off_in_evaluation_and_spares_other_adapters(kind: str) -> None:
    layer, (x,) = DROPPING[kind][0](), DROPPING[kind][1]()
    register_lora(layer, rank=2, adapter="a")
    register_lora(layer, rank=2, adapter="b", dropout=0.9)
    shake(layer, "a")
    assert torch.equal(layer.eval()(x), layer(x))
    torch.testing.assert_close(layer.train()(x), layer.eval()(x))
    shake(layer, "b")
    assert not torch.allclose(layer.train()(x), layer.eval()(x))


@pytest.mark.parametrize("dropout", [-0.1, 1, 1.5, float("nan"), True, "0.1", None])
def test_dropout_out_of_range_is_refused(dropout: Any) -> None:
    layer = nn.Linear(8, 5)
    with pytest.raises(LoRAError, match="dropout must satisfy 0 <= dropout < 1, got"):
        register_lora(layer, rank=2, dropout=dropout)
    assert type(layer) is nn.Linear


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.id in WEIGHT_SPACE], ids=lambda case: case.id
)
def test_dropout_is_refused_where_only_weight_space_is_possible(case: Case) -> None:
    layer, _ = case.build()
    with pytest.raises(
        TargetError, match="dropout needs a layer that computes in activation space"
    ):
        case.adapt(layer, dropout=0.1)
    assert not any(parametrize.is_parametrized(each) for each in layer.modules())


def test_reading_a_weight_under_dropout_warns_of_what_it_gets() -> None:
    layer = adapted(nn.Linear(8, 5), dropout=0.1)
    with pytest.warns(UserWarning, match="adapter 'default' has dropout, which needs its layer's"):
        Reading(layer)(torch.randn(2, 8))
    Reading(layer.eval())(torch.randn(2, 8))
    with torch.no_grad():
        assert layer.train().weight.shape == (5, 8)


def test_dropout_is_refused_for_indices() -> None:
    with pytest.raises(TargetError, match="an input to drop from, which a Embedding has not"):
        register_lora(nn.Embedding(7, 5), rank=2, target="weight", dropout=0.1)
