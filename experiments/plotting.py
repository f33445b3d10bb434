"""The picture: wrong counts per digit before, with the adapter on, and with it off."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from .mnist_results import SOURCE, STATES, Run, wrong_counts

WIDTH = 0.28
YTICKS = [0, 10, 50, 100, 200, 400, 600, 800, 1000]
STYLES: dict[str, dict[str, Any]] = {
    "pretrained": {"color": "white", "hatch": ""},
    "LoRA on": {"color": "0.25", "hatch": ""},
    "LoRA off": {"color": "white", "hatch": "/////"},
}
MARKERS: dict[str, Any] = {
    "ls": "",
    "marker": "D",
    "ms": 4,
    "mfc": "white",
    "mec": "black",
    "zorder": 3,
}
WHISKERS: dict[str, Any] = {"ecolor": "0.5", "capsize": 2}


def plot_wrong_counts(runs: Sequence[Run], tuned: int, path: Path) -> None:
    """Draw three bars per digit, the source's figure on each, and the spread of several runs.

    Args:
        runs: One run or more; of several, the bars are means, the whiskers standard deviations.
        tuned: The digit that was fine-tuned on, which gets a grey band.
        path: Where the PNG goes.
    """
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    axes = figure.add_subplot()
    axes.axvspan(tuned - 0.48, tuned + 0.48, color="0.9", zorder=0, label=f"fine-tuned: {tuned}")
    for place, state in enumerate(STATES, -1):
        _bars(axes, state, [digit + place * WIDTH for digit in range(10)], runs)
    # Counts of 6 and of 677 are both legible on a square-root scale, and zero is still zero.
    axes.set_yscale("function", functions=(lambda y: np.sqrt(np.maximum(y, 0)), np.square))
    axes.yaxis.set_major_locator(FixedLocator(YTICKS))
    axes.set(ylabel="wrong of 10,000 (root scale)", xlim=(-0.5, 9.5), ylim=(0, None))
    axes.set_xticks(range(10), _captions(runs))
    axes.set_xlabel("digit, and how many were wrong: pretrained \N{RIGHTWARDS ARROW} LoRA on")
    axes.tick_params(axis="x", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=5, frameon=False)
    figure.savefig(path, dpi=120)


def _captions(runs: Sequence[Run]) -> list[str]:
    before, on = (wrong_counts([run.scores[state] for run in runs]) for state in STATES[:2])
    return [
        f"{digit}\n{old.mean:.0f} \N{RIGHTWARDS ARROW} {new.mean:.0f}"
        for digit, (old, new) in enumerate(zip(before, on, strict=True))
    ]


def _bars(axes: Axes, state: str, places: list[float], runs: Sequence[Run]) -> None:
    counts = wrong_counts([run.scores[state] for run in runs])
    means = [count.mean for count in counts]
    axes.bar(places, means, WIDTH, label=state, ec="black", lw=0.8, **STYLES[state])
    if len(runs) > 1:
        spreads = [count.std or 0.0 for count in counts]
        axes.errorbar(places, means, spreads, fmt="none", **WHISKERS)
    label = "source's run" if state == STATES[0] else None
    axes.plot(places, SOURCE[state].wrong, label=label, **MARKERS)
