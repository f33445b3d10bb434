"""Compute what fine-tuning a model of 70 or 405 billion parameters needs on each GPU.

Reproduces: nothing; sums of bytes, of models that are built and adapted on the meta device.
Command: `python -m experiments.memory_per_gpu`
Hardware, time: one CPU core, under a minute; no weight is ever allocated.
Assumes: every Linear adapted, `fully_shard` on each block and on the rest, so that two blocks are
    whole at a time (one computes, one is on its way); a base in bfloat16, or its blocks in 4 bits
    with a bfloat16 scale per 64 weights, whole blocks in bfloat16; factors, their gradients and
    Adam's two averages in float32; activations in bfloat16, of which checkpointing keeps each
    block's input; one sequence a GPU, whose logits in float32 are there with their gradient.
    Not counted: the CUDA context, the allocator's gaps, workspaces.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

import lora_param as lp

GPUS = (8, 64, 512)
GIB = 2**30
SIZES: dict[str, dict[str, Any]] = {
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80},
    "405B": {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126},
}
HEADS = {"70B": 64, "405B": 128}
"""Llama 3's configurations, of Dubey et al., arXiv:2407.21783, table 3."""


@dataclass(frozen=True)
class Counts:
    """What the sums need to know of a model: numbers of elements, and sizes."""

    base: int
    blocks: int  # elements of the base within the blocks
    factors: int
    largest_block: int  # elements, its factors too
    layers: int
    hidden: int
    inner: int
    vocabulary: int


@dataclass(frozen=True)
class Need:
    """Bytes on one GPU, and bytes that it receives in one step."""

    weights: float
    adapters: float  # factors, gradients, Adam's averages
    gathered: float
    activations: float
    traffic: float

    @property
    def total(self) -> float:
        """All that is there at once."""
        return self.weights + self.adapters + self.gathered + self.activations


def llama(name: str) -> nn.Module:
    """Build a model on the meta device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads: dict[str, Any] = {"num_attention_heads": HEADS[name], "num_key_value_heads": 8}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(vocab_size=128256, **SIZES[name], **heads))


def counts(model: nn.Module, rank: int) -> Counts:
    """Adapt every Linear of a causal language model's blocks, and count."""
    lp.register_lora(model, rank=rank, target="layers.*")
    summary, llama = lp.lora_summary(model), cast("Any", model)
    config = llama.config
    blocks = [sum(p.numel() for p in block.parameters()) for block in llama.model.layers]
    return Counts(
        summary.base_parameters,
        sum(blocks) - summary.lora_parameters,
        summary.lora_parameters,
        max(blocks),
        *(len(blocks), config.hidden_size, config.intermediate_size, config.vocab_size),
    )


def need(counts: Counts, gpus: int, tokens: int, four_bit: bool) -> Need:
    """Sum the bytes of one GPU of so many, with a sequence of so many tokens on each."""
    packed = (0.5 + 2 / 64) if four_bit else 2.0
    weights = counts.blocks * packed + (counts.base - counts.blocks) * 2.0
    kept = counts.layers * tokens * counts.hidden * 2
    inside = tokens * (8 * counts.hidden + 3 * counts.inner) * 2  # of the block at work
    logits = 2 * tokens * counts.vocabulary * 4
    away = (gpus - 1) / gpus
    return Need(
        weights / gpus,
        counts.factors * 16 / gpus,
        2 * counts.largest_block * 2.0 + (counts.base - counts.blocks) * 2.0,
        kept + inside + logits,
        # Weights and factors are gathered in forward and backward, gradients are reduced once.
        away * (2 * (weights + counts.factors * 4) + counts.factors * 4),
    )


def rows(name: str, counts: Counts, tokens: int) -> list[str]:
    """Return the lines of a table in Markdown, in GiB."""
    lines = []
    for base, four_bit in (("bfloat16", False), ("4 bits", True)):
        for gpus in GPUS:
            found = need(counts, gpus, tokens, four_bit)
            parts = (found.weights, found.adapters, found.gathered, found.activations)
            cells = [f"{part / GIB:.1f}" for part in (*parts, found.total, found.traffic)]
            lines.append(f"| {name} | {base} | {gpus} | {' | '.join(cells)} |")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    rank, tokens = 16, 4096
    titles = ["model", "base", "GPUs", "weights", "adapter, gradients, Adam", "gathered"]
    titles += ["activations", "GiB per GPU", "GiB received a step"]
    print(f"rank {rank}, {tokens} tokens per GPU")
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for name in SIZES:
        print("\n".join(rows(name, counts(llama(name), rank), tokens)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
