"""What a run of `experiments.mnist_finetune` measured, and what it shows: a table and a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import mean, stdev

STATES = ("pretrained", "LoRA on", "LoRA off")


@dataclass(frozen=True)
class Score:
    """One pass over the test images.

    Attributes:
        wrong: Images that were taken for another digit, per digit.
        images: All images of the pass.
        loss: Mean cross-entropy; `None` where it isn't known.
    """

    wrong: tuple[int, ...]
    images: int
    loss: float | None = None

    @property
    def accuracy(self) -> float:
        """Share of the images that were classified right."""
        return 1 - sum(self.wrong) / self.images


@dataclass
class Run:
    """One seed's figures, filled in as the run goes on.

    Attributes:
        seed: The seed.
        scores: The three test passes, by the names in `STATES`.
        losses: Mean loss over each training phase.
        seconds: Time of each phase.
    """

    seed: int
    scores: dict[str, Score] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


SOURCE = {
    "pretrained": Score((33, 28, 42, 95, 19, 10, 61, 52, 19, 107), 10_000),
    "LoRA on": Score((53, 32, 60, 201, 186, 85, 69, 677, 193, 11), 10_000),
    "LoRA off": Score((33, 28, 42, 95, 19, 10, 61, 52, 19, 107), 10_000),
}
"""The notebook's own run: digit 9, rank 1, alpha 1."""


@dataclass(frozen=True)
class Spread:
    """A figure over all runs.

    Attributes:
        mean: The mean.
        std: The sample standard deviation; `None` for a single run.
    """

    mean: float
    std: float | None

    def text(self, digits: int) -> str:
        """Return `mean` or `mean±std`, rounded to a number of decimals."""
        spread = "" if self.std is None else f"±{self.std:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread}"


def spread(values: Sequence[float]) -> Spread:
    """Reduce a figure of all runs to its mean and standard deviation."""
    return Spread(mean(values), stdev(values) if len(values) > 1 else None)


def wrong_counts(scores: Sequence[Score]) -> list[Spread]:
    """Reduce the wrong counts of several scores, digit by digit.

    Args:
        scores: One score or more.

    Returns:
        Ten means and spreads, for the digits 0 to 9.
    """
    columns = zip(*(score.wrong for score in scores), strict=True)
    return [spread(column) for column in columns]


def table(runs: Sequence[Run]) -> str:
    """Lay out accuracies and wrong counts, each with the source's figures beneath.

    Args:
        runs: One run or more; of several, the table has mean and standard deviation.

    Returns:
        The table, without a final line break.
    """
    rows = [("", "accuracy", *map(str, range(10)))]
    for state in STATES:
        rows.append(_row(state, [run.scores[state] for run in runs]))
        rows.append(_row("  source", [SOURCE[state]]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        row[0].ljust(widths[0])
        + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    )


def summary(runs: Sequence[Run]) -> dict[str, object]:
    """Reduce the figures of all runs for `results.json`.

    Args:
        runs: One run or more.

    Returns:
        Mean and standard deviation of accuracy and wrong counts, by state.
    """
    return {
        state: {
            "accuracy": asdict(spread([score.accuracy for score in scores])),
            "wrong": [asdict(count) for count in wrong_counts(scores)],
        }
        for state in STATES
        for scores in [[run.scores[state] for run in runs]]
    }


def _row(label: str, scores: Sequence[Score]) -> tuple[str, ...]:
    accuracy = spread([score.accuracy for score in scores])
    return (label, accuracy.text(3), *(count.text(0) for count in wrong_counts(scores)))


def timings(seconds: dict[str, float]) -> str:
    """Say where the time went.

    Args:
        seconds: Time by phase.

    Returns:
        One line.
    """
    phases = ", ".join(f"{phase} {time:.1f}" for phase, time in seconds.items())
    return f"seconds: {phases}; together {sum(seconds.values()):.1f}"


def verdict(runs: Sequence[Run], digit: int) -> str:
    """Say what the figures show, in words that hold for these very figures.

    Args:
        runs: One run or more; of several, the means are compared.
        digit: The digit that was fine-tuned on.

    Returns:
        One sentence a line.
    """
    counts = {
        state: [count.mean for count in wrong_counts([run.scores[state] for run in runs])]
        for state in STATES
    }
    before, on, off = (counts[state] for state in STATES)
    others_before, others_on = (sum(each) - each[digit] for each in (before, on))
    lines = [
        f"The {digit}s: {_change(before[digit], on[digit])}.",
        f"The other digits: {_change(others_before, others_on)}.",
    ]
    if others_on > others_before:
        lines.append(f"They pay for it, because the fine-tuning saw nothing but {digit}s.")
    back = "are exactly" if off == before else "are not"
    lines.append(f"LoRA off: the wrong counts {back} the pretrained network's.")
    return "\n".join(lines)


def _change(before: float, after: float) -> str:
    figures = f"{before:.0f} wrong before, {after:.0f} with LoRA on"
    if after == before:
        return f"{figures}: no change"
    if after > before:
        return f"{figures}: worse"
    return f"{figures}: better" + (f", {before / after:.1f}-fold" if after else "")
