"""An experiment in several processes, as `torchrun` starts them: each takes a part of each batch.

All of them do the whole experiment and check its claims, on one network that they train together.
The first is heard: what the others print is dropped, and what they write goes where it is deleted.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from io import StringIO
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, distributed, nn

from .batches import Split
from .claims import claim, same_bits


def count() -> int:
    """Return how many processes there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def is_first() -> bool:
    """Say whether this process is the one that is heard."""
    return count() == 1 or distributed.get_rank() == 0


@contextmanager
def first_alone() -> Iterator[None]:
    """Let the first process through a block, and then the others."""
    if not is_first():
        distributed.barrier()
    yield
    if count() > 1 and is_first():
        distributed.barrier()


def on_each_rank(run: Callable[[Any], None]) -> Callable[[Any], None]:
    """Let an experiment run in the process that calls it, or in all that `torchrun` has started.

    Args:
        run: Takes the settings, a dataclass with the folder to write to as its `output`.

    Returns:
        What takes the same.
    """

    @functools.wraps(run)
    def run_here(settings: Any) -> None:
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            run(settings)
            return
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        distributed.init_process_group()
        try:
            if is_first():
                run(settings)
                return
            with TemporaryDirectory() as folder, redirect_stdout(StringIO()):
                run(replace(settings, output=folder))
        finally:
            distributed.destroy_process_group()

    return run_here


def parallel(net: Any, batches: Iterator[Split]) -> tuple[Any, Iterator[Split]]:
    """Let processes train one network together; alone, a process does as ever.

    Args:
        net: The network, with its adapter if that is to be trained.
        batches: The same in each process.

    Returns:
        The network, whose gradients become their mean over the processes, and its part of each
        batch; batches smaller than the processes are many are left out.
    """
    if (size := count()) == 1:
        return net, batches
    own = slice(distributed.get_rank(), None, size)
    parts = (batch.pick(own) for batch in batches if len(batch.labels) >= size)
    return nn.parallel.DistributedDataParallel(net), parts


def mean(value: Tensor) -> Tensor:
    """Return a number's mean over the processes."""
    if count() > 1:
        distributed.all_reduce(value)
    return value / count()


def check_alike(net: nn.Module) -> None:
    """Check that each process has the same parameters, bit for bit.

    Args:
        net: What they have trained.
    """
    if count() == 1:
        return
    own = torch.cat([each.detach().flatten() for each in net.parameters()])
    distributed.broadcast(first := own.clone(), 0)
    claim(same_bits(own, first), "each process has the same parameters")
