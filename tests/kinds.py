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


def low_rank(W: Tensor, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> Tensor:
    product = tensors["lora_B"] @ tensors["lora_A"]
    return W + product.view_as(W) * scale_of(numbers)


def low_rank_slices(W: Tensor, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> Tensor:
    """Compute a low-rank update a slice of a stack at a time."""
    A, B = tensors["lora_A"], tensors["lora_B"]
    scale = scale_of(numbers)
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
    """One kind, as it is registered in one way.

    Attributes:
        id: The test's id.
        name: What `register_lora(kind=...)` takes.
        options: What else it is given.
        formula: The adapted weight, in the order of operations that its bits depend on.
        oracle: The same, obvious and slow.
        tensors: The names of its tensors.
    """

    id: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    formula: Callable[..., Tensor] = low_rank
    oracle: Callable[..., Tensor] = low_rank_slices
    tensors: tuple[str, ...] = ("lora_A", "lora_B")


KINDS = {
    kind.id: kind
    for kind in (
        Kind("lora", "lora", {"rank": 2, "alpha": 3.0}),
        Kind("rslora", "lora", {"rank": 2, "alpha": 2.0, "scaling": "rslora"}),
        Kind("dense", "dense", {}, lambda W, t, n: W + t["D"], lambda W, t, n: W + t["D"], ("D",)),
    )
}  # fmt: skip
