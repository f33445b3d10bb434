"""The verbs, and what they leave as it was."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lora_param import (
    AdapterError,
    LoRAError,
    LoRAParametrization,
    assert_frozen,
    disable_lora,
    enable_lora,
    fingerprint,
    lora_disabled,
    lora_parameters,
    lora_state_dict,
    register_lora,
    remove_lora,
)

from .cases import shake


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.LayerNorm(4))


def states(model: nn.Module) -> list[tuple[str, bool]]:
    entries = [each for each in model.modules() if isinstance(each, LoRAParametrization)]
    return [(entry.adapter, entry.enabled) for entry in entries]


def flags(model: nn.Module) -> list[tuple[str, bool]]:
    return [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD with momentum and decay": lambda p: torch.optim.SGD(
        p, lr=0.1, momentum=0.9, weight_decay=0.1
    ),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, foreach=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9),
}
each_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


def train(model: nn.Module, *optimizers: torch.optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        model(torch.randn(8, 6)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@each_optimizer
def test_no_optimizer_moves_an_original(optimizer: str) -> None:
    model = net()
    before = fingerprint(model)
    register_lora(model, rank=2)
    fresh = [factor.detach().clone() for factor in lora_parameters(model)]
    train(model, OPTIMIZERS[optimizer](model.parameters()))
    assert_frozen(model, before)
    assert not any(map(torch.equal, fresh, lora_parameters(model)))


@each_optimizer
def test_an_optimizer_built_before_registering_does_not_move_an_original(optimizer: str) -> None:
    model = net()
    old = OPTIMIZERS[optimizer](model.parameters())
    train(model, old)
    model(torch.randn(8, 6)).square().sum().backward()
    before = fingerprint(model)
    register_lora(model, rank=2)
    with pytest.warns(UserWarning, match="step trained no adapter"):
        train(model, old, OPTIMIZERS[optimizer](lora_parameters(model)))
    assert_frozen(model, before)


def test_a_graph_built_before_registering_does_not_reach_an_original() -> None:
    model = net()
    old = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = model(torch.randn(8, 6)).square().sum()
    before = fingerprint(model)
    register_lora(model, rank=2)
    loss.backward()
    with pytest.warns(UserWarning, match="step trained no adapter"):
        old.step()
    assert_frozen(model, before)


def test_freezing_leaves_only_adapters_to_train_and_clears_gradients() -> None:
    model = net()
    model(torch.randn(8, 6)).sum().backward()
    register_lora(model, rank=2)
    trainable = [name for name, flag in flags(model) if flag]
    assert trainable == [
        f"{index}.parametrizations.weight.0.lora_{factor}" for index in (0, 2) for factor in "AB"
    ]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_freeze_false_leaves_every_flag_and_gradient() -> None:
    model = net()
    model[3].weight.requires_grad_(False)
    model(torch.randn(8, 6)).sum().backward()
    before = {id(p): (p.requires_grad, p.grad) for p in model.parameters()}
    register_lora(model, rank=2, freeze=False)
    for parameter in model.parameters():
        if id(parameter) in before:
            assert (parameter.requires_grad, parameter.grad) == before[id(parameter)]
    remove_lora(model)
    assert {id(p): (p.requires_grad, p.grad) for p in model.parameters()} == before


def test_flags_come_back_with_the_last_adapter_only() -> None:
    model = net()
    model[2].bias.requires_grad_(False)
    before = flags(model)
    register_lora(model, rank=2, adapter="a")
    register_lora(model, rank=2, adapter="b")
    remove_lora(model, "a")
    assert {name for name, flag in flags(model) if flag} == {
        f"{index}.parametrizations.weight.0.lora_{factor}" for index in (0, 2) for factor in "AB"
    }
    remove_lora(model, "b")
    assert flags(model) == before


def test_a_flag_that_the_user_set_meanwhile_is_frozen_by_the_next_adapter_and_comes_back() -> None:
    model = net()
    register_lora(model, rank=2)
    model[0].parametrizations.weight.original.requires_grad_(True)
    register_lora(model, rank=2, adapter="b")
    assert not model[0].parametrizations.weight.original.requires_grad
    remove_lora(model)
    assert model[0].weight.requires_grad


def test_a_second_adapter_leaves_the_first_ones_flags_alone() -> None:
    model = net()
    register_lora(model, rank=2, adapter="a")
    for factor in lora_parameters(model, "a"):
        factor.requires_grad_(False)
    register_lora(model, rank=2, adapter="b")
    assert not any(factor.requires_grad for factor in lora_parameters(model, "a"))
    assert all(factor.requires_grad for factor in lora_parameters(model, "b"))


def test_originals_stay_the_same_objects() -> None:
    model = net()
    before = {id(parameter) for parameter in model.parameters()}
    register_lora(model, rank=2)
    assert before <= {id(parameter) for parameter in model.parameters()}


def test_adapters_follow_the_weights_dtype_unless_told_otherwise() -> None:
    model = net().to(torch.bfloat16)
    register_lora(model, rank=2, adapter="own")
    register_lora(model, rank=2, adapter="wide", dtype=torch.float32)
    assert {factor.dtype for factor in lora_parameters(model, "own")} == {torch.bfloat16}
    assert {factor.dtype for factor in lora_parameters(model, "wide")} == {torch.float32}
    assert model[0].weight.dtype == torch.bfloat16


def test_registering_inside_autocast_changes_no_dtype() -> None:
    model = net()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        register_lora(model, rank=2)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model[0].weight.dtype == torch.float32


def test_registering_inside_no_grad_gives_adapters_that_train() -> None:
    model = net()
    with torch.no_grad():
        register_lora(model, rank=2)
    assert all(factor.requires_grad for factor in lora_parameters(model))


def test_a_model_on_the_meta_device_can_be_adapted() -> None:
    with torch.device("meta"):
        model = nn.Linear(1000, 1000)
    register_lora(model, rank=2)
    assert all(factor.is_meta for factor in lora_parameters(model))
    assert model.weight.shape == (1000, 1000)


def test_a_generator_makes_two_models_alike() -> None:
    models = [net(), net()]
    for model in models:
        register_lora(model, rank=2, generator=torch.Generator().manual_seed(5))
    for a, b in zip(*map(lora_parameters, models), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("training", [True, False])
def test_adapters_take_on_the_training_mode(training: bool) -> None:
    model = net().train(training)
    register_lora(model, rank=2)
    register_lora(model, rank=2, adapter="second")
    entries = [each for each in model.modules() if isinstance(each, LoRAParametrization)]
    assert {each.training for each in entries} == {training}


def test_disabling_and_enabling_by_name() -> None:
    model = nn.Linear(6, 5)
    register_lora(model, rank=2, adapter="a")
    register_lora(model, rank=2, adapter="b")
    disable_lora(model, "a")
    assert states(model) == [("a", False), ("b", True)]
    enable_lora(model)
    assert states(model) == [("a", True), ("b", True)]
    disable_lora(model)
    assert states(model) == [("a", False), ("b", False)]


def test_lora_disabled_restores_the_state_that_was_there() -> None:
    model = nn.Linear(6, 5)
    register_lora(model, rank=2, adapter="a")
    register_lora(model, rank=2, adapter="b")
    disable_lora(model, "b")
    with lora_disabled(model):
        assert states(model) == [("a", False), ("b", False)]
        with lora_disabled(model, "a"):
            enable_lora(model, "a")
        assert states(model) == [("a", False), ("b", False)]
    assert states(model) == [("a", True), ("b", False)]


def test_lora_disabled_restores_after_an_exception() -> None:
    model = nn.Linear(6, 5)
    register_lora(model, rank=2)
    with pytest.raises(ZeroDivisionError), lora_disabled(model):
        raise ZeroDivisionError
    assert states(model) == [("default", True)]


def test_removing_one_of_two_keeps_the_other() -> None:
    model, x = nn.Linear(6, 5), torch.randn(3, 6)
    register_lora(model, rank=2, adapter="a")
    register_lora(model, rank=2, adapter="b")
    shake(model)
    with lora_disabled(model, "a"):
        expected = model(x)
    remove_lora(model, "a")
    assert torch.equal(model(x), expected)
    assert states(model) == [("b", True)]


def test_a_submodule_can_be_adapted_and_restored_by_itself() -> None:
    model = net()
    register_lora(model[0], rank=2)
    remove_lora(model[0])
    assert type(model[0]) is nn.Linear
    assert all(parameter.requires_grad for parameter in model.parameters())


ABSENT = {
    "enable": enable_lora,
    "disable": disable_lora,
    "remove": remove_lora,
    "parameters": lambda *args: list(lora_parameters(*args)),
    "state dict": lora_state_dict,
    "disabled": lambda *args: lora_disabled(*args).__enter__(),
}


@pytest.mark.parametrize("verb", ABSENT)
def test_an_adapter_that_is_not_there_is_an_error(verb: str) -> None:
    model = net()
    with pytest.raises(AdapterError, match="no weight with an adapter; the model has none"):
        ABSENT[verb](model)
    register_lora(model, rank=2, adapter="style")
    message = "no weight with an adapter 'stile'; the model has 'style'"
    with pytest.raises(AdapterError, match=message):
        ABSENT[verb](model, "stile")
    assert states(model) == [("style", True)] * 2


BAD: list[tuple[dict[str, Any], str]] = [
    ({"rank": 0}, r"0.weight: rank must satisfy 1 <= rank <= min\(5, 6\) = 5, got 0; give an integer from 1 up; or exclude"),
    ({"rank": -3}, "got -3"),
    ({"rank": 2.0}, "got 2.0; give an integer"),
    ({"rank": {"2": 5, "*": 2}}, r"2.weight: rank must satisfy 1 <= rank <= min\(4, 5\) = 4, got 5; lower the rank; or exclude this weight"),
    ({"rank": {"0": 2, "2": 9}}, "2.weight: rank must satisfy .* got 9"),
    ({"alpha": math.nan}, "0.weight: alpha must be a finite number, or None for the rank, got nan"),
    ({"alpha": -math.inf}, "got -inf"),
    ({"alpha": {"*": math.inf}}, "got inf"),
    ({"adapter": ""}, "name must be a non-empty string without dots, got ''"),
    ({"adapter": "a.b"}, "got 'a.b'"),
    ({"adapter": None}, "got None"),
    ({"freeze": "no"}, "freeze and statistics must be bools, got 'no' and True"),
    ({"statistics": None}, "freeze and statistics must be bools, got True and None"),
    ({"dtype": torch.int8}, "adapter's dtype must be one of .* got torch.int8"),
    ({"init": "ones"}, r"init must be one of \['kaiming', 'gaussian', 'orthogonal'\]"),
    ({"adapter": "taken"}, '0.weight: there is an adapter "taken" on this weight already'),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), BAD, ids=[str(options) for options, _ in BAD])
def test_a_bad_option_is_refused_and_changes_nothing(options: dict[str, Any], message: str) -> None:
    model = net()
    register_lora(model, rank=1, adapter="taken", target="0", freeze=False)
    model(torch.randn(8, 6)).sum().backward()
    before = [(n, id(p), p.requires_grad, id(p.grad)) for n, p in model.named_parameters()]
    with pytest.raises(LoRAError, match=message):
        register_lora(model, **{"rank": 2} | options)
    after = [(n, id(p), p.requires_grad, id(p.grad)) for n, p in model.named_parameters()]
    assert after == before


def test_flags_come_back_after_the_adapters_went_with_a_submodule() -> None:
    model = net()
    before = flags(model)
    register_lora(model, rank=2, target="0")
    remove_lora(model[0])
    assert not model[2].weight.requires_grad
    remove_lora(model)
    assert flags(model) == before


def test_numbers_of_numpy_are_numbers() -> None:
    model = nn.Linear(6, 5)
    register_lora(model, rank=np.int64(2), alpha=np.float32(3))
    entry = model.parametrizations.weight[0]
    assert (type(entry.rank), entry.rank, type(entry.alpha), entry.alpha) == (int, 2, float, 3.0)
