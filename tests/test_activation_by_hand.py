"""Activation space gives way to hooks on a chain, and to what was registered by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from lora_param import LoRAParametrization

from .cases import adapted


def double(module: nn.Module) -> None:
    """Put another forward on a module itself, as offloading does."""
    stock = module.forward
    module.forward = lambda *args: 2 * stock(*args)


HOOKS = {
    "an adapter": lambda chain: chain[0].register_forward_hook(lambda module, args, out: 2 * out),
    "an adapter, before": lambda chain: chain[0].register_forward_pre_hook(
        lambda module, args: (2 * args[0],)
    ),
    "a chain": lambda chain: chain.register_forward_hook(lambda module, args, out: 2 * out),
    "an adapter's own forward": lambda chain: double(chain[0]),
    "a chain's own forward": lambda chain: double(chain),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_on_an_adapter_or_its_chain_acts_on_the_output(hook: str) -> None:
    layer, x = adapted(nn.Linear(6, 5)), torch.randn(3, 6)
    before = layer.weight.clone()
    HOOKS[hook](layer.parametrizations.weight)
    assert not torch.allclose(layer.weight, before)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


class Gated(LoRAParametrization):
    """Another formula."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (super().forward(weight) - weight).tanh()


def by_hand(entry: LoRAParametrization) -> nn.Linear:
    """Register an adapter by hand behind one of ours, so that the class is ours too."""
    layer = adapted(nn.Linear(6, 5))
    parametrize.register_parametrization(layer, "weight", entry)
    with torch.no_grad():
        entry.lora_B.copy_(torch.randn(entry.lora_B.shape))
    return layer


HAND_MADE = {
    "a subclass": lambda: Gated(5, 6, 2, adapter="b"),
    "another matrix view": lambda: LoRAParametrization(6, 5, 2, adapter="b"),
    "a stack": lambda: LoRAParametrization(5, 3, 2, batch=(2,), adapter="b"),
    "a parametrized factor": lambda: parametrizations.weight_norm(
        LoRAParametrization(5, 6, 2, adapter="b"), "lora_A"
    ),
}


@pytest.mark.parametrize("entry", HAND_MADE)
def test_what_was_made_by_hand_is_computed_by_its_own_formula(entry: str) -> None:
    layer, x = by_hand(HAND_MADE[entry]()), torch.randn(3, 6)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
