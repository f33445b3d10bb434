"""Law 8: parametrizations that others registered, in front of a delta or behind it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from lora_param import (
    FileError,
    LoRAParametrization,
    load_lora,
    merge_lora,
    register_lora,
    remove_lora,
    save_lora,
)

from .cases import describe, shake

FOREIGN = {
    "weight_norm": lambda layer: parametrizations.weight_norm(layer),
    "spectral_norm": lambda layer: parametrizations.spectral_norm(layer),
    "orthogonal": lambda layer: parametrizations.orthogonal(layer),
    "its own": lambda layer: parametrize.register_parametrization(layer, "weight", Halved()),
}


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight * 2


@pytest.mark.parametrize("foreign", FOREIGN)
@pytest.mark.parametrize("training", [True, False])
def test_a_foreign_parametrization_survives_register_and_remove(foreign, training) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 5).train(training)
    FOREIGN[foreign](layer)
    state = copy.deepcopy(layer.state_dict())
    before = describe(layer)
    register_lora(layer, rank=2)
    shake(layer)
    remove_lora(layer)
    assert describe(layer) == before
    for name, value in layer.state_dict().items():
        assert torch.equal(value, state[name])


@pytest.mark.parametrize("foreign", FOREIGN)
def test_the_update_is_added_to_what_a_foreign_parametrization_gives(foreign) -> None:
    layer = nn.Linear(6, 5).eval()
    FOREIGN[foreign](layer)
    weight = layer.weight.detach().clone()
    register_lora(layer, rank=2)
    shake(layer)
    lora = layer.parametrizations.weight[1]
    expected = weight + (lora.lora_B @ lora.lora_A).view_as(weight) * lora.scale
    assert torch.equal(layer.weight, expected)


@pytest.mark.parametrize("foreign", ["weight_norm", "spectral_norm", "its own"])
def test_a_foreign_parametrization_registered_later_survives(foreign) -> None:
    layer = nn.Linear(6, 5).eval()
    register_lora(layer, rank=2)
    shake(layer)
    if foreign == "weight_norm":  # of several originals, so it can only come first
        parametrizations.weight_norm(layer, "bias", dim=None)
    else:
        FOREIGN[foreign](layer)
    parts = [entry for name in layer.parametrizations for entry in layer.parametrizations[name]]
    foreign_parts = [part for part in parts if not isinstance(part, LoRAParametrization)]
    remove_lora(layer)
    parts = [entry for name in layer.parametrizations for entry in layer.parametrizations[name]]
    assert parts == foreign_parts
    assert isinstance(layer, nn.Linear)
    layer(torch.ones(1, 6))


@pytest.mark.parametrize("foreign", ["weight_norm", "its own"])
def test_merging_goes_through_a_foreign_parametrization(foreign) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 5), torch.randn(3, 6)
    FOREIGN[foreign](layer)
    entries = list(layer.parametrizations.weight)
    register_lora(layer, rank=2)
    shake(layer)
    before = layer(x)
    merge_lora(layer)
    assert list(layer.parametrizations.weight) == entries
    torch.testing.assert_close(layer(x), before)


def with_a_head(normed: bool) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    if normed:
        parametrizations.spectral_norm(model[1].eval())
    register_lora(model, rank=2, target="0", train="1")
    shake(model)
    return model


def test_new_values_behind_anothers_parametrization_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"1\.weight: PEFT keeps its new values, which another"):
        save_lora(with_a_head(normed=True), tmp_path, format="peft")


def test_new_values_take_the_place_of_a_change_behind_anothers(tmp_path: Path) -> None:
    source, model = with_a_head(normed=False), with_a_head(normed=True)
    save_lora(source, tmp_path, format="peft")
    load_lora(model, tmp_path)
    torch.testing.assert_close(model[1].weight, source[1].weight)
