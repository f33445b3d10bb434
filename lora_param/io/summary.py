"""What an adapter's file holds, in numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..deltas import Delta
from ..deltas.protocol import tensors_of
from ..errors import FileError
from ..layers import Shape
from .bases import open_both
from .progress import progress
from .tensors import AnyPath


@dataclass(frozen=True)
class UpdateSummary:
    """One weight's update; without a shape in the file, `shape` is that of its matrix view."""

    weight: str
    kind: str
    shape: Shape
    rank: int | None  # like alpha and scaling `None` for a kind that has none
    alpha: float | None
    scaling: str | None
    norm: float | None  # Frobenius, of what is added to the weight; of new values not known
    effective_rank: float | None  # exp of the entropy of the singular values' shares; 0 for zeros
    parameters: int
    strength: float = 1.0
    base_norm: float | None = None  # Frobenius, of the weight itself, where there is a base


@dataclass(frozen=True)
class FileSummary:
    """What `file_summary` returns; `base` is empty if the file doesn't say it."""

    format: str
    base: str
    adapter: str
    metadata: dict[str, str]
    weights: tuple[UpdateSummary, ...]

    @property
    def parameters(self) -> int:
        """Number of elements of all tensors."""
        return sum(each.parameters for each in self.weights)


def file_summary(
    path: AnyPath, base: AnyPath | None = None, /, *, base_prefix: str | None = None, **options: Any
) -> FileSummary:
    """Measure what a file holds, without a model; no update is ever formed.

    Args:
        path: The file, in any format, or for PEFT the folder.
        base: The checkpoint that it was trained on, to measure too, as for `check_checkpoint`.
        base_prefix: As for `check_checkpoint`.
        **options: What its format takes, such as `alpha` for loralib.

    Raises:
        FileError: The file is damaged or of an unknown format, an update isn't finite, or it
            doesn't fit the base.

    Example:
        >>> from lora_param.io import file_summary
        >>> summary = file_summary("adapter.safetensors")
        >>> summary.format, summary.weights[0].shape, summary.parameters
        ('native', (2, 3), 5)

    Source:
        Roy and Vetterli, "The effective rank", EUSIPCO 2007, definition 1.
    """
    with open_both(path, base, base_prefix, options) as (file, _, weights, deltas):
        about, updates = file.about, []
        for name, delta in progress(list(deltas.items()), "measuring"):
            weight = weights.weight(name)
            norm = weight.like.double().norm().item() if base is not None and weight else None
            updates.append(_measured(name, delta, weight.shape if weight else None, norm))
    return FileSummary(
        file.format.name, about.base_name, about.adapter, dict(about.metadata), tuple(updates)
    )


def _measured(
    name: str, delta: Delta, shape: Shape | None, base_norm: float | None
) -> UpdateSummary:
    tensors = tensors_of(delta)
    if shape is None:  # of a file that doesn't say it
        shape = tuple(next(iter(tensors.values())).shape)
        if "lora_B" in tensors:
            shape = (*tensors["lora_B"].shape[:-1], tensors["lora_A"].shape[-1])
    values = delta.singular_values(shape)
    if not values.norm().isfinite():
        raise FileError(f"{name}: its update isn't finite")
    share = values / values.sum(-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
    effective = torch.special.entr(share).sum(-1).exp() * (values.sum(-1) > 0)
    rank, alpha, scaling = map(delta.numbers.get, ("rank", "alpha", "scaling"))
    count = sum(tensor.numel() for tensor in tensors.values())
    known = values.numel() > 0
    sizes = (values.norm().item(), effective.mean().item()) if known else (None, None)
    said = rank, alpha, scaling, *sizes, count, delta.strength, base_norm
    return UpdateSummary(name, delta.origin or delta.kind, shape, *said)
