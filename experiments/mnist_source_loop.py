"""Time `experiments.mnist_finetune` against a loop written as the source's is.

The source's way: images through torchvision's transforms one by one, a `DataLoader` of batches of
10, Adam as it comes, the loss read at every step, the adapted weight formed at every forward, and
test images compared one by one in Python.

Each way has a process of its own, because taking denormal numbers for zero is a whole process's
setting, which the experiment makes and the source doesn't. They take turns, so that both meet the
same machine. Late in training denormal numbers abound, so fresh weights say little: 30 turns of 50
steps are measured after 1,500 steps of pretraining, and their medians are scaled up to the whole
run. With `--full` every step from the first to the last is measured, in turns, and summed up.
Imports and loading the data are not measured. Bars are silent where the output is no terminal.

Command: `python -m experiments.mnist_source_loop`; `--quick` for 6 turns instead of 30, `--full`
    to run both from beginning to end.
Hardware, time: 2 cores of a shared AMD EPYC; 4 minutes, with `--full` 4 to 6.
Expected: a ratio of about 0.3. Four runs gave 0.22, 0.26, 0.27 and 0.30, the first beside a busy
    neighbour; two with `--full` gave 0.33 and 0.43, where turns in which a thread waited for its
    core count too. In both, the middle half of the pretraining turns lay at 0.29 to 0.36.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.data import DataLoader
from torchvision import transforms  # type: ignore[import-untyped]
from torchvision.datasets import MNIST  # type: ignore[import-untyped]
from tqdm import tqdm  # type: ignore[import-untyped]

import lora_param as lp

from .mnist_network import RichBoyNet
from .shared import mnist
from .shared.batches import shuffled
from .shared.scoring import score
from .shared.settings import option, parse
from .shared.tables import aligned
from .shared.training import adam, train

Work = Callable[[int], object]
"""Does so many batches, or tests so many images."""

Way = Callable[[Path], dict[str, Work]]
"""Sets up the work of each phase."""

Seconds = Callable[[str, int], float]
"""Does so much work of a phase, and returns the seconds it took."""


@dataclass(frozen=True)
class Settings:
    """Settings of the comparison."""

    quick: bool = option(False, "six turns instead of thirty")
    full: bool = option(False, "run both from beginning to end")


@dataclass(frozen=True)
class Phase:
    """A part of the run.

    Attributes:
        name: What it is called.
        whole: Batches or images in the whole run.
        turn: How many of them are a turn.
        warm_up: How many are done before any is measured, without `--full`.
    """

    name: str
    whole: int
    turn: int
    warm_up: int


PHASES = (
    Phase("pretraining", 6000, 50, 1500),
    Phase("fine-tuning", 100, 10, 10),
    Phase("testing, plain", 20_000, 1000, 1000),
    Phase("testing, LoRA on", 10_000, 1000, 1000),
)


def ours(data: Path) -> dict[str, Work]:
    """Set up the experiment's way of working, on MNIST in a data folder."""
    torch.set_flush_denormal(True)
    train_split, test_split = mnist.load(data, torch.device("cpu"))
    net, tuned = RichBoyNet(), RichBoyNet()
    lp.register_lora(tuned, rank=1, init="gaussian")
    optimizers = adam(net.parameters(), 1e-3), adam(lp.lora_parameters(tuned), 1e-3)
    batches = shuffled(train_split, 10, torch.Generator().manual_seed(0))

    def test(network: nn.Module, count: int) -> object:
        return score(network, test_split.pick(slice(count)), 1000, "ours")

    return {
        "pretraining": lambda n: train(net, optimizers[0], batches, n, "ours"),
        "fine-tuning": lambda n: train(tuned, optimizers[1], batches, n, "ours"),
        "testing, plain": partial(test, net),
        "testing, LoRA on": partial(test, tuned),
    }


def source(data: Path) -> dict[str, Work]:
    """Set up the source's way of working, on MNIST in a data folder, unpacked."""
    steps = [transforms.ToTensor(), transforms.Normalize((mnist.MEAN,), (mnist.STD,))]
    train_batches, test_batches = (
        _endless(
            DataLoader(
                MNIST(data, train=part, transform=transforms.Compose(steps)),
                batch_size=10,
                shuffle=True,
            )
        )
        for part in (True, False)
    )
    net, tuned = RichBoyNet(), RichBoyNet()
    tuned.requires_grad_(False)
    for layer in (tuned.linear1, tuned.linear2, tuned.linear3):
        sizes = layer.out_features, layer.in_features
        lora = lp.LoRAParametrization(*sizes, rank=1, init="gaussian")
        register_parametrization(layer, "weight", lora)
    optimizers = [torch.optim.Adam(each.parameters(), lr=1e-3) for each in (net, tuned)]
    return {
        "pretraining": lambda n: _train(net, optimizers[0], train_batches, n),
        "fine-tuning": lambda n: _train(tuned, optimizers[1], train_batches, n),
        "testing, plain": lambda n: _test(net, test_batches, n // 10),
        "testing, LoRA on": lambda n: _test(tuned, test_batches, n // 10),
    }


def _endless(loader: DataLoader[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from loader


def _train(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[tuple[Tensor, Tensor]],
    count: int,
) -> None:
    criterion, total = nn.CrossEntropyLoss(), 0.0
    bar = tqdm(islice(batches, count), "source", count, leave=False, disable=None)
    for step, (x, y) in enumerate(bar, 1):
        optimizer.zero_grad()
        loss = criterion(net(x.view(-1, 784)), y)
        total += loss.item()
        bar.set_postfix(loss=total / step)
        loss.backward()
        optimizer.step()


def _test(net: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], count: int) -> list[int]:
    wrong = [0] * 10
    with torch.no_grad():
        for x, y in tqdm(islice(batches, count), "source", count, leave=False, disable=None):
            for index, row in enumerate(net(x.view(-1, 784))):
                if torch.argmax(row) != y[index]:
                    wrong[y[index]] += 1
    return wrong


@contextmanager
def worker(way: Way, data: Path) -> Iterator[Seconds]:
    """Start a process that works in one way, whenever it is its turn.

    Args:
        way: Sets the way up, in the new process.
        data: The data folder.

    Yields:
        What does some work there, and returns the seconds it took.
    """
    context = multiprocessing.get_context("spawn")  # a fork would share its parent's settings
    connection, end = context.Pipe()
    process = context.Process(target=_serve, args=(way, data, end), daemon=True)
    process.start()
    end.close()  # so that a worker's failure ends `recv`

    def seconds(phase: str, count: int) -> float:
        connection.send((phase, count))
        taken: float = connection.recv()
        return taken

    try:
        yield seconds
    finally:
        connection.close()
        process.join()


def _serve(way: Way, data: Path, connection: Connection) -> None:
    works = way(data)
    with suppress(EOFError):  # the comparison is over
        while True:
            phase, count = connection.recv()
            start = time.perf_counter()
            works[phase](count)
            connection.send(time.perf_counter() - start)


def compare(
    phase: Phase, workers: Sequence[Seconds], settings: Settings
) -> list[tuple[float, ...]]:
    """Let workers take turns at a phase.

    Args:
        phase: The phase.
        workers: Who takes turns.
        settings: Say how many turns.

    Returns:
        The seconds that each worker took, turn by turn.
    """
    turns = phase.whole // phase.turn if settings.full else 6 if settings.quick else 30
    if not settings.full:
        for work in workers:
            work(phase.name, phase.warm_up)
    return [tuple(work(phase.name, phase.turn) for work in workers) for _ in range(turns)]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print a table.

    Args:
        argv: Arguments; those of the process if `None`.
    """
    program, about = "python -m experiments.mnist_source_loop", __doc__.partition("\n")[0]
    settings = parse(Settings, argv, program, about)
    rows, totals = [("phase", "ours, s", "source, s", "ratio", "quartiles of turns")], [0.0, 0.0]
    with (
        mnist.unpacked(mnist.FOLDER) as data,
        worker(ours, data) as our_worker,
        worker(source, data) as source_worker,
    ):
        for phase in PHASES:
            times = compare(phase, (our_worker, source_worker), settings)
            columns = list(zip(*times, strict=True))
            if settings.full:
                seconds = [sum(column) for column in columns]
            else:
                seconds = [median(column) * phase.whole / phase.turn for column in columns]
            totals = [total + part for total, part in zip(totals, seconds, strict=True)]
            low, middle, high = quantiles(fast / slow for fast, slow in times)
            spread = f"{low:.2f}  {middle:.2f}  {high:.2f}"
            rows.append((phase.name, *_figures(*seconds), spread))
    print(aligned([*rows, ("whole run", *_figures(*totals), "")]))


def _figures(ours: float, source: float) -> tuple[str, str, str]:
    return f"{ours:.1f}", f"{source:.1f}", f"{ours / source:.2f}"


if __name__ == "__main__":
    main()
