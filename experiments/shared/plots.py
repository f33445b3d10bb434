"""Pictures in black, white and grey: legible in print, and to everybody."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from .scoring import Spread

FILLS: tuple[dict[str, Any], ...] = (
    {"color": "white"},
    {"color": "0.25"},
    {"color": "white", "hatch": "/////"},
    {"color": "0.7"},
)
"""How the bars of one group differ; as many bars as there can be."""

OUTLINE: dict[str, Any] = {"ec": "black", "lw": 0.8}
WHISKERS: dict[str, Any] = {"fmt": "none", "ecolor": "0.5", "capsize": 2}


def new_figure(height: float) -> tuple[Figure, Axes]:
    """Start a picture as wide as a page.

    Args:
        height: In inches; the width is nine.

    Returns:
        The figure and its axes.
    """
    figure = Figure(figsize=(9, height), layout="constrained")
    return figure, figure.add_subplot()


def grouped_bars(
    axes: Axes, bars: Mapping[str, Sequence[Spread]], width: float = 0.28
) -> dict[str, list[float]]:
    """Draw a group of bars at each of 0, 1, ...; a whisker is a standard deviation.

    Args:
        axes: Where.
        bars: What the legend calls them, and a figure for each group.
        width: Of a bar, where the next group is 1 away.

    Returns:
        Where each one's bars are.
    """
    places = {}
    for index, (label, figures) in enumerate(bars.items()):
        shift = (index - (len(bars) - 1) / 2) * width
        places[label] = [group + shift for group in range(len(figures))]
        means = [each.mean for each in figures]
        axes.bar(places[label], means, width, label=label, **OUTLINE, **FILLS[index])
        spreads = [each.std for each in figures if each.std is not None]
        if spreads:
            axes.errorbar(places[label], means, spreads, **WHISKERS)
    return places


def save(figure: Figure, path: Path) -> None:
    """Write a picture, with a legend above it.

    Args:
        figure: The picture.
        path: Where the PNG goes.
    """
    figure.legend(loc="outside upper center", ncols=5, frameon=False)
    figure.savefig(path, dpi=120)


def draw_matrices(matrices: Mapping[str, Tensor], path: Path, decimals: int = 2) -> None:
    """Draw small matrices side by side, each entry as a grey and a number.

    Args:
        matrices: By their titles.
        path: Where the PNG goes.
        decimals: Of the numbers.
    """
    figure = Figure(figsize=(9, 2.4), layout="constrained")
    widths = [max(each.shape[1], 1) for each in matrices.values()]
    most = max(float(each.abs().max()) for each in matrices.values())
    axes = figure.subplots(1, len(matrices), width_ratios=widths, squeeze=False)[0]
    for place, (title, matrix) in zip(axes, matrices.items(), strict=True):
        place.imshow(matrix.abs().tolist(), cmap="Greys", vmin=0, vmax=1.6 * most)
        place.set_ylim(max(each.shape[0] for each in matrices.values()) - 0.5, -0.5)
        place.axis("off")
        for row, values in enumerate(matrix.tolist()):
            for column, value in enumerate(values):
                place.text(
                    column, row, f"{value:.{decimals}f}", ha="center", va="center", fontsize=8
                )
        place.set_title(f"{title}\n{matrix.shape[0]} x {matrix.shape[1]}", fontsize=10)
    figure.savefig(path, dpi=120)


def draw_shares(pairs: Mapping[str, tuple[int, int]], caption: str, path: Path) -> None:
    """Draw how many times one count is another, a line each, on a scale of powers of ten.

    Args:
        pairs: What to say at the left: the whole, a white dot, and its part, a black one.
        caption: What to say below.
        path: Where the PNG goes.
    """
    figure, axes = new_figure(3.6)
    for place, (whole, part) in enumerate(pairs.values()):
        axes.plot([part, whole], [place, place], color="0.7", lw=3, zorder=1)
        axes.scatter([part, whole], [place, place], c=["black", "white"], ec="black", zorder=2)
        axes.text((part * whole) ** 0.5, place - 0.12, f"{whole / part:,.0f} x", ha="center")
    axes.set_xscale("log")
    axes.set_yticks(range(len(pairs)), list(pairs))
    axes.set_ylim(len(pairs) - 0.5, -0.7)
    axes.set_xlabel(caption)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def stacked_bars(bars: Mapping[str, Mapping[str, float]], caption: str, path: Path) -> None:
    """Draw a lying bar for each of several sums, made of its parts, with the sum at its end.

    Args:
        bars: What to say at the left, and the parts by their names; the same names in each.
        caption: What to say below.
        path: Where the PNG goes.
    """
    figure, axes = new_figure(0.9 + 0.45 * len(bars))
    left = [0.0] * len(bars)
    for part, fill in zip(next(iter(bars.values())), FILLS, strict=False):
        sizes = [each[part] for each in bars.values()]
        axes.barh(range(len(bars)), sizes, 0.7, left, label=part, **OUTLINE, **fill)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    for place, end in enumerate(left):
        axes.text(end, place, f" {end:,.0f}", va="center")
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    axes.set_xlabel(caption)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)
