"""What surrounds a computation and bears on how it may be done: traces, transforms, precision."""

from __future__ import annotations

import torch
from torch import Tensor, nn

PLAIN = (Tensor, nn.Parameter)
"""Types whose results can be changed in place whatever the change is."""

_precision = getattr(torch._C, "_get_fp32_precision_getter", None)  # from torch 2.9 on


def is_traced() -> bool:
    """Say whether what runs is being compiled or traced, which nothing must leave a mark in."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def is_unseen(weight: Tensor) -> bool:
    """Say whether nothing but autograd sees a change in place of what is made of a weight.

    Transforms, traces and modes that keep results do; a subclass may not be able to change.
    """
    if is_traced() or type(weight) not in PLAIN:
        return False
    return not (torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack())


def is_exact(x: Tensor, weight: Tensor) -> bool:
    """Say whether a product rounds a weight no further, which would lose a small update in it."""
    if not weight.is_cpu or x.dtype != weight.dtype or torch.is_autocast_enabled("cpu"):
        return False
    if weight.dtype != torch.float32:
        return weight.dtype == torch.float64
    if _precision is None:
        return torch.get_float32_matmul_precision() == "highest"
    matmul, convolution = _precision("mkldnn", "matmul"), _precision("mkldnn", "conv")
    return {matmul, convolution} <= {"none", "ieee"}
