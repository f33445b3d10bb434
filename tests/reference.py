"""The slow, obvious reference: a plain float64 copy whose weights are set by the formula."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from lora_param import lora_state_dict, lora_summary, named_lora_parameters

from .cases import Experts, outputs
from .kinds import KINDS

TRANSPOSED = (
    Conv1D,
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
"""What stores its output features along the second dimension."""


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
    adapted_weights = _adapted_weights(plain, adapted, factors)
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
    plain: nn.Module, adapted: nn.Module, factors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    result: dict[str, Tensor] = dict(plain.named_parameters())
    for weight in lora_summary(adapted).weights:
        for adapter in weight.adapters:
            kind, prefix = KINDS[adapter.kind], f"{weight.name}.{adapter.name}"
            start = len(prefix) + 1
            tensors = {n[start:]: t for n, t in factors.items() if n.startswith(f"{prefix}.")}
            if adapter.enabled:
                name, _, rows = weight.name.partition("[")
                dim = feature_dim(plain, name) if rows else 0
                index = numbers_of(rows, result[name].shape[dim])
                moved = result[name].movedim(dim, 0).clone()
                block = moved[index].movedim(0, dim) if rows else result[name]
                value = kind.oracle(block, tensors, vars(adapter))
                moved[index] = value.movedim(dim, 0)
                result[name] = moved.movedim(0, dim)
    return result


def feature_dim(plain: nn.Module, name: str) -> int:
    """Say which dimension of a weight counts output features."""
    owner = plain.get_submodule(name.rpartition(".")[0])
    return int(isinstance(owner, (*TRANSPOSED, Experts)))


def numbers_of(rows: str, features: int) -> list[int]:
    """List the rows of a name's `start:stop:step]`; all of them for an empty text."""
    ends = [int(end) for end in rows.rstrip("]").split(":") if end]
    return list(range(features))[slice(*ends) if ends else slice(None)]


class _Call(nn.Module):
    def __init__(self, module: nn.Module, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.module, self.weights = [module], weights

    def forward(self, *inputs: Tensor) -> object:
        return functional_call(self.module[0], dict(self.weights), inputs)
