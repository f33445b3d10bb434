"""Plain and full checkpoints, into adapted models and out of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from lora_param import base_state_dict, named_lora_parameters, register_lora

from .cases import shake
from .state_cases import net


def noisy(model: nn.Module) -> dict[str, Tensor]:
    """Return another checkpoint of the same model: the same keys, other values."""
    return {
        name: torch.rand_like(t) if t.is_floating_point() else t + 1
        for name, t in model.state_dict().items()
    }


def zoo() -> nn.ModuleDict:
    normed = parametrizations.spectral_norm(parametrizations.weight_norm(nn.Linear(5, 4)))
    return nn.ModuleDict(
        {
            "linear": nn.Linear(6, 5),
            "deep": nn.Sequential(nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4))),
            "attention": nn.MultiheadAttention(8, 2),
            "lstm": nn.LSTM(4, 5),
            "normed": normed,
        }
    )


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in base_state_dict(model).items()}


@pytest.mark.parametrize("assign", [False, True])
def test_a_plain_checkpoint_loads_into_the_adapted_model(assign: bool) -> None:
    model = zoo()
    checkpoint = noisy(model)
    register_lora(model, rank=2, adapter="a")
    register_lora(model, rank=2, adapter="b")
    shake(model)
    factors = {name: (id(p), p.clone()) for name, p in named_lora_parameters(model)}
    model.load_state_dict(checkpoint, strict=True, assign=assign)
    assert base_state_dict(model).keys() == checkpoint.keys()
    assert all(torch.equal(t, checkpoint[name]) for name, t in base_state_dict(model).items())
    for name, parameter in named_lora_parameters(model):
        assert id(parameter) == factors[name][0]
        assert torch.equal(parameter, factors[name][1])


def test_a_plain_checkpoint_of_a_submodule_loads_too() -> None:
    model = zoo()
    checkpoint = noisy(model["deep"])
    register_lora(model, rank=2)
    model["deep"].load_state_dict(checkpoint, strict=True)
    assert torch.equal(
        model["deep"][0][0].parametrizations.weight.original, checkpoint["0.0.weight"]
    )


def test_strict_false_loads_a_plain_checkpoint_as_well() -> None:
    model = nn.Linear(6, 5)
    checkpoint = noisy(model)
    register_lora(model, rank=2)
    result = model.load_state_dict(checkpoint, strict=False)
    assert result == ([], [])
    assert torch.equal(model.parametrizations.weight.original, checkpoint["weight"])


@pytest.mark.parametrize("assign", [False, True])
def test_a_full_checkpoint_loads_into_an_adapted_model(assign: bool) -> None:
    source, model = zoo(), zoo()
    for each in (source, model):
        register_lora(each, rank=2, adapter="a")
        register_lora(each, rank=2, adapter="b")
        shake(each)
    model.load_state_dict(source.state_dict(), strict=True, assign=assign)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name])


def test_a_copy_loads_a_plain_checkpoint() -> None:
    model = nn.Linear(6, 5)
    checkpoint = noisy(model)
    register_lora(model, rank=2)
    twin = copy.deepcopy(model)
    twin.load_state_dict(checkpoint)
    assert torch.equal(twin.parametrizations.weight.original, checkpoint["weight"])
    assert not torch.equal(model.parametrizations.weight.original, checkpoint["weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("0.bias"), "Missing key.*0.bias"),
        (lambda s: s.update({"0.junk": torch.ones(1)}), "Unexpected key.*0.junk"),
        (lambda s: s.update({"0.weight": torch.ones(2, 2)}), r"size mismatch for 0\..*original"),
    ],
)
def test_a_plain_checkpoint_that_does_not_fit_is_still_refused(change, message: str) -> None:
    checkpoint = noisy(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)))
    change(checkpoint)
    with pytest.raises(RuntimeError, match=message):
        net().load_state_dict(checkpoint, strict=True)


def test_a_full_checkpoint_that_lacks_an_adapter_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"Missing key.*weight\.1\.lora_A"):
        net("a", "b").load_state_dict(net("a").state_dict(), strict=True)


def test_base_state_dict_is_the_one_from_before_registering() -> None:
    model = zoo()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    register_lora(model, rank=2)
    shake(model)
    adapted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after = base_state_dict(model)
    assert list(after) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert list(model.state_dict()) == list(adapted)
    assert all(torch.equal(t, adapted[name]) for name, t in model.state_dict().items())


def test_base_state_dict_of_a_plain_model_is_its_state_dict() -> None:
    assert list(base_state_dict(zoo())) == list(zoo().state_dict())


def test_a_plain_checkpoint_reaches_a_parametrization_registered_behind_an_adapter() -> None:
    model = nn.Linear(6, 5)
    register_lora(model, rank=2)
    parametrizations.spectral_norm(model)
    checkpoint = {name: torch.rand_like(t) for name, t in base_state_dict(model).items()}
    assert list(checkpoint) == [
        "bias",
        "parametrizations.weight.original",
        "parametrizations.weight.0._u",
        "parametrizations.weight.0._v",
    ]
    model.load_state_dict(checkpoint, strict=True)
    assert torch.equal(
        model.parametrizations.weight[1]._u, checkpoint["parametrizations.weight.0._u"]
    )


class Renaming(nn.Linear):
    """Takes checkpoints in which the weight still has its old name."""

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        if f"{prefix}kernel" in state_dict:
            state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}kernel")
        super()._load_from_state_dict(state_dict, prefix, *args)


def rename(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
    if f"{prefix}kernel" in state_dict:
        state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}kernel")


@pytest.mark.parametrize("by", ["class", "hook"])
def test_a_layer_that_renames_its_keys_still_loads(by: str) -> None:
    layer = Renaming(6, 5) if by == "class" else nn.Linear(6, 5)
    if by == "hook":
        layer.register_load_state_dict_pre_hook(rename)
    register_lora(layer, rank=2)
    checkpoint = {"kernel": torch.randn(5, 6), "bias": torch.zeros(5)}
    layer.load_state_dict(checkpoint, strict=True)
    assert torch.equal(layer.parametrizations.weight.original, checkpoint["kernel"])
    assert len(layer._load_state_dict_pre_hooks) == (by == "hook")


def test_a_checkpoint_with_a_weight_by_both_names_is_refused() -> None:
    model = net()
    state = {**model.state_dict(), "0.weight": torch.zeros(5, 6)}
    with pytest.raises(RuntimeError, match=r"Unexpected key.*0\.weight"):
        model.load_state_dict(state, strict=True)


def test_a_plain_checkpoint_with_factors_beside_it_brings_them_too() -> None:
    model, source = net(), net()
    factors = {name: each for name, each in source.state_dict().items() if "lora_" in name}
    model.load_state_dict(base_state_dict(source) | factors, strict=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name])


class Shifted(nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.register_buffer("by", torch.tensor(by))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.by


def behind(*shifts: float) -> nn.Module:
    """Register others' parametrizations behind an adapter."""
    layer = nn.Linear(6, 5)
    register_lora(layer, rank=2)
    shake(layer)
    for shift in shifts:
        parametrize.register_parametrization(layer, "weight", Shifted(shift))
    return layer


def test_a_plain_checkpoint_reaches_each_of_several_behind_an_adapter() -> None:
    model = behind(1.0, 2.0)
    model.load_state_dict(base_state_dict(behind(3.0, 4.0)), strict=True)
    assert [float(entry.by) for entry in list(model.parametrizations.weight)[1:]] == [3.0, 4.0]


def test_a_full_checkpoint_with_another_behind_the_adapter_loads() -> None:
    model, source = behind(1.0), behind(2.0)
    model.load_state_dict(source.state_dict(), strict=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name])
