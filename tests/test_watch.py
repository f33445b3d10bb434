"""Training that reaches no adapter, or that no file will hold, is warned of, once."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks

from lora_param import lora_parameters, optim, register_lora, remove_lora, save_lora

from .cases import shake
from .file_cases import net, plain

NO_ADAPTER = "this optimizer's step trained no adapter: .* lora_parameters"
NEVER_TRAINED = "adapter 'default' was never trained: its update is zero everywhere; .* lora_par"
BASE = "a file of adapters doesn't hold what trained the base, and "


def sgd(parameters: Iterable[Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def step(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    model(torch.ones(2, 6, requires_grad=True)).sum().backward()
    optimizer.step()


def test_a_step_of_an_optimizer_built_before_registering_warns_once_at_its_line() -> None:
    model = plain()
    optimizer = sgd(model.parameters())
    step(optimizer, model)
    register_lora(model, rank=2)
    with pytest.warns(UserWarning, match=NO_ADAPTER) as warned:
        step(optimizer, model)
    assert [each.filename for each in warned] == [__file__]
    step(optimizer, model)


def with_adapters(model: nn.Module, old: torch.optim.Optimizer) -> torch.optim.Optimizer:
    old.add_param_group({"params": list(lora_parameters(model))})
    return old


def without_training(model: nn.Module, old: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for factor in lora_parameters(model):
        factor.requires_grad_(False)
    return old


RIGHT: dict[str, Callable[[nn.Module, torch.optim.Optimizer], torch.optim.Optimizer]] = {
    "of the adapters": lambda model, old: sgd(lora_parameters(model)),
    "of all parameters": lambda model, old: sgd(model.parameters()),
    "given the adapters": with_adapters,
    "of another model": lambda model, old: sgd(plain().parameters()),
    "beside adapters that aren't trained": without_training,
    "of a copy": lambda model, old: sgd(lora_parameters(copy.deepcopy(model))),
}


@pytest.mark.parametrize("case", RIGHT)
def test_a_step_that_is_right_warns_of_nothing(case: str) -> None:
    model = plain()
    old = sgd(model.parameters())
    register_lora(model, rank=2)
    step(RIGHT[case](model, old), model)


def test_a_base_that_was_not_frozen_or_is_thawed_is_trained_without_a_warning() -> None:
    model = plain()
    optimizer = sgd(model.parameters())
    register_lora(model, rank=2, freeze=False)
    step(optimizer, model)
    register_lora(model, rank=2, adapter="b")
    model.requires_grad_(True)
    step(optimizer, model)


def test_the_mistake_is_found_behind_another_models_steps() -> None:
    model, other = plain(), plain()
    optimizers = sgd(other.parameters()), sgd(model.parameters())
    register_lora(model, rank=2)
    step(optimizers[0], other)
    step(optimizers[0], other)
    with pytest.warns(UserWarning, match=NO_ADAPTER):
        step(optimizers[1], model)


def test_after_removing_the_old_optimizer_is_right_again() -> None:
    model = plain()
    optimizer = sgd(model.parameters())
    register_lora(model, rank=2)
    remove_lora(model)
    step(optimizer, model)


def test_watching_keeps_no_model_and_ends_with_the_first_right_step() -> None:
    model = plain()
    register_lora(model, rank=2)
    step(sgd(lora_parameters(model)), model)
    assert model not in optim._watched
    gone = plain()
    register_lora(gone, rank=2)
    gone = weakref.ref(gone)
    gc.collect()
    assert gone() is None
    assert [*_global_optimizer_post_hooks.values()].count(optim._after_step) == 1


SAVED: dict[str, tuple[Callable[[nn.Sequential], Any], str | None]] = {
    "trained": (lambda model: None, None),
    "trained at one weight": (lambda model: zero(model[0]), None),
    "never trained": (lambda model: zero(model), NEVER_TRAINED),
    "base thawed": (lambda model: model.requires_grad_(True), BASE + "0.weight, 0.bias, 2.weight, and 1 more can be"),
    "one bias thawed": (lambda model: model[0].bias.requires_grad_(True), BASE + "0.bias can be"),
}  # fmt: skip


def zero(model: nn.Module) -> None:
    for each in model.modules():
        if hasattr(each, "lora_B"):
            nn.init.zeros_(each.lora_B)


@pytest.mark.parametrize("case", SAVED)
def test_saving_warns_of_what_the_file_will_lack(case: str, path: Path) -> None:
    (change, message), model = SAVED[case], net()
    change(model)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        save_lora(model, path)
    assert len(warned) == (message is not None)
    if message is not None:
        with pytest.warns(UserWarning, match=message):
            save_lora(model, path)
    assert path.exists()


def test_saving_a_dense_delta_that_was_never_trained_warns(path: Path) -> None:
    model = plain()
    register_lora(model, kind="dense", target="*.bias")
    with pytest.warns(UserWarning, match=NEVER_TRAINED):
        save_lora(model, path)
    shake(model)
    save_lora(model, path)
