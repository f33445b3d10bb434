"""The picture of `mnist_finetune`: wrong counts per digit before, with LoRA on, and with it off."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .mnist_report import STATES, Run
from .shared.plots import grouped_bars, new_figure, save
from .shared.scoring import Spread, wrong_counts


def plot_wrong_counts(runs: Sequence[Run], tuned: int, path: Path) -> None:
    """Draw three bars per digit, and the spread of several runs.

    Args:
        runs: One run or more; of several, the bars are means, the whiskers standard deviations.
        tuned: The digit that was fine-tuned on, which gets a grey band.
        path: Where the PNG goes.
    """
    counts = {state: wrong_counts([run.scores[state] for run in runs]) for state in STATES}
    figure, axes = new_figure(3.5)
    axes.axvspan(tuned - 0.48, tuned + 0.48, color="0.9", zorder=0, label=f"fine-tuned: {tuned}")
    grouped_bars(axes, counts)
    axes.set(ylabel="wrong, of about 1,000 a digit", xlim=(-0.5, 9.5), ylim=(0, None))
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
