"""What a classifier gets wrong, and the spread of such figures over several runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

import torch
from torch import nn
from tqdm import tqdm  # type: ignore[import-untyped]

from .batches import Split
from .ranks import is_first


@dataclass(frozen=True)
class Score:
    """One pass over test examples.

    Attributes:
        wrong: Examples that were taken for another class, per class.
        examples: All examples of the pass.
        loss: Mean cross-entropy; `None` where it isn't known.
    """

    wrong: tuple[int, ...]
    examples: int
    loss: float | None = None

    @property
    def accuracy(self) -> float:
        """Share of the examples that were classified right."""
        return 1 - sum(self.wrong) / self.examples


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
    """Reduce the wrong counts of several scores, class by class.

    Args:
        scores: One score or more.

    Returns:
        A mean and spread per class.
    """
    return [spread(column) for column in zip(*(score.wrong for score in scores), strict=True)]


def score(net: nn.Module, split: Split, batch_size: int, name: str) -> Score:
    """Count the examples that a classifier gets wrong.

    Args:
        net: Gives logits, `[batch, classes]`.
        split: The examples; at least one.
        batch_size: Examples in a batch.
        name: What the progress bar is called; there is one where the output is a terminal.

    Returns:
        Wrong counts per class, and the mean loss.
    """
    starts = range(0, len(split.labels), batch_size)
    missed, losses = [], []
    with torch.no_grad():
        for start in tqdm(starts, name, unit="batch", disable=None if is_first() else True):
            inputs, labels = split.pick(slice(start, start + batch_size))
            logits = net(inputs)
            missed.append(labels[logits.argmax(1) != labels])
            losses.append(nn.functional.cross_entropy(logits, labels, reduction="sum"))
    wrong = torch.cat(missed).bincount(minlength=logits.shape[1])
    examples = len(split.labels)
    return Score(tuple(wrong.tolist()), examples, torch.stack(losses).sum().item() / examples)
