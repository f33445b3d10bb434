"""Count what LoRA trains, from the paper's GPT-3 to a vision transformer, on no memory at all.

Reproduces: the headline of the LoRA paper (arXiv:2106.09685, abstract and section 4.2): of GPT-3
    175B, LoRA of rank 4 on queries and values trains 10,000 times fewer parameters, its checkpoint
    takes 35 MB in place of 350 GB, and training 350 GB in place of 1.2 TB. And the listing of
    ChatGLM-6B with `query_key_value` adapted, 3,670,016 of 6,176,956,416 parameters.
Command: `python -m experiments.parameter_counts`
Hardware, time: any; 3 s. All models are built on torch's meta device, where tensors have shapes
    and no values.
Expected: GPT-3 exactly 18,874,368 trained, 9,251 times fewer, 37.7 MB in 16 bits: the paper rounds.
    For memory the paper says what it measured, 1.2 TB; weights, gradients and Adam's two averages
    all in 16 bits are 1.40 TB, in mixed precision 2.79 TB. LoRA's 350 GB is the weights alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torchvision.models import vit_b_16  # type: ignore[import-untyped]
from tqdm import tqdm  # type: ignore[import-untyped]

import lora_param as lp

from .shared.claims import show
from .shared.decoder import Decoder
from .shared.plots import draw_shares
from .shared.runs import recorded
from .shared.settings import call, option
from .shared.tables import aligned


@dataclass(frozen=True)
class Settings:
    """Settings of the count."""

    output: str = option("runs/parameter_counts", "each run writes to a new folder in this one")


class ChatGLMLayer(nn.Module):
    """The parameters of a layer of ChatGLM-6B, by its own names."""

    def __init__(self, width: int = 4096) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(width)
        self.attention = nn.ModuleDict(
            {"query_key_value": nn.Linear(width, 3 * width), "dense": nn.Linear(width, width)}
        )
        self.post_attention_layernorm = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict(
            {
                "dense_h_to_4h": nn.Linear(width, 4 * width),
                "dense_4h_to_h": nn.Linear(4 * width, width),
            }
        )


def chatglm() -> nn.Module:
    """Build ChatGLM-6B's parameters: 28 layers, 4,096 wide, a head tied to the embedding."""
    body = {
        "word_embeddings": nn.Embedding(130_528, 4096),
        "layers": nn.ModuleList(ChatGLMLayer() for _ in range(28)),
        "final_layernorm": nn.LayerNorm(4096),
    }
    head = nn.Linear(4096, 130_528, bias=False)
    head.weight = body["word_embeddings"].weight  # type: ignore[assignment]
    return nn.ModuleDict({"transformer": nn.ModuleDict(body), "lm_head": head})


def transformer(name: str, **sizes: int) -> nn.Module:
    """Build one of transformers' models, of its default size unless told otherwise."""
    import transformers

    config = getattr(transformers, f"{name.partition('For')[0].removesuffix('Model')}Config")
    built: nn.Module = getattr(transformers, name)(config(**sizes))
    return built


def roberta(**sizes: int) -> nn.Module:
    """Build RoBERTa; base, unless sizes say otherwise."""
    vocabulary = {"vocab_size": 50_265, "max_position_embeddings": 514}
    return transformer("RobertaModel", **vocabulary, **sizes)


@dataclass(frozen=True)
class Model:
    """One line of the table: a model, what is adapted at which rank, and who says how many."""

    build: Callable[[], nn.Module]
    rank: int
    target: Any
    said: str


def q_and_v(width: int) -> list[str]:
    """Name the blocks of rows of the decoder's fused matrices that make queries and values."""
    return [f"*.qkv[0:{width}]", f"*.qkv[{2 * width}:{3 * width}]"]


def gpt3() -> nn.Module:
    """Build GPT-3 175B."""
    return Decoder(96, 12_288, 96, 50_257, 2048)


def gpt2() -> nn.Module:
    """Build GPT-2 medium."""
    return Decoder(24, 1024, 16, 50_257, 1024)


LARGE = {"num_hidden_layers": 24, "hidden_size": 1024, "intermediate_size": 4096}
LARGE |= {"num_attention_heads": 16}
LLAMA = partial(transformer, "LlamaForCausalLM")
MODELS = {
    "GPT-3 175B, q v": Model(gpt3, 4, q_and_v(12_288), "paper: 10,000 x fewer"),
    "GPT-3 175B, q v, r = 1": Model(gpt3, 1, q_and_v(12_288), "paper, table 4: 4.7 M"),
    "GPT-2 medium, q v": Model(gpt2, 4, q_and_v(1024), "paper, table 3: 0.35 M"),
    "RoBERTa base, q v": Model(roberta, 8, ["query", "value"], "paper, table 2: 0.3 M"),
    "RoBERTa large, q v": Model(
        partial(roberta, **LARGE), 8, ["query", "value"], "paper, table 2: 0.8 M"
    ),
    "ChatGLM-6B, fused q k v": Model(chatglm, 8, "query_key_value", "PEFT prints 3,670,016"),
    "Llama 7B, q v": Model(LLAMA, 8, ["q_proj", "v_proj"], ""),
    "Llama 7B, all linear, head too": Model(LLAMA, 8, None, ""),
    "ViT-B/16, all linear": Model(vit_b_16, 8, None, ""),
}


def listing(model: nn.Module) -> str:
    """List ChatGLM's parameters as they are with the adapter, the first layer for all."""
    rows = [["parameter", "shape", "trained"]]
    for name, parameter in model.named_parameters():
        if ".layers." not in name or ".layers.0." in name:
            shape = " x ".join(f"{size:,}" for size in parameter.shape)
            rows.append([name, shape, "yes" if parameter.requires_grad else ""])
    return aligned(rows)


def headline(base: int, trained: int) -> dict[str, float]:
    """Work out the paper's headline from the counts, and print it."""
    found = {
        "times fewer": base / trained,
        "checkpoint, GB": 2 * base / 1e9,
        "adapter, MB": 2 * trained / 1e6,
        "full, all in 16 bits, TB": (2 + 2 + 4) * base / 1e12,
        "full, mixed precision, TB": (2 + 2 + 12) * base / 1e12,
        "LoRA, factors in mixed precision, GB": (2 * base + 16 * trained) / 1e9,
    }
    print("\nGPT-3 175B with LoRA of rank 4 on q and v, weights in 16 bits")
    print(aligned([["", ""], *([name, f"{value:,.2f}"] for name, value in found.items())]))
    return found


def run(settings: Settings) -> None:
    """Build every model, adapt it, count."""
    counts: dict[str, tuple[int, int]] = {}
    rows = [["model", "rank", "base", "trained", "times fewer", "16-bit file", "said elsewhere"]]
    with recorded(settings, torch.device("cpu"), "transformers") as record, record.timed("all"):
        for name, row in tqdm(MODELS.items(), "models", disable=None):
            with torch.device("meta"):
                model = row.build()
                lp.register_lora(model, rank=row.rank, target=row.target)
            summary = lp.lora_summary(model)
            base, trained = counts[name] = summary.base_parameters, summary.lora_parameters
            file = f"{2 * trained / 1e6:.2f} MB"
            fewer = f"{base / trained:,.0f}"
            rows.append([name, str(row.rank), f"{base:,}", f"{trained:,}", fewer, file, row.said])
            if name.startswith("ChatGLM"):
                print("\nChatGLM-6B, the first of 28 layers", listing(model), sep="\n")
        print("", aligned(rows), sep="\n")
        record.results |= {"counts": counts, "GPT-3": headline(*counts["GPT-3 175B, q v"])}
        show(counts["ChatGLM-6B, fused q k v"][1] == 3_670_016, "ChatGLM's count is PEFT's")
        show(counts["GPT-3 175B, q v"][1] == 96 * 2 * 4 * 2 * 12_288, "GPT-3's is 96 * 2 * r * 2 d")
        caption = "parameters: trained by LoRA (black) and of the base (white)"
        draw_shares(counts, caption, record.folder / "parameter_counts.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line, whose arguments are `argv`; return the exit status."""
    return call(run, Settings, argv, "experiments.parameter_counts", __doc__)


if __name__ == "__main__":
    sys.exit(main())
