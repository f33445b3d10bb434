"""Measure what LoRA saves of a training step, and what it doesn't, on a decoder of three sizes.

Reproduces: what the tutorials say in words: LoRA saves gradients and the optimizer's state, while
    activations stay as they are; a merged adapter costs inference nothing.
Command: `python -m experiments.full_against_lora`; `--quick` for the smallest size.
Hardware, time: 2 cores of a shared AMD EPYC; 1 to 7 minutes, `--quick` 7 s.
Expected: gradients and optimizer's state fall from 12 bytes a parameter to nothing worth drawing,
    1,242 MB to 488 in the largest; activations stay to 1 %; backward takes 0.55 to 0.8 of its time,
    forward 1.05 to 1.15, merged inference 0.99 to 1.05 of the base's.

Bytes are counted tensor by tensor: parameters, gradients, Adam's state, and what forward keeps for
backward. On CUDA the device's own peak is in the table too.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

import lora_param as lp

from .shared.claims import show
from .shared.decoder import Decoder
from .shared.environment import choose_device
from .shared.memory import memory
from .shared.plots import stacked_bars
from .shared.runs import recorded
from .shared.settings import call, check_options, option
from .shared.tables import aligned
from .shared.training import adam


@dataclass(frozen=True)
class Settings:
    """Settings of the measurement.

    Raises:
        ValueError: A value is out of range; says which, the rule and what it got.
    """

    quick: bool = option(False, "the smallest size, two rounds")
    rank: int = option(8, "rank of LoRA on all linear layers", most=128)
    batch: int = option(4, "texts in a batch")
    length: int = option(128, "tokens of a text", most=1024)
    rounds: int = option(7, "rounds, of which times are the medians", least=2)
    device: str = option("auto", "cpu, cuda, ...")
    output: str = option("runs/full_against_lora", "each run writes to a new folder in this one")

    def __post_init__(self) -> None:
        check_options(self)


SIZES = {"small": (4, 128, 4), "medium": (6, 384, 6), "large": (8, 768, 12)}
"""Layers, width and heads; with a vocabulary of 8,192."""

PARTS = ("parameters", "gradients", "optimizer", "activations")


def clock(device: torch.device, work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that work takes, and what it returns."""
    waits = device.type == "cuda"
    if waits:
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    if waits:
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


class Way:
    """One way to train one decoder, and what its steps take."""

    def __init__(self, base: nn.Module, settings: Settings, tokens: Tensor, lora: bool) -> None:
        self.model, self.tokens = copy.deepcopy(base), tokens
        if lora:
            lp.register_lora(self.model, rank=settings.rank)
        self.parameters = [each for each in self.model.parameters() if each.requires_grad]
        self.optimizer = adam(self.parameters, 1e-4, torch.optim.AdamW)
        self.seconds: dict[str, list[float]] = {"forward": [], "backward": [], "step": []}

    def loss(self) -> Tensor:
        """Return the loss of the next token."""
        logits = self.model(self.tokens[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), self.tokens[:, 1:].flatten())

    def train(self) -> None:
        """Take one step, and keep the seconds of its parts."""
        self.optimizer.zero_grad()
        device = self.tokens.device
        forward, loss = clock(device, self.loss)
        backward, _ = clock(device, loss.backward)
        step, _ = clock(device, self.optimizer.step)
        for kept, seconds in zip(self.seconds.values(), (forward, backward, step), strict=True):
            kept.append(seconds)

    def figures(self, folder: Path) -> dict[str, Any]:
        """Return the medians, the bytes and the file's size."""
        path = folder / "trained.safetensors"
        if any("lora_" in name for name, _ in self.model.named_parameters()):
            lp.save_lora(self.model, path)
        else:
            save_file(self.model.state_dict(), path)
        found: dict[str, Any] = {name: median(all_) for name, all_ in self.seconds.items()}
        found |= {"trained": sum(p.numel() for p in self.parameters), "file": path.stat().st_size}
        path.unlink()
        return found | vars(memory(self.model, self.optimizer, self.loss))


def latency(base: nn.Module, adapted: nn.Module, tokens: Tensor, rounds: int) -> dict[str, float]:
    """Time inference of the base, the adapted and the merged model, in turns."""
    seconds: dict[str, list[float]] = {"base": [], "LoRA": [], "merged": []}
    merged = copy.deepcopy(adapted)
    lp.merge_lora(merged)
    with torch.inference_mode():
        expected = adapted(tokens)
        show(torch.allclose(merged(tokens), expected, atol=1e-3), "merged, the output is the same")
        for _ in range(2 * rounds):
            for name, model in (("base", base), ("LoRA", adapted), ("merged", merged)):
                seconds[name].append(clock(tokens.device, partial(model, tokens))[0])
    return {name: median(all_) for name, all_ in seconds.items()}


def table(found: dict[str, dict[str, Any]]) -> str:
    """Lay out bytes, sizes and times."""
    peak = ["peak"] if any(each["peak"] for each in found.values()) else []
    times = ("forward", "backward", "step")
    rows = [["MB", "trained", *PARTS, *peak, "file", *(f"{name}, ms" for name in times)]]
    for name, each in found.items():
        sizes = [f"{each[part] / 1e6:.1f}" for part in (*PARTS, *peak, "file")]
        speeds = [f"{1000 * each[part]:.0f}" for part in times]
        rows.append([name, f"{each['trained']:,}", *sizes, *speeds])
    return aligned(rows)


def run(settings: Settings) -> None:
    """Measure every size both ways."""
    device = choose_device(settings.device)
    sizes = dict(list(SIZES.items())[: 1 if settings.quick else None])
    rounds = 2 if settings.quick else settings.rounds
    found: dict[str, dict[str, Any]] = {}
    delays: dict[str, dict[str, float]] = {}
    with recorded(settings, device) as record:
        for size, (layers, width, heads) in tqdm(sizes.items(), "sizes", disable=None):
            torch.manual_seed(0)
            tokens = torch.randint(8192, (settings.batch, settings.length + 1), device=device)
            with device:
                base = Decoder(layers, width, heads, 8192, 1024)
            ways = {
                f"{size}, {name}": Way(base, settings, tokens, name == "LoRA")
                for name in ("full", "LoRA")
            }
            with record.timed(size):
                for _ in range(rounds + 1):  # the first one warms up, and the median forgets it
                    for way in ways.values():
                        way.train()
                adapted = ways[f"{size}, LoRA"].model
                delays[size] = latency(base, adapted, tokens[:, :-1], rounds)
                found |= {name: way.figures(record.folder) for name, way in ways.items()}
        print("", table(found), "", "inference, times of the base's", sep="\n")
        for size, each in delays.items():
            shares = ", ".join(f"{name} {each[name] / each['base']:.2f}" for name in each)
            print(f"{size}: {shares}")
        record.results |= {"training": found, "inference": delays}
        bars = {name: {part: each[part] / 1e6 for part in PARTS} for name, each in found.items()}
        stacked_bars(bars, "MB of a training step", record.folder / "full_against_lora.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line, whose arguments are `argv`; return the exit status."""
    return call(run, Settings, argv, "experiments.full_against_lora", __doc__)


if __name__ == "__main__":
    sys.exit(main())
