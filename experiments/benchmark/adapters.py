"""What many adapters cost: eight in one batch, dozens registered, and one recompressed."""

from __future__ import annotations

import functools
import importlib.util
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import lora_param as lp
from lora_param.lowrank import recompressed, summed

from .cells import linears
from .measuring import interleave, trainer

Turn = Callable[[], object]
ROWS, TOKENS, WIDTH, RANK, EVEN = 32, 64, 1024, 16, ("0", "2", "4", "6")
NAMES = [f"n{index}" for index in range(8)]
COPIES = 5


def adapters() -> dict[str, float]:
    """Measure what many adapters cost.

    Returns:
        Ratios by what was compared.
    """
    x = torch.randn(ROWS, TOKENS, WIDTH, requires_grad=True)
    device = x.device
    one, eight = adapted(1), adapted(8)
    routed, rows = routing(eight, 8), [NAMES[row % 8] for row in range(ROWS)]
    turns: dict[str, Turn] = {"one": trainer(one, x), "eight": routed(trainer(eight, x))}
    step = interleave(turns, device, 0.0)
    what = "8 adapters in a batch of 32 x 64 at 1024, a step / one adapter's"
    found = {what: middle(step, "eight")}
    counts = {count: selected(adapted(count)) for count in (1, 8, 64)}
    turns = {str(count): trainer(model, x) for count, model in counts.items()}
    step = interleave(turns, device, 0.0)
    for count in ("8", "64"):
        found[f"{count} registered, one acting, a step / 1 registered"] = middle(step, count)
    if importlib.util.find_spec("peft"):
        model = peft(8)
        turns = {
            "peft": functools.partial(model, x.detach(), adapter_names=rows),
            "ours": routed(functools.partial(eight, x.detach())),
        }
        with torch.no_grad():
            step = interleave(turns, device, 0.0)
        found["the same in inference / PEFT's adapter_names"] = middle(step, "ours")
    found["a dense SVD's time / recompressing to rank 16 at 2048 x 2048"] = recompression()
    return found


def middle(figures: Any, name: str) -> float:
    """Return the median ratio of one contestant to the first."""
    return float(figures[name]["ratio"][1])


def adapted(count: int) -> nn.Module:
    """Stack linear layers with some adapters on each."""
    torch.manual_seed(0)
    model = linears(WIDTH)
    for index in range(count):
        lp.register_lora(model, rank=RANK, adapter=f"n{index}", target=EVEN)
    with torch.no_grad():
        for factor in lp.lora_parameters(model):
            factor.normal_(std=0.02)
    return model


def selected(model: nn.Module) -> nn.Module:
    """Let the first adapter alone act."""
    lp.select_lora(model, "n0")
    return model


def routing(model: nn.Module, count: int) -> Callable[[Turn], Turn]:
    """Make turns run with a batch's rows routed to some adapters."""
    rows = [NAMES[row % count] for row in range(ROWS)]

    def wrap(turn: Turn) -> Turn:
        def run() -> None:
            with lp.lora_routed(model, rows, dim=0):
                turn()

        return run

    return wrap


def peft(count: int) -> nn.Module:
    """Wrap the same layers with PEFT."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(EVEN), init_lora_weights=False)
    wrapped: Any = get_peft_model(linears(WIDTH), config, adapter_name=NAMES[0])
    for name in NAMES[1:count]:
        wrapped.add_adapter(name, config)
    model: nn.Module = wrapped.eval()
    return model


def recompression() -> float:
    """Compare a sum of four adapters of rank 16, recompressed, with a dense SVD of it."""
    torch.manual_seed(0)
    pairs = [(torch.randn(16, 2048), torch.randn(2048, 16), 0.5) for _ in range(4)]
    whole = summed(pairs)
    dense: Tensor = whole.B @ whole.A
    quick = median([seconds(lambda: recompressed(whole.A, whole.B, 16)) for _ in range(COPIES)])
    return seconds(lambda: torch.linalg.svd(dense, full_matrices=False)) / quick


def seconds(call: Turn) -> float:
    """Time a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
