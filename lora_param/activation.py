"""Activation space: `base(x) + ((x A^T) B^T) * scale`, without ever forming `B @ A`.

A forward here takes a module, its input, the weight beneath the adapters, and the adapters' terms.
It gives what the stock forward gives for the adapted weight, gradients included, and keeps nothing
of the weight's size for backward. All is composed of torch's own operations, so that it compiles,
exports, runs under vmap and differentiates twice; a custom autograd function gained 0 to 3 %.

Source: Hu et al., arXiv:2106.09685, section 4.1, equation 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 as everybody calls it

from .parametrization import LoRAParametrization

CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
"""By the number of the weight's dimensions."""


class Term(NamedTuple):
    """One product to add: `lora_A` `[rank, fan_in]`, `lora_B` `[fan_out, rank]`, scale, dropout."""

    lora_A: Tensor
    lora_B: Tensor
    scale: float
    dropout: float


def terms_of(adapters: Sequence[LoRAParametrization]) -> list[Term]:
    """Turn enabled adapters into terms: one for all whose input is the same."""
    dropping = [entry for entry in adapters if entry.training and entry.dropout]
    terms = [Term(e.lora_A, e.lora_B, e.scale, e.dropout) for e in dropping]
    plain = [entry for entry in adapters if entry not in dropping] if dropping else adapters
    if len(plain) == 1:
        terms.append(Term(plain[0].lora_A, plain[0].lora_B, plain[0].scale, 0.0))
    elif plain:
        lora_A = torch.cat([entry.lora_A for entry in plain])
        lora_B = torch.cat([entry.lora_B * entry.scale for entry in plain], 1)
        terms.append(Term(lora_A, lora_B, 1.0, 0.0))
    return terms


def linear(module: Any, x: Tensor, weight: Tensor, terms: Sequence[Term]) -> Tensor:
    """Apply `Linear`: `[..., fan_in]` to `[..., fan_out]`."""
    return _linear(x, weight, module.bias, [(t, t.lora_A, t.lora_B.t()) for t in terms])


def transposed_linear(module: Any, x: Tensor, weight: Tensor, terms: Sequence[Term]) -> Tensor:
    """Apply transformers' `Conv1D`, whose weight is `[in, out]`, so that `lora_B` meets `x`."""
    return _linear(x, weight.t(), module.bias, [(t, t.lora_B.t(), t.lora_A) for t in terms])


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, products: list[tuple[Term, Tensor, Tensor]]
) -> Tensor:
    # As torch does it, which otherwise wouldn't give a fresh adapter's output the base's bits.
    flat = x.flatten(0, -2) if x.dim() > 2 and x.is_contiguous() else x
    y = F.linear(flat, weight, bias)
    for term, down, up in products:
        low = F.linear(_dropped(flat, term), down.to(flat.dtype))
        y = _plus(y, low, up, term.scale)
    return y if flat is x else _shaped(y, (*x.shape[:-1], y.shape[-1]))


def convolution(module: Any, x: Tensor, weight: Tensor, terms: Sequence[Term]) -> Tensor:
    """Apply an ungrouped `Conv1d/2d/3d`: the same convolution to `rank` channels, and a product."""
    convolve, padding = CONVOLUTIONS[weight.dim()], module.padding
    if module.padding_mode != "zeros":
        x = F.pad(x, module._reversed_padding_repeated_twice, module.padding_mode)
        padding = 0
    y = convolve(x, weight, module.bias, module.stride, padding, module.dilation)
    for term in terms:
        kernel = term.lora_A.to(x.dtype).view(-1, *weight.shape[1:])
        low = convolve(_dropped(x, term), kernel, None, module.stride, padding, module.dilation)
        lora_B = term.lora_B.to(y.dtype)
        y = _plus_channels(y, low, lora_B, term.scale, weight.dim() - 2)
    return y


def embedding(module: Any, x: Tensor, weight: Tensor, terms: Sequence[Term]) -> Tensor:
    """Look up `Embedding` rows: `[...]` to `[..., fan_in]`; the padding row gets no gradient."""
    if torch.is_autocast_enabled(weight.device.type):  # which leaves a lookup alone
        with torch.autocast(weight.device.type, enabled=False):
            return embedding(module, x, weight, terms)
    index, pad = x.reshape(-1), module.padding_idx
    y = F.embedding(index, weight, pad)
    for lora_A, lora_B, scale, _ in terms:
        low, up = F.embedding(index, lora_B, pad), lora_A
        if pad is not None:
            # The padding row's own update in a column apart, past which no gradient flows.
            padded = (index == pad).unsqueeze(1)
            low = torch.cat([low.masked_fill(padded, 0), padded.to(low.dtype)], 1)
            up = torch.cat([up, (lora_B[pad] @ lora_A).detach().unsqueeze(0)])
        y = _plus(y, low.to(y.dtype), up, scale)
    return _shaped(y, (*x.shape, y.shape[-1]))


def _dropped(x: Tensor, term: Term) -> Tensor:
    return F.dropout(x, term.dropout) if term.dropout else x


def _plus(y: Tensor, low: Tensor, up: Tensor, scale: float) -> Tensor:
    """Add `low @ up * scale` over the last dimension, in one pass over `y`."""
    up = up.to(y.dtype)
    if y.dim() != 2:
        rows, low = y.reshape(-1, y.shape[-1]), low.reshape(-1, low.shape[-1])
        return _shaped(torch.addmm(rows, low, up, alpha=scale), y.shape)
    if not _alone():
        return torch.addmm(y, low, up, alpha=scale)
    if up.requires_grad and up.shape[0] < 16 and y.shape[0] > 64 and y.is_cpu:
        # For its gradient: on a transpose as narrow as this, BLAS takes up to three times as long.
        up = up.contiguous()
    return y.addmm_(low, up, alpha=scale)


def _plus_channels(y: Tensor, low: Tensor, lora_B: Tensor, scale: float, sizes: int) -> Tensor:
    """Add `lora_B @ low * scale` over channels, which stand before the last `sizes` dimensions."""
    if not y.is_contiguous():  # channels last
        y, low = y.movedim(-sizes - 1, -1), low.movedim(-sizes - 1, -1)
        return _plus(y, low, lora_B.t(), scale).movedim(-1, -sizes - 1)
    flat, low = y.flatten(-sizes), low.flatten(-sizes)
    batched = flat.dim() == 3
    lora_B = lora_B.expand(y.shape[0], -1, -1) if batched else lora_B
    if _alone() and not torch.is_grad_enabled():  # autograd would copy what is changed by a view
        (flat.baddbmm_ if batched else flat.addmm_)(lora_B, low, alpha=scale)
        return y
    add = torch.baddbmm if batched else torch.addmm
    return _shaped(add(flat, lora_B, low, alpha=scale), y.shape)


def _shaped(y: Tensor, shape: Sequence[int]) -> Tensor:
    """Give a result its shape without making it a view, which could not be changed in place."""
    if _is_traced():  # by jit, which would take the shape for a constant
        return y.view(*shape)
    result: Tensor = torch.ops.aten._unsafe_view(y, shape)
    return result


def _alone() -> bool:
    """Whether a result may be changed in place: not if it might be traced, or batched otherwise."""
    traced = torch.compiler.is_compiling() or _is_traced()
    return not (traced or torch._C._are_functorch_transforms_active())


def _is_traced() -> bool:
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]
