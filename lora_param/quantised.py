"""Weights that another library keeps in few bits: tensors that stand for what they dequantise to.

Their layers compute with them as they are, and what reads the weight gets it dense. A tensor of
bitsandbytes' is `packed`: it hasn't even the shape of what it stands for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 as everybody calls it

from .chains import chains_of, reading


def is_quantised(tensor: Tensor) -> bool:
    """Say whether a tensor is of a class that dequantises in a way of its own, as torchao's."""
    if tensor.is_floating_point():
        return type(tensor).dequantize is not Tensor.dequantize
    return is_packed(tensor)


def is_packed(tensor: object) -> bool:
    """Say whether a tensor is bitsandbytes', quantised or to be, also a pickled one."""
    return hasattr(tensor, "quant_state") or hasattr(tensor, "SCB")


def is_unfit(tensor: Any) -> bool:
    """Say whether a tensor's layer hasn't quantised it, or computes nothing to train through."""
    if type(tensor) is nn.Parameter and tensor.is_floating_point():
        return False
    state = getattr(tensor, "quant_state", None)
    ready = state is not None or tensor.dtype is torch.int8
    # On some CPUs `Linear4bit` packs anew at inference, by a kernel that has no gradient.
    return is_packed(tensor) and (not ready or getattr(state, "packing_format_for_cpu", False))


def in_reach(tensor: Any, module: Any) -> None:
    """Give a packed tensor back what bitsandbytes has moved to its layer."""
    if getattr(tensor, "SCB", module) is None:
        tensor.SCB = module.state.SCB
    if getattr(tensor, "quant_state", module) is None:
        tensor.quant_state = module.quant_state


def logical(tensor: Any) -> Tensor:
    """Return a tensor's shape, dtype and device as one, without values if it is quantised."""
    if not is_quantised(tensor) or is_unfit(tensor):
        return cast("Tensor", tensor)
    like = getattr(tensor, "quant_state", None) or tensor
    dtype = like.dtype if like.dtype.is_floating_point else torch.float32
    return torch.empty((), dtype=dtype, device=tensor.device).expand(like.shape)


def dense(tensor: Any) -> Tensor:
    """Return what a tensor stands for."""
    if not is_quantised(tensor):
        return cast("Tensor", tensor)
    if not is_packed(tensor):  # an NF4 tensor has a way of its own
        return cast("Tensor", getattr(tensor, "get_original_weight", tensor.dequantize)())
    data = tensor.detach().as_subclass(Tensor)
    if (state := getattr(tensor, "quant_state", None)) is None:
        return cast("Tensor", data * (tensor.SCB[:, None] * (1 / 127)))
    return cast("Tensor", sys.modules["bitsandbytes"].functional.dequantize_4bit(data, state))


def parts_of(tensor: Any) -> list[Tensor]:
    """List the plain tensors that a quantised one is made of."""
    if is_packed(tensor):
        state, names = getattr(tensor, "quant_state", None), ("absmax", "code", "offset")
        parts = [tensor.detach().as_subclass(Tensor), getattr(tensor, "SCB", None)]
        for each in (state, getattr(state, "state2", None)):
            parts += [getattr(each, name, None) for name in names]
        return [part for part in parts if part is not None]
    if not is_quantised(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in parts_of(getattr(tensor, name))]


def keeps_gradients(tensor: Tensor) -> bool:
    """Say whether a linear layer's input gets its gradient through a weight."""
    with torch.enable_grad():
        x = torch.ones(1, tensor.shape[-1], dtype=tensor.dtype, device=tensor.device)
        return F.linear(x.requires_grad_(), tensor).requires_grad


@contextmanager
def as_beneath(module: Any, x: Tensor | None = None) -> Iterator[None]:
    """Let a layer's methods read its packed weight, beneath any delta, in a block."""
    packed, given = {}, {}
    for name, chain in chains_of(module).items():
        if is_packed(original := chain._parameters.get("original")):
            packed[chain] = original
        elif x is not None:  # its forward would make the bias of this dtype, and lose its graph
            given[chain] = getattr(module, name).to(getattr(module, "compute_dtype", 0) or x.dtype)
    outer, reading.beneath = reading.beneath, packed | given
    try:
        yield
    finally:
        reading.beneath = outer
        for original in packed.values():
            in_reach(original, module)


def packed_or_dense(base: Any) -> Callable[..., Any]:
    """Make the forward, in weight space, of a layer whose own knows packed weights alone."""

    def forward(self: Any, x: Tensor) -> Any:
        if is_packed(weight := self.weight):
            with as_beneath(self, x):
                return base.forward(self, x)
        bias = self.bias
        return F.linear(x, weight.to(x.dtype), bias if bias is None else bias.to(x.dtype))

    return forward
