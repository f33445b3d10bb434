"""Blocks of rows for formats that have none: one pair of the whole weight, exact, of added rank."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...deltas import Delta, LoRAParametrization
from ...deltas.pair import Pair
from ...layers import Shape
from ...rows import Rows
from ..outline import Outline
from ..tensors import shortened
from .factors import low_rank


def joined(format: str, deltas: Mapping[str, Delta], weights: Outline) -> dict[str, Delta]:
    """Return deltas with a weight's low-rank blocks as one pair of all of it, and warn of its size.

    What can't be one, a dense block or one whose features are no side of the matrix, stays.
    """
    blocks: defaultdict[str, list[tuple[Rows, LoRAParametrization]]] = defaultdict(list)
    wholes: dict[str, str] = {}
    for name, delta in deltas.items():
        weight = weights.weight(name)
        if weight and delta.rows and isinstance(delta, LoRAParametrization):
            whole = weight.whole
            if delta.dim == 0 or whole.view == whole.shape:
                wholes[name] = whole.name
                blocks[whole.name].append((delta.rows, delta))
    pairs = {name: _pair(weights.weights[name].shape or (), own) for name, own in blocks.items()}
    if pairs:
        kept = sum(
            p.numel() for own in blocks.values() for _, d in own for p in (d.lora_A, d.lora_B)
        )
        size = sum(p.numel() for pair in pairs.values() for p in pair.parameters())
        warnings.warn(
            f"the format {format} has no blocks of rows: those of {shortened([*pairs])} are "
            f"written as one pair each, of their ranks' sum, with {size:,} numbers for {kept:,}; "
            "where these are trained on, the zeros among them won't stay zero",
            stacklevel=5,
        )
    for name, own in blocks.items():
        if len({delta.dropout for _, delta in own}) > 1:
            reason = f"its blocks differ in dropout, and are written with {pairs[name].dropout:g}"
            warnings.warn(f"{name}: {reason}", stacklevel=5)
    result: dict[str, Delta] = {}
    for name, delta in deltas.items():
        place = wholes.get(name, name)
        result.setdefault(place, pairs.get(place, delta))
    return result


def _pair(shape: Shape, blocks: Sequence[tuple[Rows, LoRAParametrization]]) -> Pair:
    """Put blocks side by side: a factor has zeros where the others' rows are."""
    As, Bs = list[Tensor](), list[Tensor]()
    for rows, delta in blocks:
        A, B = delta.lora_A.detach(), delta.lora_B.detach() * delta.scale
        dtype = torch.promote_types(A.dtype, blocks[0][1].lora_A.dtype)
        if delta.dim == max(len(shape) - 2, 0) or delta.dim == 0:
            B = rows.spread(B, B.ndim - 2, shape[delta.dim])
        else:
            A = rows.spread(A, A.ndim - 1, shape[delta.dim])
        As.append(A.to(dtype))
        Bs.append(B.to(dtype))
    A, B = torch.cat(As, -2), torch.cat(Bs, -1)
    dropouts = {delta.dropout for _, delta in blocks}
    _, pair = low_rank("", A, B, A.shape[-2], dropout=min(dropouts))
    pair.strength = blocks[0][1].strength
    return pair
