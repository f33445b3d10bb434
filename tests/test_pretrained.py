"""Registering where transformers and diffusers build a model, before its weights are there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, modeling_utils

from lora_param import LoRAError, lora_parameters, register_lora

CONFIG = LlamaConfig(
    vocab_size=20,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
)


class Adapted(LlamaForCausalLM):
    """Adapts itself as soon as it is built."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        register_lora(self, rank=2, target="q_proj")


def test_registering_in_a_model_that_from_pretrained_builds_is_refused(tmp_path: Path) -> None:
    LlamaForCausalLM(CONFIG).save_pretrained(tmp_path)
    with pytest.raises(LoRAError, match=r"can't be called in from_pretrained: transformers would"):
        Adapted.from_pretrained(tmp_path, low_cpu_mem_usage=True)


def test_the_way_round_gives_the_base_that_was_saved(tmp_path: Path) -> None:
    base = LlamaForCausalLM(CONFIG).eval()
    base.save_pretrained(tmp_path)
    model, x = LlamaForCausalLM.from_pretrained(tmp_path), torch.arange(6)[None]
    register_lora(model, rank=2, target="q_proj")
    assert torch.equal(model(x).logits, base(x).logits)


def test_factors_are_drawn_where_transformers_switches_drawing_off() -> None:
    try:
        from transformers.initialization import no_init_weights
    except ImportError:  # before transformers 5
        no_init_weights = modeling_utils.no_init_weights
    with no_init_weights():
        model = Adapted(CONFIG)
    A, B = lora_parameters(model)
    assert 0 < A.abs().max() <= 8**-0.5
    assert not B.any()


def test_a_model_on_meta_is_adapted_elsewhere_as_ever() -> None:
    with torch.device("meta"):
        assert register_lora(nn.Linear(6, 5), rank=2) == ["weight"]
