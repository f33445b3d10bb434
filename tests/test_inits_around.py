"""Pairs that start from the weight, among what else there is: routing, combining, resizing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lora_param import (
    combine_lora,
    lora_routed,
    lora_selected,
    lora_state_dict,
    register_lora,
    resize_lora,
)

from .cases import shake


def net(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 8), nn.Linear(8, 7)).double()
    for name in "ab":
        register_lora(model, rank=2, adapter=name, **options)
    shake(model)
    return model


@pytest.mark.parametrize("options", [{"init": "pissa"}, {"kind": "dora"}], ids=str)
def test_a_row_of_a_batch_gives_what_its_adapter_alone_gives(options: dict[str, Any]) -> None:
    model, x, settings = net(**options), torch.randn(4, 9).double(), ["a", "b", None, "a"]
    with lora_routed(model, settings):
        y = model(x)
    for row, setting in enumerate(settings):
        with lora_selected(model, setting):
            torch.testing.assert_close(model(x)[row], y[row])


def test_a_combination_is_of_what_both_add() -> None:
    model, x = net(init="olora", scaling="rslora"), torch.randn(4, 9).double()
    with lora_selected(model, {"a": 0.5, "b": -2.0}):
        expected = model(x)
    combine_lora(model, {"a": 0.5, "b": -2.0}, adapter="c")
    with lora_selected(model, "c"):
        torch.testing.assert_close(model(x), expected)


def test_a_resized_one_is_plain_and_keeps_its_update() -> None:
    model, x = net(init="pissa"), torch.randn(4, 9).double()
    with lora_selected(model, "a"):
        expected = model(x)
        resize_lora(model, 4, adapter="a")
        torch.testing.assert_close(model(x), expected)
    names = [name.rpartition(".")[2] for name in lora_state_dict(model, "a")]
    assert names == ["lora_A", "lora_B", "_extra_state"] * 2
