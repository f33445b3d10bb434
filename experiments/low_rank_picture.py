"""The picture of `low_rank`: the update's spectrum, and what is wrong by rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

LINES = ("-", "--", ":")


def draw(
    values: Mapping[str, Sequence[float]],
    wrong: Mapping[str, Mapping[str, int]],
    ranks: Sequence[int],
    path: Path,
) -> None:
    """Draw the singular values of each weight's update, and wrong counts by rank.

    Args:
        values: Singular values by weight.
        wrong: Counts of the digit and of the others, by what was done.
        ranks: The ranks, of which the last is full.
        path: Where the PNG goes.
    """
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    spectrum, *counts = figure.subplots(1, 3)
    for line, (name, found) in zip(LINES, values.items(), strict=False):
        spectrum.plot(
            range(1, len(found) + 1), [each / found[0] for each in found], line, c="k", label=name
        )
    spectrum.set(xscale="log", yscale="log", ylim=(1e-4, 1.5), xlabel="singular value")
    spectrum.set_title("update of full fine-tuning,\nsingular value over the largest", fontsize=10)
    spectrum.legend(frameon=False)
    places = range(len(ranks))
    for axes, which, title in zip(
        counts, ("digit", "others"), ("of the digit", "of the others"), strict=True
    ):
        for label, kind, marker in (
            ("full, cut to rank", "full, cut to", "o-"),
            ("LoRA of rank", "LoRA,", "D--"),
        ):
            axes.plot(
                places,
                [wrong[f"{kind} {rank}"][which] for rank in ranks],
                marker,
                c="k",
                mfc="white",
                label=label,
            )
        for level, text in (("pretrained", "pretrained"), ("full", "full")):
            axes.axhline(wrong[level][which], c="0.7", zorder=0)
            axes.text(
                len(ranks) - 0.6,
                wrong[level][which],
                text,
                c="0.4",
                va="bottom",
                ha="right",
                fontsize=8,
            )
        axes.set_title(f"wrong {title}", fontsize=10)
        axes.set_xticks(places, [*map(str, ranks[:-1]), "all"])
        axes.set(xlabel="rank", ylim=(0, None))
    counts[0].legend(frameon=False, fontsize=8)
    for axes in (spectrum, *counts):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
