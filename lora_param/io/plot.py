"""A picture of what an adapter's file holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import LoRAError
from .summary import FileSummary
from .tensors import AnyPath, explained

NAMED, LONGEST = 40, 50
"""Up to how many weights have their names below the picture, and how much of each, its end."""


def plot_summary(summary: FileSummary, out: AnyPath) -> None:
    """Draw each update's norm, beside its base's where that is known, and its effective rank.

    Raises:
        LoRAError: matplotlib isn't installed.
        FileError: The picture can't be written, or not in the format that its name says.

    Example:
        >>> from lora_param.io import file_summary, plot_summary
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
