"""The training loop, in one process or several.

Nothing in it waits for the device: batches are on it as tensors, and losses are read at the end.
What is left of a step in a large network is Adam's pass over the parameters, for which torch has a
fused implementation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from . import ranks
from .batches import Split


def train(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Split],
    count: int,
    name: str,
) -> float:
    """Take one step of a classifier per batch.

    Args:
        net: Gives logits, `[batch, classes]`.
        optimizer: Has the parameters to train.
        batches: Where the batches come from.
        count: How many to take.
        name: What the progress bar is called; there is one where the output is a terminal.

    Returns:
        The mean loss.

    Raises:
        ValueError: The loss became infinite or not a number.
    """
    total: Tensor | float = 0.0
    net, batches = ranks.parallel(net, batches)
    hidden = None if ranks.is_first() else True
    bar = tqdm(islice(batches, count), name, count, unit="batch", disable=hidden)
    for step, batch in enumerate(bar, 1):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(batch.inputs), batch.labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total = total + loss.detach()
        # Reading the loss waits for the device, so only a visible bar does, and rarely.
        if not bar.disable and step % 50 == 0:
            bar.set_postfix(loss=f"{float(total) / step:.3f}", refresh=False)
    mean = float(ranks.mean(torch.as_tensor(total))) / count
    if not math.isfinite(mean):
        raise ValueError(f"{name} diverged, its mean loss is {mean}; lower the learning rate")
    ranks.check_alike(net)
    return mean


def adam(
    parameters: Iterable[nn.Parameter],
    learning_rate: float,
    kind: type[torch.optim.Adam] = torch.optim.Adam,
) -> torch.optim.Optimizer:
    """Build Adam, with torch's fused implementation where the device has one.

    Args:
        parameters: What to train.
        learning_rate: The learning rate.
        kind: Adam, or torch's AdamW.

    Returns:
        The optimizer.
    """
    trained = list(parameters)
    try:
        return kind(trained, lr=learning_rate, fused=True)
    except RuntimeError:
        return kind(trained, lr=learning_rate)
