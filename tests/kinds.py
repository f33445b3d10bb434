"""Every kind of delta as data: how to register it, and its formula in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


def scale_of(numbers: Mapping[str, Any]) -> float:
    rank = numbers["rank"]
    return numbers["alpha"] / (rank**0.5 if numbers["scaling"] == "rslora" else rank)


def pair_of(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return `A` and `B` whose product is the update, as one product where it is anchored."""
    if "lora_A" in tensors:
        return tensors["lora_A"], tensors["lora_B"]
    A, B, A0, B0 = (tensors[n] for n in ("shift_A", "shift_B", "start_A", "start_B"))
    return torch.cat([A0 + A, A], -2), torch.cat([B, B0], -1)


def low_rank(W: Tensor, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> Tensor:
    A, B = pair_of(tensors)
    return W + (B @ A).view_as(W) * scale_of(numbers)


def low_rank_slices(W: Tensor, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> Tensor:
    """Compute a low-rank update a slice of a stack at a time, and what it starts from apart."""
    if "lora_A" in tensors:
        return W + _product(W, tensors["lora_A"], tensors["lora_B"]) * scale_of(numbers)
    A0, B0 = tensors["start_A"], tensors["start_B"]
    A, B = A0 + tensors["shift_A"], B0 + tensors["shift_B"]
    return W + (_product(W, A, B) - _product(W, A0, B0)) * scale_of(numbers)


def _product(W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    a, b = A.reshape(-1, *A.shape[-2:]), B.reshape(-1, *B.shape[-2:])
    return torch.stack([y @ x for x, y in zip(a, b, strict=True)]).reshape(W.shape)


def lengths(V: Tensor, magnitude: Tensor) -> Tensor:
    """Return the lengths of a weight's parts that have one magnitude each."""
    gone = [index for index, size in enumerate(magnitude.shape) if size == 1]
    return torch.linalg.vector_norm(V.detach(), dim=gone, keepdim=True)


def dora(W: Tensor, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> Tensor:
    A, B = pair_of(tensors)
    m = tensors["magnitude"]
    dtype = torch.promote_types(W.dtype, torch.float32)
    V = W.to(dtype) + (B.to(dtype) @ A.to(dtype)).view_as(W) * scale_of(numbers)
    length = lengths(V, m)
    return (V * (1 + (m.to(dtype) - length) / length)).to(W.dtype)


def dora_slices(W: Tensor, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> Tensor:
    V, m = low_rank_slices(W, tensors, numbers), tensors["magnitude"]
    return m * V / lengths(V, m)


@dataclass(frozen=True)
class Kind:
    """One kind, as it is registered in one way.

    Attributes:
        id: The test's id.
        name: What `register_lora(kind=...)` takes.
        options: What else it is given.
        formula: The adapted weight, in the order of operations that its bits depend on.
        oracle: The same, obvious and slow.
    """

    id: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    formula: Callable[..., Tensor] = low_rank
    oracle: Callable[..., Tensor] = low_rank_slices


KINDS = {
    kind.id: kind
    for kind in (
        Kind("lora", "lora", {"rank": 2, "alpha": 3.0}),
        Kind("rslora", "lora", {"rank": 2, "alpha": 2.0, "scaling": "rslora"}),
        Kind("pissa", "lora", {"rank": 2, "alpha": 1.0, "init": "pissa"}),
        Kind("dora", "dora", {"rank": 2, "alpha": 2.0}, dora, dora_slices),
        Kind("dora olora rslora", "dora", {"rank": 2, "alpha": 1.0, "init": "olora", "scaling": "rslora"}, dora, dora_slices),
        Kind("dense", "dense", {}, lambda W, t, n: W + t["D"], lambda W, t, n: W + t["D"]),
    )
}  # fmt: skip
