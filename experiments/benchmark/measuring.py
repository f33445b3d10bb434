"""Let all ways of training one cell take turns, and time each."""

from __future__ import annotations

import copy
import functools
import random
import time
from collections.abc import Callable
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor, nn

import lora_param as lp

from .cells import WAYS, Cell

ROUNDS, WARM_UP = 15, 3

Turn = Callable[[], object]
Compile = Callable[[Any], Any]
Figures = dict[str, dict[str, list[float]]]


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
    models = prepared(plain, cell)
    compiled: Compile = nn.Identity()
    if "compiled" in mode:
        torch._dynamo.reset()  # each cell has graphs of its own, and there is a limit of them
        compiled = functools.partial(torch.compile, dynamic=False)
    result: dict[str, Any] = {"cell": cell.name, "mode": mode, "kind": cell.kind}
    result["mebibytes"] = {way: kept(model, x) for way, model in models.items()}
    steps: dict[str, Turn] = {way: trainer(compiled(each), x) for way, each in models.items()}
    result["training"] = interleave(steps, device, least)
    steps = {way: trainer(compiled(each), x, adamw(each)) for way, each in models.items()}
    result["training and AdamW"] = interleave(steps, device, least)
    result["inference"] = inference(models, x, compiled, least)
    return result


def prepared(plain: nn.Module, cell: Cell) -> dict[str, nn.Module]:
    """Prepare a copy of a model in each way that has layers for it."""
    models = {}
    for way, prepare in WAYS.items():
        try:
            models[way] = prepare(copy.deepcopy(plain), cell)
        except NotImplementedError:  # loralib has no such layer
            continue
    return models


def inference(models: dict[str, nn.Module], x: Tensor, compiled: Compile, least: float) -> Figures:
    """Time inference in each way, and merged.

    Args:
        models: The models, by way; they are set to evaluation.
        x: Their input.
        compiled: Compiles a model, or returns it.
        least: Seconds that a turn lasts at least.

    Returns:
        Quartiles of ratios and seconds, by way.
    """
    for model in models.values():
        model.eval()
    merged = copy.deepcopy(models["lora_param"])
    contestants = {way: model for way, model in models.items() if way != "full"}  # the floor's own
    with torch.no_grad(), lp.lora_merged(merged):
        turns: dict[str, Turn] = {
            way: functools.partial(compiled(model), x.detach())
            for way, model in (contestants | {"merged": merged}).items()
        }
        return interleave(turns, x.device, least)


def adamw(model: nn.Module) -> torch.optim.Optimizer | None:
    """Build the optimizer of what is trainable; `None` for the floor."""
    trained = [each for each in model.parameters() if each.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-6) if trained else None


def trainer(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer | None = None) -> Turn:
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
        step, before = trainer(model, x), torch.cuda.memory_allocated()
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
