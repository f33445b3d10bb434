"""Every kind of delta as data: how to register it, and its formula in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


def low_rank(W: Tensor, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> Tensor:
    product = tensors["lora_B"] @ tensors["lora_A"]
    return W + product.view_as(W) * (numbers["alpha"] / numbers["rank"])


def low_rank_slices(W: Tensor, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> Tensor:
    """Compute a low-rank update a slice of a stack at a time."""
    A, B = tensors["lora_A"], tensors["lora_B"]
    scale = numbers["alpha"] / numbers["rank"]
    slices = [
        w + b @ a * scale
        for w, a, b in zip(
            W.reshape(-1, B.shape[-2], A.shape[-1]),
            A.reshape(-1, *A.shape[-2:]),
            B.reshape(-1, *B.shape[-2:]),
            strict=True,
        )
    ]
    return torch.stack(slices).reshape(W.shape)


@dataclass(frozen=True)
class Kind:
    """One kind.

    Attributes:
        name: What `register_lora(kind=...)` takes.
        options: What else it is given.
        formula: The adapted weight, in the order of operations that its bits depend on.
        oracle: The same, obvious and slow.
        tensors: The names of its tensors.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    formula: Callable[..., Tensor] = low_rank
    oracle: Callable[..., Tensor] = low_rank_slices
    tensors: tuple[str, ...] = ("lora_A", "lora_B")


KINDS = {
    kind.name: kind
    for kind in (
        Kind("lora", {"rank": 2, "alpha": 3.0}),
        Kind("dense", {}, lambda W, t, n: W + t["D"], lambda W, t, n: W + t["D"], ("D",)),
    )
}  # fmt: skip
