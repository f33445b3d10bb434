"""What is measured: models with their inputs, a cell each."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Cell:
    """One model, what it is fed, and what gets an adapter.

    Attributes:
        name: What the table calls it.
        make: Builds the model.
        shape: Of the input, which is random and requires a gradient.
        rank: The adapters' rank.
        layers: Names of the adapted modules, by their ends.
        quick: Whether `--quick` keeps it.
        kind: Of adapter; ways that have no other than `"lora"` are left out.
        adapters: How many are registered; the first one acts.
        routed: Whether each row of the batch has one of them instead, in turn.
    """

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    rank: int
    layers: tuple[str, ...]
    quick: bool = False
    kind: str = "lora"
    adapters: int = 1
    routed: bool = False

    def adapted(self, model: nn.Module) -> list[str]:
        """List the adapted modules' names, `["0", "2"]`."""
        ends = tuple(f".{layer}" for layer in self.layers)
        return [name for name, _ in model.named_modules() if f".{name}".endswith(ends)]

    @property
    def names(self) -> list[str]:
        """The registered adapters' names."""
        return [f"n{index}" for index in range(self.adapters)]

    @property
    def rows(self) -> list[str]:
        """Each row's adapter, where rows are routed."""
        return [f"n{row % self.adapters}" for row in range(self.shape[0])]


class Called(nn.Module):
    """A module that is called in a way of its own: `call(module, x)`."""

    def __init__(self, module: nn.Module, call: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.module, self.call = module, call

    def forward(self, x: Tensor) -> Tensor:
        """Call it."""
        return self.call(self.module, x)


VOCABULARY = 50_000


def lookup(module: Any, x: Tensor) -> Tensor:
    """Round numbers, `[tokens]`, to words; the gradient reaches at least their embeddings."""
    y: Tensor = module[0]((x.detach().abs() * 1e4).long() % VOCABULARY)
    y = y if y.requires_grad or not torch.is_grad_enabled() else y.requires_grad_()
    result: Tensor = module[1](y)
    return result


def embedding() -> nn.Module:
    """Put a large vocabulary in front of two layers."""
    head = nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 256))
    return Called(nn.Sequential(nn.Embedding(VOCABULARY, 256), head), lookup)


def attention(width: int) -> nn.Module:
    """Let a sequence attend to itself by torch's attention."""
    attention = nn.MultiheadAttention(width, width // 64, batch_first=True)
    return Called(attention, lambda module, x: module(x, x, x, need_weights=False)[0])


def llama() -> nn.Module:
    """Build a Llama of transformers with random weights, fed with embeddings."""
    from transformers import LlamaConfig, LlamaModel

    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 688, "vocab_size": 100}
    config = LlamaConfig(**sizes, num_hidden_layers=4, num_attention_heads=4)
    return Called(LlamaModel(config), lambda module, x: module(inputs_embeds=x, use_cache=False)[0])


def linears(width: int) -> nn.Module:
    """Stack four square layers, each with a GELU."""
    return nn.Sequential(*[each for _ in range(4) for each in (nn.Linear(width, width), nn.GELU())])


def convolutions(channels: int) -> nn.Module:
    """Stack four 3 x 3 convolutions that keep the image's size, each with a ReLU."""
    pairs = [(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()) for _ in range(4)]
    return nn.Sequential(*[each for pair in pairs for each in pair])


def blocks(width: int) -> nn.Module:
    """Stack two of torch's own transformer layers."""
    sizes = width, width // 64, 4 * width
    layer = nn.TransformerEncoderLayer(*sizes, dropout=0.0, batch_first=True)
    return nn.Sequential(layer, copy.deepcopy(layer))


WIDTHS, TOKENS, RANKS = (64, 256, 1024), (1, 16, 32, 128, 1024, 4096), (8, 64)
QUICK = ((64, 32, 8), (256, 4096, 8), (1024, 1, 8), (1024, 128, 8), (1024, 128, 64))
EVEN, BLOCK = ("0", "2", "4", "6"), ("self_attn", "linear1", "linear2")
LLAMA = tuple(f"{each}_proj" for each in ("q", "k", "v", "o", "gate", "up", "down"))


def linear(width: int, tokens: int, rank: int, what: str = "", **options: Any) -> Cell:
    """Return a cell of four linear layers; `what` is said in front of its name."""
    name = f"{what}Linear {width}, {tokens} tokens, rank {rank}"
    return Cell(name, lambda: linears(width), (tokens, width), rank, EVEN, **options)


def convolution(channels: int, size: int, what: str = "", **options: Any) -> Cell:
    """Return a cell of four convolutions over eight images."""
    name = f"{what}Conv2d {channels}, {size} x {size}, rank 8"
    shape = (8, channels, size, size)
    return Cell(name, lambda: convolutions(channels), shape, 8, EVEN, **options)


def attentions(width: int, batch: int, tokens: int, quick: bool) -> list[Cell]:
    """Return a cell of torch's attention, and one of two of its transformer layers."""
    size, shape = f"{width}, {batch} x {tokens} tokens, rank 8", (batch, tokens, width)
    names = f"MultiheadAttention {size}", f"2 of TransformerEncoderLayer {size}"
    return [
        Cell(names[0], lambda: attention(width), shape, 8, ("module",)),
        Cell(names[1], lambda: blocks(width), shape, 8, BLOCK, quick),
    ]


def cells(pattern: str = "*") -> list[Cell]:
    """List the cells whose names fit a glob, that of transformers only where it is installed.

    Raises:
        ValueError: None fits.
    """
    found = [
        linear(*size, quick=size in QUICK)
        for size in ((width, count, rank) for width in WIDTHS for count in TOKENS for rank in RANKS)
    ]
    found += [
        convolution(channels, size, quick=(channels, size) == (64, 32))
        for channels in (16, 64)
        for size in (32, 64)
    ]
    name = "Embedding 50,000 x 256, 512 tokens, rank 8"
    found.append(Cell(name, embedding, (512,), 8, ("module.0",)))
    found += attentions(256, 4, 64, quick=True)
    if importlib.util.find_spec("transformers"):
        found.append(
            Cell("Llama 256, 4 layers, 2 x 64 tokens, rank 8", llama, (2, 64, 256), 8, LLAMA, True)
        )
    found += [
        linear(1024, tokens, 16, "DoRA: ", kind="dora", quick=tokens == 1024)
        for tokens in (1, 128, 1024)
    ]
    found.append(convolution(64, 32, "DoRA: ", kind="dora"))
    found += [linear(1024, 128, 16, f"{n} registered: ", adapters=n) for n in (1, 8, 64)]
    name, rows = "8 adapters routed: Linear 1024, 32 x 64 tokens, rank 16", (32, 64, 1024)
    found.append(Cell(name, lambda: linears(1024), rows, 16, EVEN, True, adapters=8, routed=True))
    if pattern != "*":  # those that are asked for by name alone
        found += attentions(768, 8, 197, quick=False)
        named = {"LoRA": "lora", "rsLoRA": "rslora", "PiSSA": "pissa", "dense": "dense"}
        found += [linear(1024, 1024, 16, f"{what}: ", kind=kind) for what, kind in named.items()]
    chosen = [cell for cell in found if fnmatch(cell.name, pattern)]
    if not chosen:
        names = "; ".join(cell.name for cell in found)
        raise ValueError(f"no cell fits {pattern!r}; quote a glob over these names: {names}")
    return chosen
