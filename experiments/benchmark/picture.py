"""The benchmark's picture: multiples of the floor by size, a panel for each width."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .cells import RANKS, TOKENS, WIDTHS, linear
from .report import LABELS, MEASURES

LINES: dict[str, dict[str, Any]] = {
    "lora_param": {"color": "black", "marker": "o", "lw": 2},
    "peft": {"color": "0.45", "marker": "s", "mfc": "white"},
    "loralib": {"color": "0.45", "marker": "^", "mfc": "white", "ls": ":"},
    "parametrize": {"color": "0.45", "marker": "x", "ls": "--"},
}
TICKS, MOST = (1, 16, 128, 1024, 4096), 4.0
"""What the lower scale says, and where the other one ends; a line beyond leaves the picture."""


def draw(cells: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw how many times the frozen model's time each way takes, at the lowest rank."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    panels = figure.subplots(len(MEASURES), len(WIDTHS), sharex=True, sharey=True)
    chosen = [each for each in cells if each["mode"] == cells[0]["mode"]]
    for row, measure in zip(panels, MEASURES, strict=True):
        for axes, width in zip(row, WIDTHS, strict=True):
            axes.axhline(1, color="0.75", lw=4, zorder=0)
            for way, style in LINES.items():
                points = [
                    (tokens, each[measure][way]["ratio"][1])
                    for each, tokens in product(chosen, TOKENS)
                    if each["cell"] == linear(width, tokens, RANKS[0]).name and way in each[measure]
                ]
                label = None if axes is not panels[0][0] else LABELS.get(way, way)
                axes.plot(*zip(*points, strict=True) if points else ([], []), label=label, **style)
            axes.set_xscale("log")
            axes.minorticks_off()
            axes.set_xticks(TICKS, map(str, TICKS))
            axes.set_ylim(0.9, MOST)
            axes.set_title(f"{measure}, layers {width} wide", fontsize=10)
            axes.grid(axis="y", lw=0.3)
            axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("tokens in a step")
    figure.supylabel("times as long as the frozen model (grey line: no cost)")
    figure.legend(loc="outside upper center", ncols=len(LINES), frameon=False)
    figure.savefig(path, dpi=120)
