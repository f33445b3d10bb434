"""Compare LoRA, rsLoRA, PiSSA, DoRA and LoRA+, all tuned alike, on one digit and on tweets.

Reproduces: what the papers of rsLoRA (arXiv:2312.03732), PiSSA (2404.02948), DoRA (2402.09353) and
    LoRA+ (2402.12354) claim of theirs, on two small tasks: that it learns more than plain LoRA.
Command: `python -m experiments.kinds_compared`; `--quick` for one seed, rate and few examples.
Hardware, time: 2 cores of a shared AMD EPYC, 6 minutes; `--quick` 1.
Expected: no method ahead by more than a seed's spread; best learning rates 3 to 10 times apart.

Each method has the same rank, alpha and steps, and is tried once at each of the same learning rates
on a validation part; the best is then run with every seed and tested once. On MNIST a network that
knows all digits is adapted to nines alone, as in `mnist_finetune`; what counts is the mean of the
shares of nines and of all else that it tells right, so that what is forgotten counts too.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import nn

import lora_param as lp

from .mnist_network import RichBoyNet
from .shared import mnist, sentiment
from .shared.batches import Split, shuffled
from .shared.environment import choose_device
from .shared.minilm import Classifier, encoded_parts, lengths
from .shared.plots import grouped_bars
from .shared.runs import recorded
from .shared.scoring import score, spread
from .shared.settings import call, check_options, option
from .shared.tables import aligned
from .shared.training import adam, train
from .shared.tuning import best_rate


@dataclass(frozen=True)
class Settings:
    """Settings of the comparison."""

    quick: bool = option(False, "one seed, one learning rate, few examples")
    seeds: int = option(3, "runs with the best learning rate")
    rank: int = option(8, "rank of each update, half its alpha", most=10)  # of ten digits
    device: str = option("auto", "cpu, cuda, ...")
    output: str = option("runs/kinds_compared", "each run writes to a new folder in this one")

    def __post_init__(self) -> None:
        check_options(self)


Row = dict[str, Any]
METHODS: Row = {"LoRA": {}, "rsLoRA": {"scaling": "rslora"}, "PiSSA": {"init": "pissa"}}
METHODS |= {"DoRA": {"kind": "dora"}, "LoRA+": {}}  # the last one is in the optimizer
HEAD = 1e-3  # the rate of a new head, whatever the adapter's is


class Task(NamedTuple):
    """What the methods are compared on: data to train on, to choose by and to test on."""

    name: str
    base: Callable[[int], nn.Module]  # the network of a seed
    parts: tuple[Split, Split, Split]
    batch: int
    steps: int
    rates: tuple[float, ...]
    head: tuple[str, ...]  # what is new
    share: Callable[[nn.Module, Split], float]  # what counts, from 0 to 1


def nines(settings: Settings, device: torch.device) -> Task:
    """Prepare MNIST: a network that knows all digits, and nines to adapt it to."""
    (images, test), few = mnist.load(mnist.FOLDER, device), 1_000 if settings.quick else None
    known, validation = images.pick(slice(few or 55_000)), images.pick(slice(55_000, None))

    @lru_cache
    def base(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        net = RichBoyNet().to(device)
        batches = shuffled(known, 10, torch.Generator().manual_seed(seed))
        train(net, adam(net.parameters(), 1e-3), batches, len(known.labels) // 10, "pretraining")
        return net

    def share(net: nn.Module, split: Split) -> float:
        wrong, own = score(net, split, 1000, "testing").wrong, int((split.labels == 9).sum())
        return 1 - (wrong[9] / own + sum(wrong[:9]) / (len(split.labels) - own)) / 2

    parts = known.pick(known.labels == 9), validation, test.pick(slice(few))
    rates, steps = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3), 10 if settings.quick else 100
    return Task("nines", base, parts, 10, steps, rates, (), share)


def tweets(settings: Settings, device: torch.device) -> Task:
    """Prepare tweets: a pretrained encoder with a new head."""
    sizes = (100, 30, 64) if settings.quick else (1000, 300, 600)
    test, validation, data = encoded_parts("tweet", sizes, sentiment.FOLDER, device)

    def base(seed: int) -> nn.Module:
        return Classifier(seed, bfloat16=True).to(device)

    def share(net: nn.Module, split: Split) -> float:
        return score(net, split, 100, "testing").accuracy

    parts, rates = (data, validation, test), (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
    return Task("tweets", base, parts, 16, 2 * -(-sizes[2] // 16), rates, ("head",), share)


def trained(
    task: Task, method: str, rate: float, seed: int, settings: Settings
) -> tuple[nn.Module, Row]:
    """Adapt a task's network by one method; return it, and what it cost."""
    model = copy.deepcopy(task.base(seed)).train()
    torch.manual_seed(seed)
    options: Row = {"rank": settings.rank, "alpha": 2.0 * settings.rank, **METHODS[method]}
    lp.register_lora(model, train=task.head or None, **options)
    factors, ratio = dict.fromkeys(task.head, HEAD / rate), 16 if method == "LoRA+" else 1
    groups = lp.lora_parameter_groups(model, rate, ratio=ratio, factors=factors)
    data, generator = task.parts[0], torch.Generator().manual_seed(seed)
    batches = shuffled(data, task.batch, generator, lengths(data) if task.head else None)
    cost: Row = {"parameters": sum(each.numel() for each in lp.lora_parameters(model))}
    start = time.process_time()
    train(model, torch.optim.AdamW(groups), batches, task.steps, f"{task.name}, {method}")
    return model.eval(), cost | {"seconds_a_step": (time.process_time() - start) / task.steps}


def compared(task: Task, method: str, settings: Settings) -> Row:
    """Tune a method on a task, then test it with every seed."""
    rates, seeds = (task.rates[2:3], 1) if settings.quick else (task.rates, settings.seeds)
    first: dict[float, tuple[nn.Module, Row]] = {}

    def validate(rate: float) -> float:
        first[rate] = trained(task, method, rate, 0, settings)
        return round(task.share(first[rate][0], task.parts[1]), 6)

    best, tried = best_rate(rates, validate)
    models = [trained(task, method, best, seed, settings)[0] for seed in range(1, seeds)]
    shares = [round(task.share(each, task.parts[2]), 6) for each in (first[best][0], *models)]
    row = {"task": task.name, "method": method, "tried": tried, "rate": best, "shares": shares}
    return row | first[best][1]


def table(rows: Sequence[Row]) -> str:
    """Lay out what each method reaches on a task, at which rate, and what it costs."""
    rates = sorted({rate for row in rows for rate in row["tried"]})
    columns = *map("{:g}".format, rates), "test", "trained", "CPU ms"
    found = [[f"{rows[0]['task']}: tried in validation", *columns]]
    for row in rows:
        shown = (f"{row['tried'].get(rate, 0):.3f}".replace("0.000", "-") for rate in rates)
        tried = [text + "* "[rate != row["rate"]] for text, rate in zip(shown, rates, strict=True)]
        cost = f"{row['parameters']:,}", f"{1000 * row['seconds_a_step']:.1f}"
        found.append([row["method"], *tried, spread(row["shares"]).text(3), *cost])
    return aligned(found)


def draw(tasks: Sequence[Sequence[Row]], path: Path) -> None:
    """Draw each task's methods as bars; a whisker is a standard deviation over the seeds."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    for axes, rows in zip(figure.subplots(1, len(tasks)), tasks, strict=True):
        shares = [spread(row["shares"]) for row in rows]
        grouped_bars(axes, {"": shares}, width=0.6)
        low = min(each.mean - (each.std or 0) for each in shares)
        axes.set(ylabel="right in the test", ylim=(low - (1 - low) / 2, 1), title=rows[0]["task"])
        axes.set_xticks(range(len(rows)), [row["method"] for row in rows])
    figure.savefig(path, dpi=120)


def run(settings: Settings) -> None:
    """Compare the methods on both tasks; print, write and draw what came out."""
    torch.set_flush_denormal(True)  # with which an old Adam's step takes a fifth of the time
    device, tables = choose_device(settings.device), []
    with recorded(settings, device, "transformers") as record:
        for prepare in (nines, tweets):
            task, rows = prepare(settings, device), []
            record.results[f"{task.name}, before"] = task.share(task.base(0).eval(), task.parts[2])
            for method in METHODS:
                with record.timed(f"{task.name}, {method}"):
                    rows.append(compared(task, method, settings))
                print(f"{task.name}, {method}: {rows[-1]['shares']}", flush=True)
            tables.append(rows)
        record.results["rows"] = [row for rows in tables for row in rows]
        print("", *map(table, tables), sep="\n\n")
        draw(tables, record.folder / "kinds_compared.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit status."""
    return call(run, Settings, argv, "experiments.kinds_compared", __doc__)


if __name__ == "__main__":
    sys.exit(main())
