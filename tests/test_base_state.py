"""The base's own state dict, whatever a model does when it writes one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, parametrize
from torchvision.models import mnasnet0_5

from lora_param import base_state_dict, register_lora, remove_lora

from .cases import adapted, shake


class Rounded(nn.Linear):
    """Saves what it computes from its weight."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}rounded"] = (self.weight.detach() * 10).round()


class Versioned(nn.Linear):
    _version = 2


class Inner(nn.Module):
    """Answers with the state of what it holds."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.state_dict(*args, **kwargs)


class Packed(Inner):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {"model": self.module.state_dict()}


def hooked(hook: Callable[..., None]) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4))
    model._register_state_dict_hook(hook)
    return model


def reads_the_weight(module: Any, state: Any, prefix: str, metadata: Any) -> None:
    state[f"{prefix}norm"] = module[0].weight.norm().detach()


def takes_the_weight_out(module: Any, state: Any, prefix: str, metadata: Any) -> None:
    state[f"{prefix}first"] = state.pop(f"{prefix}0.weight")


class Offset(nn.Module):
    """Somebody's parametrization, with a parameter and an extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.randn(4, 4))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.offset

    def get_extra_state(self) -> Tensor:
        return torch.ones(2)

    def set_extra_state(self, state: Tensor) -> None:
        assert torch.equal(state, torch.ones(2))


def foreign() -> nn.Linear:
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", Offset())
    return layer


def shared() -> nn.Module:
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.LSTM(4, 4), layer)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "computed": lambda: nn.Sequential(Rounded(4, 4)),
    "versioned": lambda: nn.Sequential(Versioned(4, 4)),
    "a hook that reads": lambda: hooked(reads_the_weight),
    "a hook that renames": lambda: hooked(takes_the_weight_out),
    "wrapped for checkpointing": lambda: nn.Sequential(checkpoint_wrapper(nn.Linear(4, 4))),
    "answers for another": lambda: Inner(nn.Linear(4, 4)),
    "a parametrization of others": lambda: nn.Sequential(foreign()),
    "weight_norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4))),
    "shared and recurrent": shared,
    "statistics": lambda: nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)),
}


@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_state_dict_of_the_plain_model(name: str) -> None:
    model = MODELS[name]()
    expected = copy.deepcopy(model.state_dict())
    register_lora(model, rank=1, target="*.weight*" if name == "shared and recurrent" else None)
    shake(model)
    adapted, kept = str(model), [id(each) for each in model.parameters()]
    state = base_state_dict(model)
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert state._metadata == expected._metadata
    assert (str(model), [id(each) for each in model.parameters()]) == (adapted, kept)
    remove_lora(model)
    assert list(model.state_dict()) == list(expected)


def test_a_state_of_any_form_is_passed_on() -> None:
    model = Packed(nn.Linear(4, 4))
    expected = model.module.weight.detach().clone()
    register_lora(model, rank=1)
    assert torch.equal(base_state_dict(model)["model"]["weight"], expected)


def test_a_model_that_asks_for_the_version_loads_it() -> None:
    model = mnasnet0_5(num_classes=3)
    register_lora(model, rank=1, target="classifier.1")
    mnasnet0_5(num_classes=3).load_state_dict(base_state_dict(model))


@pytest.mark.filterwarnings("ignore:freeze=True freezes parametrizations:UserWarning")
def test_a_base_with_parametrizations_between_ours_loads() -> None:
    model = nn.Linear(4, 4)
    register_lora(model, rank=1, adapter="a")
    parametrize.register_parametrization(model, "weight", Offset())
    register_lora(model, rank=1, adapter="b")
    parametrize.register_parametrization(model, "weight", Offset())
    state = copy.deepcopy(base_state_dict(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    model.load_state_dict(state, strict=True)
    now = base_state_dict(model)
    assert all(torch.equal(now[key], state[key]) for key in state)


def test_the_model_stays_adapted_while_its_base_state_is_taken() -> None:
    layer, x = adapted(nn.Linear(6, 5)), torch.randn(2, 6)
    expected, seen = layer(x), list[Tensor]()
    layer.register_state_dict_post_hook(lambda *_: seen.append(layer(x)))
    base_state_dict(layer)
    assert len(seen) == 1
    assert torch.equal(seen[0], expected)
