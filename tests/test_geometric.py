"""torch_geometric's own `Linear`, which is no `nn.Linear`: a row like it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lora_param import base_state_dict, lora_summary, register_lora, remove_lora

from .cases import shake

geometric = pytest.importorskip("torch_geometric.nn")


def test_it_is_adapted_by_default_and_computes_in_activation_space() -> None:
    model = nn.Sequential(geometric.Linear(6, 5), nn.Linear(5, 4))
    plain, x = copy.deepcopy(model), torch.randn(3, 6)
    assert register_lora(model, rank=2) == ["0.weight", "1.weight"]
    assert torch.equal(model(x), plain(x))
    assert [weight.space for weight in lora_summary(model).weights] == [
        "activation or weight, by cost"
    ] * 2
    shake(model)
    expected = plain[1].forward(x @ model[0].weight.mT + model[0].bias)
    expected = expected + nn.functional.linear(
        x @ model[0].weight.mT + model[0].bias, model[1].weight - plain[1].weight
    )
    torch.testing.assert_close(model(x), expected)


def test_its_state_dict_holds_each_tensor_once_and_loads_back() -> None:
    layer = geometric.Linear(6, 5)
    plain = layer.state_dict()
    register_lora(layer, rank=2)
    shake(layer)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert "weight" not in state
    layer.load_state_dict(state)
    layer.load_state_dict(plain)
    assert list(base_state_dict(layer)) == list(plain)
    remove_lora(layer)
    assert torch.equal(layer.weight, plain["weight"])


def test_one_without_a_shape_yet_is_refused() -> None:
    with pytest.raises(ValueError, match="it is lazy and has no shape yet"):
        register_lora(geometric.Linear(-1, 5))


def test_a_graph_network_is_adapted_in_all_its_layers() -> None:
    network = geometric.GATv2Conv(6, 4, heads=2)
    assert register_lora(network, rank=2) == ["lin_l.weight", "lin_r.weight"]
