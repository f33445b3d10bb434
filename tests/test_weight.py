"""The noun: what a weight knows, and a block of its rows."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lora_param import AdapterError, LoRAParametrization, lora_summary, merge_lora, remove_lora
from lora_param.checks import check_weights
from lora_param.deltas import DenseDelta
from lora_param.rows import Rows
from lora_param.undo import all_or_nothing
from lora_param.walk import Walk
from lora_param.weight import Weight

from .cases import adapted, shake


def attach(weight: Weight, delta: LoRAParametrization | DenseDelta) -> None:
    with all_or_nothing() as undo:
        weight.attach(delta, undo)


def with_block(kind: str = "lora") -> tuple[nn.Linear, nn.Linear, Weight]:
    torch.manual_seed(0)
    layer = nn.Linear(6, 8).requires_grad_(False)
    plain, block = copy.deepcopy(layer), Weight("", layer, "weight", Rows.of("2:5", 8))
    delta = LoRAParametrization(3, 6, 2, adapter="q") if kind == "lora" else DenseDelta((3, 6))
    attach(block, delta)
    shake(layer)
    return layer, plain, block


@pytest.mark.parametrize("kind", ["lora", "dense"])
def test_a_delta_on_a_block_of_rows_changes_these_alone(kind: str) -> None:
    layer, plain, block = with_block(kind)
    delta = layer.parametrizations.weight[0]
    expected = plain.weight.clone()
    expected[2:5] = delta.value(plain.weight[2:5])
    assert torch.equal(layer.weight, expected)
    assert not torch.equal(expected, plain.weight)
    x = torch.randn(3, 6)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, expected, plain.bias))
    space = {"lora": "activation or weight, by cost", "dense": "weight"}[kind]
    assert lora_summary(layer).weights[0].space == space
    assert block.name == "weight[2:5]"
    assert [weight.name for weight, _ in Walk(layer).deltas] == ["weight[2:5]"]


def test_a_block_knows_its_rows_of_all_that_a_weight_knows() -> None:
    layer, plain, block = with_block()
    assert torch.equal(block.original, plain.weight[2:5])
    assert torch.equal(block.value, layer.weight[2:5])
    assert block.view == (3, 6)
    assert block.deltas == [layer.parametrizations.weight[0]]
    assert Weight("", layer, "weight", Rows.of("0:2", 8)).deltas == []


def test_blocks_that_overlap_are_refused_under_one_name() -> None:
    layer, _, _ = with_block()
    check_weights([Weight("", layer, "weight", Rows.of("5:8", 8))], "q")
    with pytest.raises(AdapterError, match=r'weight\[4:6\]: there is an adapter "q"'):
        check_weights([Weight("", layer, "weight", Rows.of("4:6", 8))], "q")


def test_a_block_is_merged_and_removed_like_a_weight() -> None:
    layer, plain, _ = with_block()
    merged, expected = copy.deepcopy(layer), layer.weight.clone()
    merge_lora(merged)
    assert torch.equal(merged.weight, expected)
    remove_lora(layer)
    assert type(layer) is nn.Linear
    assert torch.equal(layer.weight, plain.weight)


def test_the_walk_names_tensors_as_the_plain_model_does() -> None:
    model = nn.Sequential(
        nn.Linear(6, 5), parametrizations.weight_norm(nn.Linear(5, 4)), nn.BatchNorm1d(4)
    )
    names = [name for name, _ in model.named_parameters()]
    buffers = [name for name, _ in model.named_buffers()]
    adapted(model, target="*")
    walk = Walk(model)
    assert [weight.name for weight, _ in walk.parameters] == names
    assert {weight.name for weight, _ in walk.tensors} == {*names, *buffers}


def test_a_module_that_holds_itself_is_walked_once() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    model.top = model
    assert [weight.name for weight in Walk(model).weights] == ["0.weight", "0.bias"]
