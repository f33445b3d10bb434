"""The picture of `mnist_finetune`: wrong counts per digit before, with LoRA on, and with it off."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .mnist_report import SOURCE, STATES, Run
from .shared.plots import grouped_bars, new_figure, root_scale, save
from .shared.scoring import Spread, wrong_counts

TICKS = (0, 10, 50, 100, 200, 400, 600, 800, 1000)
DIAMONDS: dict[str, Any] = {
    "ls": "",
    "marker": "D",
    "ms": 4,
    "mfc": "white",
    "mec": "black",
    "zorder": 3,
}


def plot_wrong_counts(runs: Sequence[Run], tuned: int, path: Path) -> None:
    """Draw three bars per digit, the source's figure on each, and the spread of several runs.

    Args:
        runs: One run or more; of several, the bars are means, the whiskers standard deviations.
        tuned: The digit that was fine-tuned on, which gets a grey band.
        path: Where the PNG goes.
    """
    counts = {state: wrong_counts([run.scores[state] for run in runs]) for state in STATES}
    figure, axes = new_figure(3.5)
    axes.axvspan(tuned - 0.48, tuned + 0.48, color="0.9", zorder=0, label=f"fine-tuned: {tuned}")
    for state, places in grouped_bars(axes, counts).items():
        label = "source's run" if state == STATES[0] else None
        axes.plot(places, SOURCE[state].wrong, label=label, **DIAMONDS)
    root_scale(axes, TICKS)
    axes.set(ylabel="wrong of 10,000 (root scale)", xlim=(-0.5, 9.5))
    axes.set_xticks(range(10), _captions(*(counts[state] for state in STATES[:2])))
    axes.set_xlabel("digit, and how many were wrong: pretrained \N{RIGHTWARDS ARROW} LoRA on")
    axes.tick_params(axis="x", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def _captions(before: Sequence[Spread], on: Sequence[Spread]) -> list[str]:
    return [
        f"{digit}\n{old.mean:.0f} \N{RIGHTWARDS ARROW} {new.mean:.0f}"
        for digit, (old, new) in enumerate(zip(before, on, strict=True))
    ]
