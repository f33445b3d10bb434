"""Time `experiments.mnist_finetune` against a loop written as the source's is, in one process.

The source's way: images through torchvision's transforms one by one, a `DataLoader` of batches of
10, Adam as it comes, the loss read at every step, the adapted weight formed at every forward, and
test images compared one by one in Python. The two take turns in short chunks, so that both meet
the same machine, and their medians are scaled up to the whole run.

Command: `python -m experiments.mnist_source_loop`; `--quick` for fewer rounds, `--full` to run
    both from beginning to end.
Hardware, time: 2 cores of a shared AMD EPYC; 95 s, with `--full` 195 s.
Expected: a ratio of about 0.32. Sixteen runs gave 0.29 to 0.37 twelve times (0.33 with `--full`)
    and 0.41 to 0.45 four times: pretraining waits for memory, which the machine shares.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from statistics import median, quantiles

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.data import DataLoader
from torchvision import transforms  # type: ignore[import-untyped]
from torchvision.datasets import MNIST  # type: ignore[import-untyped]
from tqdm import tqdm  # type: ignore[import-untyped]

import lora_param as lp

from . import mnist
from .mnist_training import RichBoyNet, adam, in_blocks, score, shuffled, train

Work = Callable[[int], object]
"""Does so many batches, or tests so many images."""

# phase: how much of it the whole run has, in a turn, in a turn with --full
PHASES = {
    "pretraining": (6000, 50, 6000),
    "fine-tuning": (100, 10, 100),
    "testing, plain": (20_000, 1000, 10_000),
    "testing, LoRA on": (10_000, 1000, 10_000),
}


def ours() -> dict[str, Work]:
    """Set up the experiment's way of working."""
    train_split, test_split = mnist.load(mnist.FOLDER, torch.device("cpu"))
    net, tuned = RichBoyNet(), RichBoyNet()
    fast = partial(net, linear=in_blocks)
    lp.register_lora(tuned, rank=1, init="gaussian")
    optimizers = adam(net.parameters(), 1e-3), adam(lp.lora_parameters(tuned), 1e-3)
    batches = shuffled(train_split, 10, torch.Generator().manual_seed(0))

    def test(network: nn.Module, count: int) -> object:
        return score(network, mnist.Split(*(t[:count] for t in test_split)), 1000, "ours")

    return {
        "pretraining": lambda n: train(fast, optimizers[0], train_split, batches, n, "ours"),
        "fine-tuning": lambda n: train(tuned, optimizers[1], train_split, batches, n, "ours"),
        "testing, plain": lambda n: test(net, n),
        "testing, LoRA on": lambda n: test(tuned, n),
    }


def source() -> dict[str, Work]:
    """Set up the source's way of working."""
    steps = [transforms.ToTensor(), transforms.Normalize((mnist.MEAN,), (mnist.STD,))]
    train_batches, test_batches = (
        _endless(
            DataLoader(
                MNIST(mnist.FOLDER, train=part, transform=transforms.Compose(steps)),
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
    bar = tqdm(islice(batches, count), "source", count, leave=False)
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
        for x, y in tqdm(islice(batches, count), "source", count, leave=False):
            for index, row in enumerate(net(x.view(-1, 784))):
                if torch.argmax(row) != y[index]:
                    wrong[y[index]] += 1
    return wrong


def seconds(work: Work, count: int) -> float:
    """Time a turn, in seconds per unit of work."""
    start = time.perf_counter()
    work(count)
    return (time.perf_counter() - start) / count


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print a table; every number but the ratio's quartiles is a median over turns.

    Args:
        argv: Arguments; those of the process if `None`.
    """
    parser = argparse.ArgumentParser(description="Time the experiment against the source's loop.")
    parser.add_argument("--quick", action="store_true", help="six rounds instead of thirty")
    parser.add_argument("--full", action="store_true", help="run both from beginning to end")
    arguments = parser.parse_args(argv)
    contestants = ours(), source()
    print(f"{'phase':18}{'ours, s':>10}{'source, s':>10}{'ratio':>7}  quartiles")
    totals = [0.0, 0.0]
    for phase, (whole, turn, full_turn) in PHASES.items():
        count = full_turn if arguments.full else turn
        rounds = whole // count if arguments.full else 6 if arguments.quick else 30
        for contestant in contestants:
            contestant[phase](10)  # warms up
        times = [[seconds(each[phase], count) for each in contestants] for _ in range(rounds)]
        medians = [median(column) * whole for column in zip(*times, strict=True)]
        totals = [total + part for total, part in zip(totals, medians, strict=True)]
        ratios = [fast / slow for fast, slow in times]
        low, _, high = quantiles(ratios) if rounds > 1 else ratios * 3
        print(f"{phase:18}{medians[0]:10.1f}{medians[1]:10.1f}{median(ratios):7.2f}", end="  ")
        print(f"{low:.2f} to {high:.2f}")
    print(f"{'whole run':18}{totals[0]:10.1f}{totals[1]:10.1f}{totals[0] / totals[1]:7.2f}")


if __name__ == "__main__":
    main()
