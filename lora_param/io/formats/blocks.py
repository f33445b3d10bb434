"""Blocks of rows for formats that have none: one pair of the whole weight, exact, of added rank."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor

from ...deltas import Delta, LoRAParametrization
from ...deltas.pair import Pair
from ...layers import Shape
from ...weight import Weight
from ..tensors import shortened
from .factors import low_rank


def joined(format: str, deltas: Mapping[Weight, Delta]) -> dict[Weight, Delta]:
    """Return deltas with a weight's low-rank blocks as one pair of all of it, and warn of its size.

    What can't be one, a dense block or one whose features are no side of the matrix, stays.
    """
    blocks, result = defaultdict[Weight, list[LoRAParametrization]](list), dict[Weight, Delta]()
    for weight, delta in deltas.items():
        whole = weight.whole
        joins = weight.rows and (delta.dim == 0 or whole.view == whole.shape)
        if joins and isinstance(delta, LoRAParametrization):
            blocks[weight := whole].append(delta)
        result[weight] = delta
    pairs = {whole: _pair(whole.shape or (), own) for whole, own in blocks.items()}
    for whole, own in blocks.items():
        if len({delta.dropout for delta in own}) > 1:
            reason = f"its blocks differ in dropout, and are written with {pairs[whole].dropout:g}"
            warnings.warn(f"{whole.name}: {reason}", stacklevel=5)
    if pairs:
        both = chain(*blocks.values()), pairs.values()
        listed = shortened([whole.name for whole in pairs])
        kept, size = (sum(p.lora_A.numel() + p.lora_B.numel() for p in own) for own in both)
        warnings.warn(
            f"the format {format} has no blocks of rows: those of {listed} are "
            f"written as one pair each, of their ranks' sum, with {size:,} numbers for {kept:,}; "
            "where these are trained on, the zeros among them won't stay zero",
            stacklevel=5,
        )
    return result | pairs


def _pair(shape: Shape, blocks: Sequence[LoRAParametrization]) -> Pair:
    """Put blocks side by side: a factor has zeros where the others' rows are."""
    As, Bs = list[Tensor](), list[Tensor]()
    for delta in blocks:
        A, B, rows = delta.lora_A.detach(), delta.lora_B.detach() * delta.scale, delta.rows
        dtype = torch.promote_types(A.dtype, blocks[0].lora_A.dtype)
        if rows and delta.dim in (0, max(len(shape) - 2, 0)):
            B = rows.spread(B, B.ndim - 2, shape[delta.dim])
        elif rows:
            A = rows.spread(A, A.ndim - 1, shape[delta.dim])
        As.append(A.to(dtype))
        Bs.append(B.to(dtype))
    A, B = torch.cat(As, -2), torch.cat(Bs, -1)
    dropout = min(delta.dropout for delta in blocks)
    pair = low_rank(A, B, A.shape[-2], dropout=dropout)
    pair.strength = blocks[0].strength
    return pair
