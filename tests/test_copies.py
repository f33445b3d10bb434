"""Copies and pickles of adapted modules: independent, complete, whatever made them."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import pickle
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from lora_param import (
    disable_lora,
    enable_lora,
    lora_parameters,
    register_lora,
    remove_lora,
)

from .cases import adapted, outputs, shake


def test_registering_on_a_further_tensor_of_a_copy_leaves_the_first() -> None:
    layer = adapted(nn.Linear(6, 5))
    twin, x = copy.deepcopy(layer), torch.ones(1, 6)
    expected = layer(x)
    parametrize.register_parametrization(twin, "bias", nn.Tanh())
    assert torch.equal(twin.bias, layer.bias.tanh())
    assert torch.equal(layer(x), expected)


def test_copies_share_no_cache() -> None:
    layer = adapted(nn.Linear(6, 5))
    twin = copy.deepcopy(layer)
    shake(twin)
    with parametrize.cached():
        assert layer.weight is layer.weight
        assert not torch.equal(layer.weight, twin.weight)


def test_a_copy_does_not_keep_its_original_alive() -> None:
    layer = adapted(nn.Linear(6, 5))
    twin, original = copy.deepcopy(layer), weakref.ref(layer)
    del layer
    gc.collect()
    assert original() is None
    twin(torch.ones(1, 6))


def test_an_encoder_built_from_an_adapted_layer_has_independent_layers() -> None:
    layer = adapted(nn.TransformerEncoderLayer(8, 2, 12))
    encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    x = torch.randn(5, 2, 8)
    outputs = [each(x) for each in encoder.layers]
    remove_lora(encoder.layers[2])
    shake(encoder.layers[1])
    assert type(encoder.layers[2].linear1) is nn.Linear
    assert torch.equal(encoder.layers[0](x), outputs[0])
    assert not torch.equal(encoder.layers[1](x), outputs[1])


def test_an_averaged_model_follows_and_stays_apart() -> None:
    model = adapted(nn.Linear(6, 5))
    average = torch.optim.swa_utils.AveragedModel(model)
    first = average.module.weight.clone()
    average.update_parameters(model)
    shake(model)
    average.update_parameters(model)
    after = average.module.weight.clone()
    assert not torch.equal(after, first)
    remove_lora(model)
    assert torch.equal(average.module.weight, after)


def test_an_lstm_can_be_copied_after_a_forward_with_gradients() -> None:
    lstm, x = adapted(nn.LSTM(4, 5)), torch.randn(3, 2, 4)
    expected = lstm(x)[0]
    twin = copy.deepcopy(lstm)
    assert torch.equal(twin(x)[0], expected)
    shake(twin)
    assert not torch.equal(twin(x)[0], expected)
    assert torch.equal(lstm(x)[0], expected)


def test_pickle_keeps_factors_state_and_frozen_flags() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5))
    adapted(model, adapter="a")
    model[0].parametrizations.weight[0].enabled = False
    loaded = pickle.loads(pickle.dumps(model))
    assert not loaded[0].parametrizations.weight[0].enabled
    assert [p.requires_grad for p in loaded.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]
    remove_lora(loaded)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert [name for name, _ in loaded.named_parameters()][:2] == ["0.weight", "0.bias"]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_pickle_protocol_works(protocol: int) -> None:
    layer = adapted(nn.Linear(6, 5))
    assert torch.equal(pickle.loads(pickle.dumps(layer, protocol)).weight, layer.weight)


def test_a_shallow_copy_reads_the_same_weight() -> None:
    layer = adapted(nn.Linear(6, 5))
    assert torch.equal(copy.copy(layer).weight, layer.weight)


def _total(layer: nn.Module, result: Any) -> None:
    result.put(float(layer.weight.sum()))


@pytest.mark.slow
def test_a_spawned_process_takes_an_adapted_model() -> None:
    layer = adapted(nn.Linear(6, 5))
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    context = multiprocessing.get_context("spawn")
    result = context.Queue()
    process = context.Process(target=_total, args=(layer, result))
    process.start()
    assert result.get(timeout=120) == pytest.approx(float(layer.weight.sum()), abs=1e-5)
    process.join()


def test_a_class_that_pickles_itself_is_refused_while_adapted() -> None:
    with pytest.raises(pickle.PicklingError, match="pickles itself in a way of its own"):
        pickle.dumps(adapted(OwnPickle(6, 5)))


class OwnPickle(nn.Linear):
    def __reduce__(self) -> tuple[Any, ...]:
        return OwnPickle, (self.in_features, self.out_features)


def test_a_copy_of_a_foreign_parametrized_layer_is_independent() -> None:
    layer = parametrizations.weight_norm(nn.Linear(6, 5))
    adapted(layer)
    twin, expected = copy.deepcopy(layer), layer.weight.clone()
    remove_lora(twin)
    parametrize.remove_parametrizations(twin, "weight")
    assert type(twin) is nn.Linear
    assert torch.equal(layer.weight, expected)


class Counted(nn.Linear):
    """Can't be made without its arguments."""

    def __new__(cls, width: int, height: int) -> Any:
        return super().__new__(cls)

    def __getnewargs__(self) -> tuple[int, int]:
        return self.in_features, self.out_features


def test_a_class_that_is_made_with_arguments_can_be_copied() -> None:
    layer = adapted(Counted(6, 5))
    assert torch.equal(copy.deepcopy(layer).weight, layer.weight)


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def test_a_layer_that_torch_parametrized_first_can_be_pickled_once_adapted() -> None:
    layer = parametrize.register_parametrization(nn.Linear(6, 5), "weight", Halved())
    adapted(layer)
    loaded = pickle.loads(pickle.dumps(layer))
    assert torch.equal(loaded.weight, layer.weight)
    remove_lora(loaded)
    assert torch.equal(loaded.weight, layer.parametrizations.weight.original / 2)


def test_a_shallow_copy_reads_the_plain_weight_when_its_twin_has_lost_the_adapter() -> None:
    layer, x = adapted(nn.Linear(6, 5)), torch.randn(3, 6)
    twin = copy.copy(layer)
    remove_lora(layer)
    torch.testing.assert_close(twin(x), layer(x))


def broadcast_here(monkeypatch: pytest.MonkeyPatch) -> None:
    replicating = sys.modules["torch.nn.parallel.replicate"]

    def broadcast(given: Any, devices: list[int], detach: bool = False) -> list[list[Tensor]]:
        return [[each.clone() for each in given] for _ in devices]

    monkeypatch.setattr(replicating, "_broadcast_coalesced_reshape", broadcast)
    monkeypatch.setattr(replicating, "_get_device_index", lambda device, *_: device)


@pytest.mark.parametrize(
    ("kind", "shape"), [(nn.Linear, (3, 6)), (nn.LSTM, (3, 6)), (nn.BatchNorm1d, (3, 6))]
)
def test_data_parallels_replicas_compute_the_same_and_reach_the_adapters(
    kind: Any, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = kind(6) if kind is nn.BatchNorm1d else kind(6, 5)
    register_lora(layer, target=(), train="*")
    shake(layer)
    broadcast_here(monkeypatch)
    x = torch.randn(shape)
    expected = outputs(copy.deepcopy(layer), (x,))
    replica = nn.parallel.replicate(layer, [0, 1])[1]
    got = outputs(replica, (x,))
    assert all(map(torch.equal, got, expected))
    got[0].square().sum().backward()
    assert all(factor.grad is not None for factor in lora_parameters(layer))


def test_a_pickle_that_notes_no_switch_beside_its_places_comes_back_as_switched() -> None:
    layer = adapted(nn.Linear(6, 5))
    delta: Any = layer.parametrizations.weight[0]
    delta.strength, delta.enabled = 0.5, False
    del delta.__dict__["_switch"]
    twin: Any = pickle.loads(pickle.dumps(layer))
    assert torch.equal(twin.weight, twin.parametrizations.weight.original)
    assert twin.parametrizations.weight[0].strength == 0.5


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(
    "copied",
    [
        lambda layer: nn.parallel.replicate(layer, [0, 1]),
        lambda layer: copy.copy(layer.parametrizations.weight),
    ],
)
def test_what_is_switched_on_acts_again_whatever_has_copied_its_chain(
    copied: Callable[[nn.Module], Any], kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = nn.Linear(6, 5), torch.randn(3, 6)
    for adapter in ("one", "two"):
        register_lora(layer, target=(), train="weight", adapter=adapter)
    shake(layer)
    expected = layer(x)
    disable_lora(layer)
    broadcast_here(monkeypatch)
    copies = copied(layer)
    if not kept:
        del copies
        gc.collect()
    enable_lora(layer)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_stays_frozen_until_its_own_last_adapter_goes(
    copied: Callable[[nn.Module], nn.Module],
) -> None:
    layer = nn.Linear(3, 2)
    for name in ("a", "b"):
        register_lora(layer, rank=1, adapter=name)
    twin = copied(layer)
    remove_lora(layer)
    remove_lora(twin, "a")
    assert not twin.bias.requires_grad
    remove_lora(twin)
    assert twin.bias.requires_grad
