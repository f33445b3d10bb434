"""The source's network and what is done with it: training steps and test passes.

Nothing in a loop waits for the device: images are on it as tensors, batches are drawn by index,
and losses are read at the end. What is left of a step is Adam's pass over 2.8 million parameters,
for which torch has a fused implementation, and products of ten rows with them, for which a CPU
wants them in blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from .mnist import Split
from .mnist_results import Score

Linear = Callable[[nn.Linear, Tensor], Tensor]
"""Applies a layer to its input."""


class RichBoyNet(nn.Module):
    """The source's network, `784 -> 1000 -> 2000 -> 10` with ReLU: far more than MNIST needs."""

    def __init__(self, hidden_size_1: int = 1000, hidden_size_2: int = 2000) -> None:
        super().__init__()
        self.linear1 = nn.Linear(784, hidden_size_1)
        self.linear2 = nn.Linear(hidden_size_1, hidden_size_2)
        self.linear3 = nn.Linear(hidden_size_2, 10)

    def forward(self, pixels: Tensor, linear: Linear = nn.Module.__call__) -> Tensor:
        """Return the digits' logits, `[batch, 10]`, for pixels `[batch, 784]`.

        Args:
            pixels: The images.
            linear: How to apply each layer.
        """
        hidden = torch.relu_(linear(self.linear1, pixels))
        hidden = torch.relu_(linear(self.linear2, hidden))
        return linear(self.linear3, hidden)


def in_blocks(layer: nn.Linear, x: Tensor) -> Tensor:
    """Apply a layer to a few rows, with its weight in blocks.

    There are as many blocks as threads, where that divides the rows, so that each core reads one of
    its own; the weight's gradient is made in pieces that fit a core's cache. With ten images and
    two threads a step of training took 0.7 of the time that it takes with whole matrices.

    Args:
        layer: The layer; it has a bias, and its hooks don't run.
        x: Its input, `[batch, in_features]`.

    Returns:
        Its output, `[batch, out_features]`.
    """
    output: Tensor = _InBlocks.apply(x, layer.weight, layer.bias)
    return output


class _InBlocks(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        blocks = _blocks(weight, torch.get_num_threads())
        parts = torch.bmm(x.expand(len(blocks), -1, -1), blocks.mT)
        return parts.transpose(0, 1).flatten(1) + bias

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        (x, weight), (gradient,) = ctx.saved_tensors, gradients
        for_x = None
        if ctx.needs_input_grad[0]:
            blocks = _blocks(weight, torch.get_num_threads())
            parts = gradient.reshape(len(x), len(blocks), -1).transpose(0, 1)
            for_x = torch.bmm(parts, blocks).sum(0)
        pieces = _blocks(gradient.T, 40)
        for_weight = torch.bmm(pieces, x.expand(len(pieces), -1, -1)).view_as(weight)
        return for_x, for_weight, gradient.sum(0)


def _blocks(matrix: Tensor, most: int) -> Tensor:
    rows, columns = matrix.shape
    return matrix.reshape(math.gcd(rows, most), -1, columns)


def train(
    net: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    split: Split,
    batches: Iterator[Tensor],
    count: int,
    name: str,
) -> float:
    """Take one step per batch.

    Args:
        net: The network's forward.
        optimizer: Has the parameters to train.
        split: Images and labels.
        batches: Indices into the split.
        count: How many batches to take.
        name: What the progress bar is called.

    Returns:
        The mean loss.

    Raises:
        ValueError: The loss became infinite or not a number.
    """
    total = torch.zeros((), device=split.labels.device)
    bar = tqdm(islice(batches, count), name, count, unit="batch", disable=None)
    for step, batch in enumerate(bar, 1):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(split.images[batch]), split.labels[batch])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total += loss.detach()
        # Reading the loss waits for the device, so only a visible bar does, and rarely.
        if not bar.disable and step % 50 == 0:
            bar.set_postfix(loss=f"{total.item() / step:.3f}", refresh=False)
    mean = total.item() / count
    if not math.isfinite(mean):
        raise ValueError(f"{name} diverged, its mean loss is {mean}; lower the learning rate")
    return mean


def score(net: nn.Module, split: Split, batch_size: int, name: str) -> Score:
    """Count the images that a network gets wrong.

    Args:
        net: The network.
        split: Images and labels.
        batch_size: Images in a batch.
        name: What the progress bar is called.

    Returns:
        Wrong counts per digit, and the mean loss.
    """
    wrong = torch.zeros(10, dtype=torch.int64, device=split.labels.device)
    total = torch.zeros((), device=split.labels.device)
    starts = range(0, len(split.labels), batch_size)
    bar = tqdm(starts, name, unit="batch", disable=None)
    with torch.no_grad():
        for start in bar:
            labels = split.labels[start : start + batch_size]
            logits = net(split.images[start : start + batch_size])
            wrong += torch.bincount(labels[logits.argmax(1) != labels], minlength=10)
            total += nn.functional.cross_entropy(logits, labels, reduction="sum")
            if not bar.disable:
                bar.set_postfix(loss=f"{total.item() / (start + len(labels)):.3f}", refresh=False)
    images = len(split.labels)
    return Score(tuple(wrong.tolist()), images, total.item() / images)


def shuffled(split: Split, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Draw batches of indices, epoch after epoch without end.

    Args:
        split: What the indices are for.
        size: Indices in a batch; an epoch's last batch has what is left.
        generator: Source of the shuffling.

    Yields:
        Indices, `[size]`, on the split's device.
    """
    while True:
        order = torch.randperm(len(split.labels), generator=generator)
        yield from torch.split(order.to(split.labels.device), size)


def adam(parameters: Iterator[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """Build Adam, with torch's fused implementation where the device has one.

    Args:
        parameters: What to train.
        learning_rate: The learning rate.

    Returns:
        The optimizer.
    """
    trained = list(parameters)
    try:
        return torch.optim.Adam(trained, lr=learning_rate, fused=True)
    except RuntimeError:
        return torch.optim.Adam(trained, lr=learning_rate)
