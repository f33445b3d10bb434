"""How long the verbs themselves take: on a thousand layers, and on a model of 70 billion."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable

import torch
from torch import nn

import lora_param as lp


def verbs() -> dict[str, float]:
    """Time the verbs.

    Returns:
        Seconds by what was done.
    """
    model, large = layers(1000), llama_70b()
    block = lp.lora_merged(model)
    calls: dict[str, Callable[[], object]] = {
        "register_lora, 1000 layers": lambda: lp.register_lora(model, rank=8),
        "disable_lora": lambda: lp.disable_lora(model),
        "enable_lora": lambda: lp.enable_lora(model),
        "lora_merged, entering": block.__enter__,
        "lora_merged, leaving": lambda: block.__exit__(None, None, None),
        "remove_lora": lambda: lp.remove_lora(model),
        "register_lora, 70 billion parameters on meta": lambda: lp.register_lora(large, rank=16),
    }
    if importlib.util.find_spec("peft"):
        calls["PEFT's get_peft_model, 1000 layers"] = lambda: _peft(model)
    return {name: _seconds(call) for name, call in calls.items()}


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def layers(count: int) -> nn.Module:
    """Stack small linear layers."""
    return nn.Sequential(*[nn.Linear(64, 64) for _ in range(count)])


def _peft(model: nn.Module) -> None:
    from peft import LoraConfig, get_peft_model

    get_peft_model(model, LoraConfig(r=8, target_modules=r"\d+"))


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
        return nn.ModuleDict(
            {
                "embedding": nn.Embedding(words, width),
                "layers": nn.ModuleList(decoder),
                "head": nn.Linear(width, words, bias=False),
            }
        )
