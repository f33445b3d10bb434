"""Labelled examples as a pair of tensors, and shuffled batches of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Split(NamedTuple):
    """Examples and their labels, on one device.

    Attributes:
        inputs: What a network takes, `[count, ...]`.
        labels: Classes, `[count]`, int64.
    """

    inputs: Tensor
    labels: Tensor

    def pick(self, chosen: Tensor | slice) -> Split:
        """Return some of the examples.

        Args:
            chosen: What indexes a tensor: indices, a mask or a slice.

        Returns:
            Those examples.
        """
        return Split(self.inputs[chosen], self.labels[chosen])


def shuffled(split: Split, size: int, generator: torch.Generator) -> Iterator[Split]:
    """Draw batches, epoch after epoch without end.

    Args:
        split: Where they are drawn from.
        size: Examples in a batch; an epoch's last batch has what is left.
        generator: Source of the shuffling.

    Yields:
        Batches.
    """
    while True:
        order = torch.randperm(len(split.labels), generator=generator).to(split.labels.device)
        for chosen in torch.split(order, size):
            yield split.pick(chosen)
