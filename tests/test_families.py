"""transformers' families by default: each registers with all defaults, and a fresh output is equal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lora_param import lora_parameters, register_lora

TINY: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 37, "max_position_embeddings": 64,
    "d_model": 32, "d_ff": 37, "d_kv": 8, "num_layers": 1, "num_decoder_layers": 1,
    "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 32, "head_dim": 8,
    "decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 32, "num_heads": 4,
    "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "embedding_size": 16,
    "image_size": 32, "patch_size": 8, "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0,
}  # fmt: skip
"""What the sizes are called, here and there."""

FAMILIES = [
    "albert",
    "bart",
    "bert",
    "big_bird",
    "bloom",
    "camembert",
    "deberta",
    "deberta-v2",
    "deit",
    "dinov2",
    "electra",
    "ernie",
    "esm",
    "fnet",
    "gemma",
    "gemma2",
    "gpt2",
    "gpt_bigcode",
    "gpt_neox",
    "llama",
    "longformer",
    "mamba",
    "mbart",
    "mistral",
    "mobilebert",
    "mpnet",
    "mpt",
    "mt5",
    "nystromformer",
    "opt",
    "pegasus",
    "persimmon",
    "phi",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "roberta",
    "roformer",
    "rwkv",
    "stablelm",
    "starcoder2",
    "t5",
    "vit",
    "vit_mae",
    "wav2vec2",
    "wavlm",
    "xglm",
    "xlm",
    "yoso",
]

IN_EVERY_RUN = ("bart", "bert", "gpt2", "llama", "mamba", "qwen2_moe", "t5", "vit", "wav2vec2")
"""One of each way of building; `pytest -m zoo` runs all."""


def built(family: str) -> tuple[nn.Module, dict[str, Tensor]]:
    known = transformers.AutoConfig.for_model(family)
    sizes = {name: size for name, size in TINY.items() if hasattr(known, name)}
    config = transformers.AutoConfig.for_model(family, **sizes)
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config).eval()
    # torch.matmul folds a batch or not by whether its weight requires a gradient, in other digits.
    model.requires_grad_(False)
    inputs = {
        "input_ids": lambda: torch.randint(3, 90, (2, 8)),
        "pixel_values": lambda: torch.randn(2, 3, 32, 32),
        "input_values": lambda: torch.randn(2, 4000),
    }
    given = {model.main_input_name: inputs[model.main_input_name]()}
    if config.is_encoder_decoder:
        given["decoder_input_ids"] = torch.randint(3, 90, (2, 4))
    return model, given


def outputs(model: nn.Module, given: dict[str, Tensor]) -> list[Tensor]:
    torch.manual_seed(1)  # a masked autoencoder draws what it masks
    with torch.no_grad():
        return [
            each for each in tree_leaves(tuple(model(**given).values())) if torch.is_tensor(each)
        ]


@pytest.mark.filterwarnings("ignore")  # what transformers has to say of its models
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[] if name in IN_EVERY_RUN else [pytest.mark.zoo])
        for name in FAMILIES
    ],
)
def test_a_family_registers_by_default_and_a_fresh_output_is_the_bases(family: str) -> None:
    model, given = built(family)
    before = outputs(model, given)
    assert register_lora(model)
    after = outputs(model, given)
    assert before
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    with torch.no_grad():
        for factor in lora_parameters(model):
            factor.add_(0.05)
    moved = outputs(model, given)
    assert not all(torch.equal(a, b) for a, b in zip(before, moved, strict=True))
