"""A training step of a decoder of a billion parameters: LoRA against full fine-tuning.

The paper has the memory of training GPT-3 fall from 1.2 TB to 350 GB, to less than a third.
"""

from __future__ import annotations

from statistics import median
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm  # type: ignore[import-untyped]

from ..shared.decoder import Decoder
from ..shared.memory import memory
from ..shared.training import adam
from .cells import Cell
from .measuring import CLOCKS, seconds
from .ways import WAYS

SIZE = (18, 2048, 16, 50_257, 1024)
"""Layers, width, heads, vocabulary, length: 1.01 billion parameters."""

BATCH, RANK, STEPS = 4, 8, 10
LAYERS = ("qkv", "out", "up", "down")


def decoder(device: torch.device, modes: tuple[str, ...]) -> list[dict[str, Any]]:
    """Train a decoder of random weights for some steps, on its own in each mode and way.

    Returns:
        For each the seconds of a step with AdamW, and the bytes: the device's peak on CUDA, and
        elsewhere what a step holds, counted.
    """
    cell = Cell("decoder", lambda: Decoder(*SIZE), (BATCH, SIZE[-1]), RANK, LAYERS)
    work = [(mode, way) for mode in modes for way in ("full", "lora_param", "peft") if way in WAYS]
    return [_measured(cell, m, way, device) for m, way in tqdm(work, "decoder", disable=None)]


def _measured(cell: Cell, mode: str, way: str, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    with device:
        plain = cell.make().to(getattr(torch, mode.split()[-1]))
        tokens = torch.randint(SIZE[3], cell.shape)
    count = sum(each.numel() for each in plain.parameters())
    model = WAYS[way](plain, cell)
    optimizer = adam((p for p in model.parameters() if p.requires_grad), 1e-5, torch.optim.AdamW)
    run: Any = torch.compile(model) if "compiled" in mode else model

    def loss() -> torch.Tensor:
        logits = run(tokens)[:, :-1].flatten(0, 1).float()
        return cross_entropy(logits, tokens[:, 1:].flatten())

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    for _ in range(2):  # compiles, and makes the optimizer's state
        step()
    held = memory(model, optimizer, loss)
    times = [seconds(step, 1, device, CLOCKS["wall"]) for _ in range(STEPS)]
    size = held.total if held.peak is None else held.peak
    found = {"mode": mode, "way": way, "parameters": count}
    return found | {"seconds": median(times), "bytes": size}
