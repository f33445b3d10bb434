"""Switches in blocks that overlap, and flags that come back when nobody needs them frozen."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import nn

from lora_param import (
    disable_lora,
    enable_lora,
    lora_disabled,
    lora_summary,
    register_lora,
    remove_lora,
)

from .cases import adapted


def test_blocks_that_overlap_leave_every_switch_as_it_was() -> None:
    layer = adapted(nn.Linear(6, 5))
    x = torch.randn(2, 6)
    expected = layer(x)
    first, second = lora_disabled(layer), lora_disabled(layer)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not torch.equal(layer(x), expected)
    second.__exit__(None, None, None)
    assert torch.equal(layer(x), expected)
    assert lora_summary(layer).weights[0].adapters[0].enabled


def test_blocks_in_threads_leave_every_switch_as_it_was() -> None:
    layer = adapted(nn.Linear(6, 5))
    together = threading.Barrier(4)

    def switch() -> None:
        together.wait()
        for _ in range(300):
            with lora_disabled(layer):
                pass

    threads = [threading.Thread(target=switch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert layer.parametrizations.weight[0].enabled


def test_a_delta_that_stands_twice_in_a_chain_is_switched_in_both_places() -> None:
    layer = adapted(nn.Linear(6, 5))
    chain = layer.parametrizations.weight
    once = chain[0](chain.original) - chain.original
    chain.append(chain[0])
    torch.testing.assert_close(layer.weight, chain.original + 2 * once)
    chain[0].enabled = False
    assert torch.equal(layer.weight, chain.original)
    chain[0].enabled = True
    torch.testing.assert_close(layer.weight, chain.original + 2 * once)


def test_a_switch_inside_a_block_holds_until_its_end() -> None:
    layer = adapted(nn.Linear(6, 5))
    disable_lora(layer)
    with lora_disabled(layer):
        enable_lora(layer)
        assert layer.parametrizations.weight[0].enabled
        with lora_disabled(layer):
            assert not layer.parametrizations.weight[0].enabled
        assert layer.parametrizations.weight[0].enabled
    assert not layer.parametrizations.weight[0].enabled


def test_a_copy_made_in_a_block_can_be_switched_on() -> None:
    layer = adapted(nn.Linear(6, 5))
    with lora_disabled(layer):
        twin = copy.deepcopy(layer)
    assert not twin.parametrizations.weight[0].enabled
    enable_lora(twin)
    assert torch.equal(twin.weight, layer.weight)


def thawed(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad and "lora" not in name]


def branches() -> nn.Module:
    model = nn.Module()
    model.left, model.right = nn.Linear(4, 4), nn.Linear(4, 4)
    return model


@pytest.mark.parametrize(
    "twin", [lambda model: model, copy.deepcopy], ids=["the model", "its copy"]
)
def test_removing_from_a_part_keeps_its_base_frozen_while_the_rest_trains(twin: Any) -> None:
    model = branches()
    register_lora(model, rank=2)
    model = twin(model)
    remove_lora(model.left)
    assert thawed(model) == []
    remove_lora(model)
    assert thawed(model) == ["left.weight", "left.bias", "right.weight", "right.bias"]


def test_a_copy_of_a_part_gets_its_flags_back_by_itself() -> None:
    model = branches()
    register_lora(model, rank=2)
    part = copy.deepcopy(model.left)
    remove_lora(part)
    assert all(parameter.requires_grad for parameter in part.parameters())
    assert thawed(model) == []


def test_the_second_adapter_keeps_frozen_what_the_first_one_froze() -> None:
    model = branches()
    register_lora(model, rank=2, adapter="a")
    register_lora(model, rank=2, adapter="b", target="right", freeze=False)
    remove_lora(model, "a")
    assert thawed(model) == []
    remove_lora(model)
    assert len(thawed(model)) == 4
