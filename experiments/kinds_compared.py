"""Compare LoRA, rsLoRA, PiSSA, DoRA and LoRA+, all tuned alike, on one digit and on tweets.

Reproduces: what the papers of rsLoRA (arXiv:2312.03732), PiSSA (2404.02948), DoRA (2402.09353) and
    LoRA+ (2402.12354) claim of theirs, on two small tasks: that it learns more than plain LoRA.
Command: `python -m experiments.kinds_compared`; `--quick` for one seed and one learning rate.
Needs: `pip install -e ".[sentiment]"` for MiniLM.
Hardware, time: one thread of a shared AMD EPYC.
Expected: no difference that three seeds could tell from chance.

Each method has the same rank, alpha and steps, and is tried once at each of the same learning rates
on a validation part; the best is then run with every seed and tested once. LoRA+ gives B sixteen
times the rate of A. On MNIST a network that knows all digits is adapted to nines alone, as in
`mnist_finetune`; what counts is the mean of the shares of nines and of all else that it knows, so
that a method pays for what it makes it forget. On tweets, MiniLM learns their sentiment.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

import lora_param as lp

from .mnist_network import RichBoyNet
from .shared import mnist, sentiment
from .shared.batches import Split, shuffled
from .shared.environment import choose_device
from .shared.minilm import Classifier, encoded, lengths
from .shared.plots import grouped_bars
from .shared.runs import recorded
from .shared.scoring import score, spread
from .shared.settings import call, check_options, option
from .shared.tables import aligned
from .shared.training import adam, train


@dataclass(frozen=True)
class Settings:
    """Settings of the comparison.

    Raises:
        ValueError: A value is out of range; says which, the rule and what it got.
    """

    quick: bool = option(False, "one seed, one learning rate")
    seeds: int = option(3, "runs with the best learning rate")
    rank: int = option(8, "rank of each update", most=10)  # RichBoyNet's last layer has ten rows
    alpha: float = option(16.0, "what the scale is made of")
    train_images: int = option(55_000, "to pretrain on and take nines from", least=100, most=55_000)
    digit_batches: int = option(100, "batches of 10 nines")
    sentences: int = option(600, "training tweets; half as many for validation", least=16)
    test_sentences: int = option(1000, "test tweets", least=8)
    epochs: int = option(2, "epochs of tweets, in batches of 16")
    device: str = option("auto", "cpu, cuda, ...")
    output: str = option("runs/kinds_compared", "each run writes to a new folder in this one")

    def __post_init__(self) -> None:
        check_options(self)


METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"scaling": "rslora"},
    "PiSSA": {"init": "pissa"},
    "DoRA": {"kind": "dora"},
    "LoRA+": {},
}
"""What `register_lora` is given; LoRA+ is in the optimizer."""

HEAD = 1e-3
"""The rate of a new head, whatever the adapter's is."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """What the methods are compared on.

    Attributes:
        name: What tables call it.
        base: Builds the pretrained network of a seed.
        parts: Examples to train on, to choose a learning rate by, and to test on.
        batch: Examples in a batch.
        steps: Batches.
        rates: The learning rates that are tried.
        head: What is new and trained whole.
        share: What counts, from 0 to 1.
    """

    name: str
    base: Callable[[int], nn.Module]
    parts: tuple[Split, Split, Split]
    batch: int
    steps: int
    rates: tuple[float, ...]
    head: tuple[str, ...]
    share: Callable[[nn.Module, Split], float]


def digits(settings: Settings, device: torch.device) -> Task:
    """Prepare MNIST: a network that knows all digits, and nines to adapt it to."""
    images, test = mnist.load(mnist.FOLDER, device)
    known = images.pick(slice(settings.train_images))
    validation, nines = images.pick(slice(55_000, None)), known.pick(known.labels == 9)
    bases: dict[int, nn.Module] = {}

    def base(seed: int) -> nn.Module:
        if seed not in bases:
            torch.manual_seed(seed)
            bases[seed] = net = RichBoyNet().to(device)
            batches = shuffled(known, 10, torch.Generator().manual_seed(seed))
            train(net, adam(net.parameters(), 1e-3), batches, len(known.labels) // 10, "pretrain")
        return copy.deepcopy(bases[seed])

    parts, rates = (nines, validation, test), (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
    return Task("nines", base, parts, 10, settings.digit_batches, rates, (), balanced)


def balanced(net: nn.Module, split: Split) -> float:
    """Return the mean of the shares of nines and of all other digits that are told right."""
    wrong, nines = score(net, split, 1000, "testing").wrong, int((split.labels == 9).sum())
    others = len(split.labels) - nines
    return mean((1 - wrong[9] / nines, 1 - sum(wrong[:9]) / others))


def tweets(settings: Settings, device: torch.device) -> Task:
    """Prepare tweets: a pretrained encoder with a new head."""
    sizes = settings.test_sentences, settings.sentences // 2, settings.sentences
    test, validation, data = (encoded(part, device) for part in sentiment.split("tweet", *sizes))
    steps = settings.epochs * math.ceil(len(data.labels) / 16)
    parts, rates = (data, validation, test), (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)

    def base(seed: int) -> nn.Module:
        return Classifier(seed, bfloat16=True).to(device)

    return Task("tweets", base, parts, 16, steps, rates, ("head",), accuracy)


def accuracy(net: nn.Module, split: Split) -> float:
    """Return the share of sentences that are classified right."""
    return score(net, split, 100, "testing").accuracy


def trained(
    task: Task, method: str, rate: float, seed: int, settings: Settings
) -> tuple[nn.Module, dict[str, float]]:
    """Adapt a task's network by one method; return it, and what it cost."""
    model = task.base(seed).train()
    torch.manual_seed(seed)
    numbers = {"rank": settings.rank, "alpha": settings.alpha}
    lp.register_lora(model, train=task.head or None, **numbers, **METHODS[method])  # type: ignore[arg-type]
    factors = dict.fromkeys(task.head, HEAD / rate)
    ratio = 16 if method == "LoRA+" else 1
    optimizer = torch.optim.AdamW(
        lp.lora_parameter_groups(model, rate, ratio=ratio, factors=factors)
    )
    data, generator = task.parts[0], torch.Generator().manual_seed(seed)
    batches = shuffled(data, task.batch, generator, lengths(data) if task.head else None)
    start = time.process_time()
    train(model, optimizer, batches, task.steps, f"{task.name}, {method}")
    seconds = (time.process_time() - start) / task.steps
    sizes = sum(each.numel() for each in lp.lora_parameters(model))
    return model.eval(), {"parameters": sizes, "seconds_a_step": seconds}


def compared(task: Task, method: str, settings: Settings) -> Row:
    """Tune a method on a task, then test it with every seed."""
    rates, seeds = (task.rates[2:3], 1) if settings.quick else (task.rates, settings.seeds)
    tried: dict[float, float] = {}
    for rate in rates:
        model, cost = trained(task, method, rate, 0, settings)
        if (share := round(task.share(model, task.parts[1]), 6)) > max(tried.values(), default=-1):
            best, first = rate, round(task.share(model, task.parts[2]), 6)
        tried[rate] = share
    models = (trained(task, method, best, seed, settings)[0] for seed in range(1, seeds))
    shares = [first, *(round(task.share(each, task.parts[2]), 6) for each in models)]
    row = {"task": task.name, "method": method, "tried": tried, "rate": best, "shares": shares}
    return row | cost


def table(rows: Sequence[Row]) -> str:
    """Lay out what each method reaches, at which rate, and what it costs."""
    tables = []
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        rates = [f"{rate:g}" for rate in own[0]["tried"]]
        found = [[f"{task}: tried in validation", *rates, "test", "trained", "CPU ms a step"]]
        for row in own:
            tried = [f"{v:.3f}" + "* "[rate != row["rate"]] for rate, v in row["tried"].items()]
            cost = f"{row['parameters']:,}", f"{1000 * row['seconds_a_step']:.1f}"
            found.append([row["method"], *tried, spread(row["shares"]).text(3), *cost])
        tables.append(aligned(found))
    return "\n\n".join(tables)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw each task's methods as bars; a whisker is a standard deviation over the seeds."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    for axes, task in zip(figure.subplots(1, len(tasks)), tasks, strict=True):
        shares = [spread(row["shares"]) for row in rows if row["task"] == task]
        grouped_bars(axes, {"": shares}, width=0.6)
        low = min(each.mean - (each.std or 0) for each in shares)
        axes.set(ylabel="right in the test", ylim=(low - (1 - low) / 2, 1), title=task)
        axes.set_xticks(range(len(METHODS)), list(METHODS))
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def run(settings: Settings) -> None:
    """Compare the methods on both tasks; print, write and draw what came out."""
    torch.set_flush_denormal(True)  # with which an old Adam's step takes a fifth of the time
    device = choose_device(settings.device)
    with recorded(settings, device, "transformers") as record:
        rows = record.results["rows"] = []
        for prepare in (digits, tweets):
            task = prepare(settings, device)
            with record.timed(f"{task.name}, pretraining"):
                before = task.share(task.base(0).eval(), task.parts[2])
            record.results[f"{task.name}, before"] = round(before, 6)
            for method in METHODS:
                with record.timed(f"{task.name}, {method}"):
                    rows.append(compared(task, method, settings))
                print({k: v for k, v in rows[-1].items() if k != "parameters"}, flush=True)
        print("", table(rows), sep="\n")
        draw(rows, record.folder / "kinds_compared.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line.

    Args:
        argv: Arguments; those of the process if `None`.

    Returns:
        The exit status.
    """
    return call(run, Settings, argv, "experiments.kinds_compared", __doc__)


if __name__ == "__main__":
    sys.exit(main())
