"""How the verbs' time grows: with adapted weights, with adapters, and on a model of 70 billion."""

from __future__ import annotations

import copy
import math
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm  # type: ignore[import-untyped]

import lora_param as lp
from lora_param.lowrank import recompressed, summed

from .measuring import no_garbage

Calls = dict[str, Callable[[], object]]
Part = tuple[str, Callable[[int, Path], Calls], tuple[int, ...]]


def scale(quick: bool, clock: Callable[[], float]) -> list[dict[str, Any]]:
    """Time the verbs at growing sizes, each once, with the garbage collector held off.

    The exponent of growth is that between the two largest sizes, which `quick` makes smaller: 1
    where ten times as many take ten times as long.
    """
    found = []
    for of, part, sizes in PARTS:
        counts = sizes[:-1] if quick and len(sizes) > 1 else sizes
        runs = [_timed(part, size, clock) for size in tqdm(counts, of, disable=None)]
        for what in runs[0]:
            times, exponent = [run[what] for run in runs], None
            if len(counts) > 1:
                growth = math.log(times[-1] / times[-2]) / math.log(counts[-1] / counts[-2])
                exponent = f"{growth:.2f}"
            entry = {"of": of, "what": what, "counts": counts, "seconds": times}
            found.append(entry | {"exponent": exponent})
    return found


def _timed(part: Callable[[int, Path], Calls], size: int, clock: Any) -> dict[str, float]:
    found = {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that an adapter wasn't trained
        calls = part(size, Path(folder) / "adapter.safetensors")
        with no_garbage() as collect:
            for name, call in calls.items():
                collect()
                start = clock()
                call()
                found[name] = clock() - start
    return found


def by_weights(size: int, path: Path) -> Calls:
    """List the verbs on so many small layers; their file has twice as many tensors."""
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(size)])
    plain, block = copy.deepcopy(model), lp.lora_merged(model)
    return {
        "register_lora": lambda: lp.register_lora(model, rank=4),
        "select_lora": lambda: lp.select_lora(model, "default"),
        "disable_lora": lambda: lp.disable_lora(model),
        "enable_lora": lambda: lp.enable_lora(model),
        "fingerprint": lambda: lp.fingerprint(model),
        "lora_summary": lambda: str(lp.lora_summary(model)),
        "save_lora, 2 tensors a weight": lambda: lp.save_lora(model, path),
        "load_lora into a plain model": lambda: lp.load_lora(plain, path),
        "lora_merged, entering": block.__enter__,
        "lora_merged, leaving": lambda: block.__exit__(None, None, None),
        "merge_lora": lambda: lp.merge_lora(plain),
        "remove_lora": lambda: lp.remove_lora(model),
    }


def by_adapters(size: int, path: Path) -> Calls:
    """List the verbs with so many adapters on each of four layers, of which one acts."""
    model, x = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)]), torch.randn(16, 64)
    for index in range(1, size):
        lp.register_lora(model, rank=4, adapter=f"n{index}")
    return {
        "register_lora, the last one": lambda: lp.register_lora(model, rank=4, adapter="n0"),
        "select_lora, another one": lambda: lp.select_lora(model, "n0"),
        "the first step with it": lambda: model(x).sum().backward(),
        "a further step": lambda: model(x).sum().backward(),
        "disable_lora": lambda: lp.disable_lora(model),
        "the first inference with none": lambda: model(x),
        "fingerprint": lambda: lp.fingerprint(model),
        "lora_summary": lambda: str(lp.lora_summary(model)),
        "save_lora, one of them": lambda: lp.save_lora(model, path, adapter="n0"),
        "load_lora, one more": lambda: lp.load_lora(model, path, adapter="loaded"),
        "remove_lora, one of them": lambda: lp.remove_lora(model, "n0"),
        "remove_lora, all": lambda: lp.remove_lora(model),
    }


def on_meta(billions: int, path: Path) -> Calls:
    """List the verbs on the architecture of Llama 3, on the meta device."""
    model = llama_70b()
    return {
        "register_lora": lambda: lp.register_lora(model, rank=16),
        "lora_summary": lambda: str(lp.lora_summary(model)),
        "remove_lora": lambda: lp.remove_lora(model),
    }


def summed_up(adapters: int, path: Path) -> Calls:
    """List two ways to the best approximation of a sum of adapters by rank 16."""
    pairs = [(torch.randn(16, 2048), torch.randn(2048, 16), 0.5) for _ in range(adapters)]
    whole = summed(pairs)
    return {
        "recompressed": lambda: recompressed(whole.A, whole.B, 16),
        "a dense SVD": lambda: torch.linalg.svd(whole.B @ whole.A, full_matrices=False),
    }


def llama_70b() -> nn.Module:
    """Build the layers of a Llama 3 of 70 billion parameters on the meta device.

    Source:
        Grattafiori et al., "The Llama 3 Herd of Models", arXiv:2407.21783, table 3.
    """
    width, hidden, keys, words = 8192, 28_672, 1024, 128_256
    sizes = {"q": (width, width), "k": (width, keys), "v": (width, keys), "o": (width, width)}
    sizes |= {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    with torch.device("meta"):
        decoder = [
            nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})
            for _ in range(80)
        ]
        ends = {"embedding": nn.Embedding(words, width), "head": nn.Linear(width, words, False)}
        return nn.ModuleDict({**ends, "layers": nn.ModuleList(decoder)})


PARTS: tuple[Part, ...] = (
    ("adapted weights", by_weights, (10, 100, 1000, 10_000)),
    ("adapters on each of 4 weights", by_adapters, (1, 10, 100, 1000)),
    ("billion parameters on meta", on_meta, (70,)),
    ("adapters of rank 16 at 2048 x 2048, summed", summed_up, (4,)),
)
"""What grows, the verbs, and the sizes."""
