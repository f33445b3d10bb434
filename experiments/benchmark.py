"""Measure what an adapter costs, against a frozen model and against the other ways to have one.

Every figure is a multiple of the floor, which is the same model with everything frozen: forward
and backward to the input in training, forward alone in inference. All ways take turns, so that they
meet the same machine; a figure is the median over rounds of the ratio within a round.

Command: `python -m experiments.benchmark`; `--quick` for a few cells in under two minutes.
Needs: `pip install -e ".[benchmark]"` for PEFT, loralib and transformers; without them those
    columns and cells are left out.
Hardware, time: 2 cores of a shared AMD EPYC; 18 minutes, with `--quick` 63 s.
Expected: lora_param over PEFT, training: 0.92 in the geometric mean.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

import lora_param as lp

from .benchmark_cells import WAYS, Cell, cells
from .benchmark_report import draw, show
from .benchmark_verbs import verbs
from .machine import choose_device, environment, next_folder

MODES = {"cpu": ("float32",), "cuda": ("float32", "bfloat16", "compiled float32")}
ROUNDS, WARM_UP = 15, 3
TURN = 0.02  # seconds that a turn of the floor lasts at least; with --quick one step will do

Turn = Callable[[], object]
Figures = dict[str, dict[str, list[float]]]


def trainer(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer | None) -> Turn:
    """Make a training step: forward, backward to the input, and the optimizer's step if any."""
    parameters = list(model.parameters())

    def step() -> None:
        for each in (x, *parameters):
            each.grad = None
        loss(model(x)).backward()  # type: ignore[no-untyped-call]
        if optimizer is not None:
            optimizer.step()

    return step


def loss(y: Tensor) -> Tensor:
    """Sum up, which costs next to nothing, without leaving float32."""
    return y.sum(dtype=torch.float32)


def kept(model: nn.Module, x: Tensor) -> float:
    """Count the MiB that a step keeps for backward, and as gradients, beyond the parameters.

    On CUDA it is the peak of what is allocated in a step, beyond what was before it.
    """
    if x.is_cuda:
        step, before = trainer(model, x, None), torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return float(torch.cuda.max_memory_allocated() - before) / 2**20
    own = {each.untyped_storage().data_ptr() for each in (x, *model.parameters())}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage  # held, so that no other gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    gradients = sum(each.nbytes for each in model.parameters() if each.requires_grad)
    return (sum(each.nbytes() for each in storages.values()) + gradients) / 2**20


def interleave(turns: dict[str, Turn], device: torch.device, least: float) -> Figures:
    """Let all take turns; return each one's ratios to the first, and its seconds."""
    first = next(iter(turns))
    for turn in turns.values():
        for _ in range(WARM_UP):
            turn()
    once = max(seconds(turns[first], 1, device), 1e-6)
    repeats = max(1, round(least / once))
    order, shuffle = list(turns), random.Random(0).shuffle
    rounds: list[dict[str, float]] = []
    for _ in range(ROUNDS):
        shuffle(order)  # so that nobody always comes after the same
        rounds.append({name: seconds(turns[name], repeats, device) for name in order})
    return {
        name: {
            "ratio": quantiles([each[name] / each[first] for each in rounds]),
            "seconds": quantiles([each[name] for each in rounds]),
        }
        for name in turns
    }


def seconds(turn: Turn, repeats: int, device: torch.device) -> float:
    """Time a turn."""
    start = time.perf_counter()
    for _ in range(repeats):
        turn()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return (time.perf_counter() - start) / repeats


def measure(cell: Cell, mode: str, device: torch.device, least: float) -> dict[str, Any]:
    """Measure one cell in all ways.

    Args:
        cell: The cell.
        mode: A dtype's name, with `"compiled "` in front to compile each model.
        device: Where.
        least: Seconds that a turn lasts at least.

    Returns:
        Quartiles of ratios and seconds by measure and way, and the mebibytes kept by each way.
    """
    dtype = getattr(torch, mode.split()[-1])
    torch.manual_seed(0)
    plain = cell.make().to(device, dtype)
    x = torch.randn(cell.shape, device=device, dtype=dtype, requires_grad=True)
    models = {}
    for way, prepare in WAYS.items():
        try:
            models[way] = prepare(copy.deepcopy(plain), cell)
        except NotImplementedError:  # loralib has no such layer
            continue
    memory = {way: kept(model, x) for way, model in models.items()}
    run: Callable[[Any], Any] = nn.Identity()
    if "compiled" in mode:
        torch._dynamo.reset()  # each cell has graphs of its own, and there is a limit of them
        run = functools.partial(torch.compile, dynamic=False)
    result: dict[str, Any] = {"cell": cell.name, "mode": mode, "mebibytes": memory}
    result["training"] = interleave(
        {way: trainer(run(model), x, None) for way, model in models.items()}, device, least
    )
    result["training and AdamW"] = interleave(
        {way: trainer(run(model), x, adamw(model)) for way, model in models.items()},
        device,
        least,
    )
    for model in models.values():
        model.eval()
    merged = copy.deepcopy(models["lora_param"])
    contestants = {way: model for way, model in models.items() if way != "full"}  # the floor's own
    with torch.no_grad(), lp.lora_merged(merged):
        turns: dict[str, Turn] = {
            way: functools.partial(run(model), x.detach())
            for way, model in (contestants | {"merged": merged}).items()
        }
        result["inference"] = interleave(turns, device, least)
    return result


def adamw(model: nn.Module) -> torch.optim.Optimizer | None:
    """Build the optimizer of what is trainable; `None` for the floor."""
    trained = [each for each in model.parameters() if each.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-6) if trained else None


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark, print its tables, and write `benchmark.json` and a picture.

    Args:
        argv: Arguments; those of the process if `None`.
    """
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmark",
        description="Measure what LoRA costs, as multiples of the frozen model.",
    )
    parser.add_argument("--quick", action="store_true", help="a few cells, in under two minutes")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"))
    arguments = parser.parse_args(argv)
    try:
        device = choose_device(arguments.device)
    except ValueError as error:
        parser.error(str(error))
    if arguments.threads < 1:
        parser.error(f"--threads must be at least 1, got {arguments.threads}")
    torch.set_num_threads(arguments.threads)
    chosen = [cell for cell in cells() if cell.quick or not arguments.quick]
    least = 0.0 if arguments.quick else TURN
    work = [(cell, mode) for mode in MODES.get(device.type, MODES["cpu"]) for cell in chosen]
    results: list[dict[str, Any]] = []
    folder = next_folder(arguments.output)
    about = environment(device, "peft", "loralib", "transformers")
    report = {"environment": about, "cells": results, "verbs": verbs()}
    for cell, mode in tqdm(work, "cells", disable=None, unit="cell"):
        results.append(measure(cell, mode, device, least))
        # Each time, so that an interrupted run leaves what it has measured.
        (folder / "benchmark.json").write_text(json.dumps(report, indent=1))
    print(show(report))
    draw(results, folder / "benchmark.png")
    print(f"\nwritten to {folder}")


if __name__ == "__main__":
    main()
