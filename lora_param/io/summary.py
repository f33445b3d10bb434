"""What an adapter's file holds, in numbers and as a picture."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..deltas import Delta
from ..deltas.protocol import tensors_of
from ..errors import FileError, LoRAError
from ..layers import Shape
from ..progress import progress
from ..weight import Weight
from .formats import open_both
from .formats.peft_whole import NEW
from .tensors import AnyPath, explained


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
        >>> summary = file_summary("adapter.safetensors")
        >>> summary.format, summary.weights[0].shape, summary.parameters
        ('native', (2, 3), 5)

    Source:
        Roy and Vetterli, "The effective rank", EUSIPCO 2007, definition 1.
    """
    with open_both(path, base, base_prefix, options) as (file, _, _, deltas):
        about, updates = file.about, []
        for weight, delta in progress(list(deltas.items()), "measuring"):
            norm = None if base is None else weight.like.double().norm().item()
            updates.append(_measured(weight, delta, norm))
    return FileSummary(
        file.format.name, about.base_name, about.adapter, dict(about.metadata), tuple(updates)
    )


def _measured(weight: Weight, delta: Delta, base_norm: float | None) -> UpdateSummary:
    tensors, name = tensors_of(delta), weight.name
    if (shape := weight.shape) is None:  # of a file that doesn't say it
        shape = tuple(next(iter(tensors.values())).shape)
        if "lora_B" in tensors:
            shape = (*tensors["lora_B"].shape[:-1], tensors["lora_A"].shape[-1])
    # What new values add to a weight can't be known without it.
    values = torch.zeros(0) if delta.origin == NEW else delta.singular_values(shape)
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


NAMED, LONGEST = 40, 50
"""Up to how many weights have their names below the picture, and how much of each, its end."""


def plot_summary(summary: FileSummary, out: AnyPath) -> None:
    """Draw each update's norm, beside its base's where that is known, and its effective rank.

    Raises:
        LoRAError: matplotlib isn't installed.
        FileError: The picture can't be written, or not in the format that its name says.

    Example:
        >>> plot_summary(file_summary("adapter.safetensors", "base.pt"), "adapter.png")
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise LoRAError("a picture needs matplotlib: pip install matplotlib") from None
    updates = summary.weights
    figure = Figure(figsize=(11, 8), layout="constrained")
    sizes, ranks = figure.subplots(2, 1, sharex=True)
    lines: dict[str, tuple[Any, str, list[float | None]]] = {
        "|W|": (sizes, "_", [each.base_norm for each in updates]),
        "|dW|": (sizes, "o", [each.norm for each in updates]),
        "rank": (ranks, "_", [each.rank for each in updates]),
        "effective rank": (ranks, "o", [each.effective_rank for each in updates]),
    }
    for label, (axes, marker, values) in lines.items():
        known = [(place, value) for place, value in enumerate(values) if value is not None]
        if known:
            axes.plot(*zip(*known, strict=True), marker, label=label)
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    if any(each.norm for each in updates):
        sizes.set_yscale("log")
    sizes.set_ylabel("Frobenius norm")
    ranks.set_ylabel("effective rank")
    ranks.update_datalim([(0, 0)])
    ranks.autoscale_view()
    ranks.set_xlabel("weight, in the order of the model")
    if len(updates) <= NAMED:
        names = [each.weight[-LONGEST:] for each in updates]
        ranks.set_xticks(range(len(updates)), names, rotation=90)
    figure.suptitle(f"{summary.adapter} on {summary.base or 'a base that it does not name'}")
    with explained(f"{out}: can't be drawn"):
        figure.savefig(Path(out))
