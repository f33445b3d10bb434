"""Let all ways of training one cell take turns, and time each."""

from __future__ import annotations

import copy
import functools
import gc
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor, nn

import lora_param as lp

from ..shared.memory import memory
from .cells import Cell
from .ways import OTHERS, prepared

Turn = Callable[[], object]
Figures = dict[str, dict[str, list[float]]]

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""Processor time is that of all threads; other processes on the machine matter less to it."""


@dataclass(frozen=True)
class Effort:
    """How carefully to measure."""

    turn: float = 0.02  # seconds that a turn lasts; a step is repeated until then
    budget: float = 4.0  # seconds for all rounds of one measure
    least: int = 7  # rounds, whatever they take
    most: int = 31  # rounds
    clock: str = "wall"


def measure(cell: Cell, mode: str, device: torch.device, effort: Effort) -> dict[str, Any]:
    """Measure one cell in all ways.

    Args:
        cell: The cell.
        mode: A dtype's name, with `"compiled "` in front to compile each model.
        device: Where.
        effort: How carefully.

    Returns:
        Quartiles by measure and way, the mebibytes that each way keeps, and as `idle` those whose
        adapter doesn't act in inference, which are left out there.
    """
    dtype = getattr(torch, mode.split()[-1])
    torch.manual_seed(0)
    plain = cell.make().to(device, dtype)
    x = torch.randn(cell.shape, device=device, dtype=dtype, requires_grad=True)
    models = prepared(plain, cell)
    compiled: Callable[[Any], Any] = nn.Identity()
    if "compiled" in mode:
        torch._dynamo.reset()  # each cell has graphs of its own, two for each way
        torch._dynamo.config.cache_size_limit = 64  # beyond 8 of them the rest would run eager
        compiled = functools.partial(torch.compile, dynamic=False)
    steps: dict[str, Turn] = {}
    for way, model in models.items():
        with suppress(NotImplementedError):  # PEFT has no routed rows in training
            steps[way] = trainer(compiled(model), x)
    result: dict[str, Any] = {"cell": cell.name, "mode": mode, "shape": cell.shape}
    result["mebibytes"] = {way: kept(models[way], x) for way in steps}
    result["training"] = interleave(steps, device, effort)
    steps = {}
    del models["full"]  # in inference it is the floor
    with torch.no_grad():
        idle = [way for way in OTHERS if way in models and not _acts(models[way].eval(), x)]
        models = {way: model for way, model in models.items() if way not in idle}
        merged = copy.deepcopy(models["lora_param"].eval())
        with lp.lora_merged(merged):
            models |= {} if cell.routed else {"merged": merged}
            for way, model in models.items():
                steps[way] = functools.partial(compiled(model.eval()), x.detach())
            result |= {"idle": idle, "inference": interleave(steps, device, effort)}
    return result


def trainer(model: nn.Module, x: Tensor) -> Turn:
    """Make a training step: forward, and backward to the input and what is trained.

    The output's gradient is a dense tensor at random, as a loss would send it, but costs nothing.
    """
    trained, gradient = _trained(model, x), torch.randn_like(model(x))

    def step() -> None:
        for each in trained:
            each.grad = None
        model(x).backward(gradient)

    return step


def kept(model: nn.Module, x: Tensor) -> float:
    """Count the MiB that a step keeps for backward, and as gradients, beyond the parameters.

    On CUDA it is the peak of what is allocated in a step, beyond what was before it.
    """
    before = torch.cuda.memory_allocated() if x.is_cuda else 0
    optimizer = torch.optim.SGD(_trained(model, x), lr=0.0)
    held = memory(model, optimizer, lambda: model(x).sum())
    size = held.activations + held.gradients if held.peak is None else held.peak - before
    return size / 2**20


def interleave(turns: dict[str, Turn], device: torch.device, effort: Effort) -> Figures:
    """Let all take turns, in a new order each round, so that they meet the same machine.

    Returns:
        For each one quartiles over the rounds: its seconds, their ratio to the first one's, and
        lora_param's ratio to it, within a round.
    """
    clock, base, order = CLOCKS[effort.clock], next(iter(turns)), list(turns)
    repeats = {name: _warmed_up(turn, device, effort.turn, clock) for name, turn in turns.items()}
    rounds: list[dict[str, float]] = []
    shuffle, start = random.Random(0).shuffle, time.perf_counter()
    with no_garbage() as collect:
        while len(rounds) < effort.least or (
            len(rounds) < effort.most and time.perf_counter() - start < effort.budget
        ):
            shuffle(order)
            collect()
            times = {name: seconds(turns[name], repeats[name], device, clock) for name in order}
            rounds.append(times)
    return {
        name: {
            "seconds": quantiles([each[name] for each in rounds]),
            "ratio": quantiles([each[name] / each[base] for each in rounds]),
            "ours": quantiles([each["lora_param"] / each[name] for each in rounds]),
        }
        for name in turns
    }


def seconds(turn: Turn, repeats: int, device: torch.device, clock: Callable[[], float]) -> float:
    """Time a turn."""
    start = clock()
    for _ in range(repeats):
        turn()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return (clock() - start) / repeats


def _warmed_up(turn: Turn, device: torch.device, least: float, clock: Callable[[], float]) -> int:
    """Run until code is compiled and caches are warm, and say how many steps make a turn."""
    turn()
    once = max(min(seconds(turn, 1, device, clock) for _ in range(2)), 1e-6)
    repeats = max(1, round(least / once))
    seconds(turn, repeats, device, clock)
    return repeats


@contextmanager
def no_garbage() -> Iterator[Callable[[], object]]:
    """Keep the garbage collector from running in somebody's turn; yield what runs it quickly."""
    gc.collect()
    gc.freeze()  # so that a collection looks only at what was made since
    gc.disable()
    try:
        yield gc.collect
    finally:
        gc.enable()
        gc.unfreeze()


def _trained(model: nn.Module, x: Tensor) -> list[Tensor]:
    return [x, *(each for each in model.parameters() if each.requires_grad)]


def _acts(model: nn.Module, x: Tensor) -> bool:
    """Say whether a model's output depends on what is trained in it."""
    y, (_, *trained) = model(x), _trained(model, x)
    torch._foreach_mul_(trained, 2.0)
    other = model(x)
    torch._foreach_mul_(trained, 0.5)
    return not torch.equal(y, other)
