"""The slow, obvious reference: a plain float64 copy whose weights are set by the formula."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lora_param import lora_state_dict, lora_summary, named_lora_parameters

from .cases import outputs
from .kinds import KINDS


@dataclass(frozen=True)
class Result:
    """What a run of the reference gives, all in float64."""

    outputs: list[Tensor]
    input_gradients: list[Tensor | None]
    factor_gradients: dict[str, Tensor]


def reference(plain: nn.Module, adapted: nn.Module, inputs: tuple[Tensor, ...]) -> Result:
    """Run a plain layer under the weights that the adapted layer should have.

    The loss behind the gradients is half the sum of the squares of all outputs.
    """
    plain = copy.deepcopy(plain).to(torch.float64)
    trained = dict(named_lora_parameters(adapted))
    factors = {
        name: tensor.detach().double().requires_grad_(name in trained)
        for name, tensor in lora_state_dict(adapted).items()
        if not name.endswith("_extra_state")
    }
    inputs = tuple(x.double().requires_grad_() if x.is_floating_point() else x for x in inputs)
    weights = dict(plain.named_parameters())
    adapted_weights = _adapted_weights(weights, adapted, factors)
    leaves = outputs(_Call(plain, adapted_weights), inputs)
    loss(leaves).backward()
    return Result(
        [leaf.detach() for leaf in leaves],
        [x.grad for x in inputs],
        {name: factor.grad for name, factor in factors.items() if factor.grad is not None},
    )


def loss(leaves: list[Tensor]) -> Tensor:
    return torch.stack([leaf.double().square().sum() / 2 for leaf in leaves]).sum()


def _adapted_weights(
    weights: Mapping[str, Tensor], adapted: nn.Module, factors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    result = dict(weights)
    for weight in lora_summary(adapted).weights:
        for adapter in weight.adapters:
            kind, prefix = KINDS[adapter.kind], f"{weight.name}.{adapter.name}"
            start = len(prefix) + 1
            tensors = {n[start:]: t for n, t in factors.items() if n.startswith(f"{prefix}.")}
            if adapter.enabled:
                result[weight.name] = kind.oracle(result[weight.name], tensors, vars(adapter))
    return result


class _Call(nn.Module):
    def __init__(self, module: nn.Module, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.module, self.weights = [module], weights

    def forward(self, *inputs: Tensor) -> object:
        return functional_call(self.module[0], dict(self.weights), inputs)
