"""The dense kind: any tensor of one dimension or more, trained whole, the original left alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lora_param import (
    LoRAError,
    TargetError,
    assert_frozen,
    disable_lora,
    fingerprint,
    load_lora_state_dict,
    lora_parameters,
    lora_state_dict,
    lora_summary,
    merge_lora,
    register_lora,
    remove_lora,
)

from .cases import shake


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Conv1d(5, 4, 1), nn.Linear(3, 2))


def test_vectors_can_be_adapted() -> None:
    model = net()
    names = register_lora(model, kind="dense", target=["*.bias", "1"])
    assert names == ["0.bias", "1.weight", "1.bias", "2.bias", "3.bias"]
    shake(model)
    for name in names:
        module, tensor = model.get_submodule(name[0]), name[2:]
        chain = module.parametrizations[tensor]
        assert torch.equal(getattr(module, tensor), chain.original + chain[0].D)


def test_training_biases_alone_moves_no_original() -> None:
    model, x = net(), torch.randn(2, 5, 6)
    before = fingerprint(model)
    register_lora(model, kind="dense", target="0.bias")
    optimizer = torch.optim.SGD(lora_parameters(model), lr=0.1)
    model[0](x).square().sum().backward()
    optimizer.step()
    assert_frozen(model, before)
    assert not torch.equal(model[0].bias, model[0].parametrizations.bias.original)
    remove_lora(model)
    assert fingerprint(model) == before
    assert list(model[0]._parameters) == ["weight", "bias"]


def test_weight_decay_decays_to_the_base() -> None:
    layer = nn.Linear(6, 5)
    register_lora(layer, kind="dense")
    shake(layer)
    optimizer = torch.optim.SGD(lora_parameters(layer), lr=1.0, weight_decay=1.0)
    for factor in lora_parameters(layer):
        factor.grad = torch.zeros_like(factor)
    optimizer.step()
    assert torch.equal(layer.weight, layer.parametrizations.weight.original)


@pytest.mark.parametrize("order", [("dense", "lora"), ("lora", "dense")])
def test_a_dense_and_a_low_rank_update_of_one_weight_add_up(order: tuple[str, str]) -> None:
    layer, x = nn.Linear(6, 5).double(), torch.randn(3, 6).double()
    plain = copy.deepcopy(layer)
    for kind in order:
        register_lora(layer, kind=kind, adapter=kind, **{"rank": 2} if kind == "lora" else {})
    shake(layer)
    lora = layer.parametrizations.weight[order.index("lora")]
    dense = layer.parametrizations.weight[order.index("dense")]
    weight = plain.weight + dense.D + lora.lora_B @ lora.lora_A * lora.scale
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, plain.bias))
    assert [each.kind for each in lora_summary(layer).weights[0].adapters] == list(order)


def test_options_of_other_kinds_are_refused() -> None:
    for options in ({"rank": 2}, {"alpha": 3.0}, {"dropout": 0.1}, {"init": "gaussian"}):
        with pytest.raises(LoRAError, match=f"a dense delta takes no {min(options)}, got"):
            register_lora(nn.Linear(6, 5), kind="dense", **options)
    with pytest.raises(
        LoRAError, match=r"kind must be one of \['dense', 'dora', 'lora'\], got 'sparse'"
    ):
        register_lora(nn.Linear(6, 5), kind="sparse")


def test_a_pair_still_needs_two_dimensions() -> None:
    with pytest.raises(TargetError, match="needs a tensor of two or more dimensions"):
        register_lora(net(), target="bias")


def test_its_dtype_can_be_wider_than_the_weights() -> None:
    layer = nn.Linear(6, 5).bfloat16()
    register_lora(layer, kind="dense", dtype=torch.float32)
    shake(layer)
    entry = layer.parametrizations.weight[0]
    expected = (layer.parametrizations.weight.original.float() + entry.D).bfloat16()
    assert entry.D.dtype == torch.float32
    assert torch.equal(layer.weight, expected)


def test_its_state_round_trips_and_another_kinds_is_refused() -> None:
    source, model, pair = (nn.Linear(6, 5) for _ in range(3))
    register_lora(source, kind="dense")
    register_lora(model, kind="dense")
    register_lora(pair, rank=1)
    shake(source)
    load_lora_state_dict(model, lora_state_dict(source))
    assert torch.equal(*(layer.parametrizations.weight[0].D for layer in (source, model)))
    state = {**lora_state_dict(source)}
    state["weight.default._extra_state"] = lora_state_dict(pair)["weight.default._extra_state"]
    with pytest.raises(LoRAError, match=r"_extra_state: its kind must be 'dense', got 'lora'"):
        load_lora_state_dict(model, state)


def test_merging_folds_a_bias_in() -> None:
    layer, x = nn.Linear(6, 5), torch.randn(3, 6)
    register_lora(layer, kind="dense", target="*")
    shake(layer)
    before = layer(x)
    merge_lora(layer)
    assert type(layer) is nn.Linear
    torch.testing.assert_close(layer(x), before)


def test_the_summary_shows_no_rank() -> None:
    layer = nn.Linear(6, 5)
    register_lora(layer, kind="dense", target="bias")
    summary = lora_summary(layer)
    assert (summary.lora_parameters, summary.weights[0].adapters[0].rank) == (5, None)
    assert "bias    5      weight  default  dense     -      -  on              5" in str(summary)


def test_one_that_is_off_leaves_a_pair_in_activation_space() -> None:
    layer, x = nn.Linear(6, 5), torch.randn(3, 6)
    register_lora(layer, rank=2, adapter="pair")
    register_lora(layer, kind="dense", adapter="whole")
    shake(layer)
    assert lora_summary(layer).weights[0].space == "weight"
    disable_lora(layer, "whole")
    assert lora_summary(layer).weights[0].space == "activation or weight, by cost"
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_one_beside_an_adapter_with_dropout_is_refused() -> None:
    layer = nn.Linear(6, 5)
    register_lora(layer, rank=1, dropout=0.5)
    with pytest.raises(TargetError, match="weight: adapter 'default' drops entries of the input"):
        register_lora(layer, kind="dense", target="weight", adapter="whole")
    assert register_lora(layer, kind="dense", target="bias", adapter="whole") == ["bias"]


def test_an_option_of_another_kind_can_be_of_any_type() -> None:
    with pytest.raises(LoRAError, match="a dense delta takes no rank, got tensor"):
        register_lora(nn.Linear(6, 5), kind="dense", rank=torch.tensor([1, 2]))
