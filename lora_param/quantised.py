"""Weights that another library keeps in few bits: tensors that stand for what they dequantise to.

Their layers compute with them as they are, and what reads the weight gets it dense.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 as everybody calls it


def is_quantised(tensor: Tensor) -> bool:
    """Say whether a tensor is of a class that dequantises in a way of its own, as torchao's."""
    return type(tensor).dequantize is not Tensor.dequantize


def dense(tensor: Tensor) -> Tensor:
    """Return what a tensor stands for."""
    return tensor.dequantize() if is_quantised(tensor) else tensor


def parts_of(tensor: Tensor) -> list[Tensor]:
    """List the plain tensors that a quantised one is made of."""
    if not is_quantised(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return [part for name in names for part in parts_of(getattr(tensor, name))]


def keeps_gradients(tensor: Tensor) -> bool:
    """Say whether a linear layer's input gets its gradient through a weight."""
    with torch.enable_grad():
        x = torch.ones(1, tensor.shape[-1], dtype=tensor.dtype, device=tensor.device)
        return F.linear(x.requires_grad_(), tensor).requires_grad
