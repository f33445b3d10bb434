"""The sums of bytes per GPU, against a model small enough to count by hand."""

from __future__ import annotations

import pytest
import torch

from experiments.memory_per_gpu import Counts, counts, need

pytest.importorskip("transformers")


def small() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))


def found() -> Counts:
    return counts(small(), rank=2)


def test_the_counts_are_those_of_the_model() -> None:
    model = small()
    own = found()
    assert own.base == sum(each.numel() for each in model.parameters())
    assert own.blocks == sum(each.numel() for each in model.model.layers.parameters())
    sides = [
        sum(each.weight.shape)
        for each in model.model.layers.modules()
        if isinstance(each, torch.nn.Linear)
    ]
    assert own.factors == 2 * sum(sides)
    assert (own.layers, own.hidden, own.inner, own.vocabulary) == (2, 16, 24, 32)


def test_what_is_sharded_is_divided_and_what_is_not_stays() -> None:
    one, four = need(found(), 1, 8, False), need(found(), 4, 8, False)
    assert one.weights == 2 * found().base == 4 * four.weights
    assert one.adapters == 16 * found().factors == 4 * four.adapters
    assert (one.gathered, one.activations) == (four.gathered, four.activations)
    assert one.traffic == 0 < four.traffic


def test_four_bits_are_less_and_compute_as_much() -> None:
    plain, packed = need(found(), 4, 8, False), need(found(), 4, 8, True)
    assert packed.weights < plain.weights
    assert packed.traffic < plain.traffic
    assert packed.adapters == plain.adapters
