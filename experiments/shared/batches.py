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


def shuffled(
    split: Split, size: int, generator: torch.Generator, lengths: Tensor | None = None
) -> Iterator[Split]:
    """Draw batches, epoch after epoch without end.

    Args:
        split: Where they are drawn from.
        size: Examples in a batch; an epoch's last batch has what is left.
        generator: Source of the shuffling.
        lengths: Of the examples, where those of a batch should be of about the same length: each
            eight batches are drawn together and shared out by length, in a random order.

    Yields:
        Batches.
    """
    while True:
        order = torch.randperm(len(split.labels), generator=generator).to(split.labels.device)
        batches = list(torch.split(order, size))
        if lengths is not None:
            alike = [eight[lengths[eight].argsort()] for eight in torch.split(order, 8 * size)]
            batches = [batch for eight in alike for batch in torch.split(eight, size)]
            mixed = torch.randperm(len(batches), generator=generator).tolist()
            batches = [batches[index] for index in mixed]
        for chosen in batches:
            yield split.pick(chosen)
