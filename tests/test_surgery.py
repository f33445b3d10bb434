"""Attaching and detaching: what a module keeps, who else is there, and faults at any line."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from lora_param import (
    LoRAError,
    LoRAParametrization,
    assert_frozen,
    base_state_dict,
    fingerprint,
    load_lora,
    load_lora_state_dict,
    lora_disabled,
    lora_merged,
    lora_state_dict,
    merge_lora,
    register_lora,
    remove_lora,
    save_lora,
)
from lora_param.weight import Weight

from .cases import adapted, shake


def test_registering_invalidates_no_graph() -> None:
    layer = nn.Linear(6, 5)
    x = torch.randn(2, 6, requires_grad=True)
    loss = layer(x).sum()
    adapted(layer)
    loss.backward()
    assert x.grad is not None


def test_reading_for_a_check_does_not_advance_a_spectral_norm() -> None:
    layer = parametrizations.spectral_norm(nn.Linear(6, 5))
    before = copy.deepcopy(dict(layer.named_buffers()))
    register_lora(layer, rank=2)
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, before[name])


VERBS = {
    "register": lambda model: register_lora(model, rank=2, target="*", adapter="second"),
    "remove": remove_lora,
    "merge": merge_lora,
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:freeze=True freezes 0.bias:UserWarning")
@pytest.mark.parametrize("verb", VERBS)
def test_a_fault_at_any_line_leaves_the_model_as_it_was(verb: str) -> None:
    model = nn.Sequential(
        nn.Linear(6, 5), nn.LSTM(5, 4), parametrizations.weight_norm(nn.Linear(4, 5))
    )
    adapted(model, target="*")
    model[0].bias.requires_grad_(True)
    model[0].bias.grad = torch.ones(5)
    model[1].parametrizations.weight_hh_l0[0].eval()
    before = _state(model)
    line, raised = 0, True
    while raised:
        raised = _raises_at(line, VERBS[verb], model)
        assert not raised or _state(model) == before, line
        line += 1
    assert line > 300
    assert _state(model) != before


LOADS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "file": load_lora,
    "state dict": lambda model, path: load_lora_state_dict(
        model, torch.load(path.with_suffix(".pt"))
    ),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # faults in closing
@pytest.mark.parametrize("load", LOADS)
def test_a_fault_at_any_line_loads_all_of_an_adapter_or_nothing(load: str, tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    register_lora(model, rank=1, alpha=3)
    shake(model)
    save_lora(model, path)
    torch.save(lora_state_dict(model), path.with_suffix(".pt"))
    new = _state(model)
    shake(model)
    model[0].parametrizations.weight[0].scale = 7.0 if load == "file" else 3.0
    old = {name: each.clone() for name, each in lora_state_dict(model).items()}
    before, seen = _state(model), set()
    line, raised = 0, True
    while raised:
        raised = _raises_at(line, lambda model: LOADS[load](model, path), model)
        after = _state(model)
        assert after in (before, new), line
        seen.add((raised, after == new))
        load_lora_state_dict(model, old)
        model[0].parametrizations.weight[0].scale = 7.0 if load == "file" else 3.0
        line += 3
    assert {(True, False), (False, True)} <= seen


def _raises_at(line: int, verb: Any, model: nn.Module) -> bool:
    """Interrupt the library at the given line of all that a call executes in it."""
    left = line

    def trace(frame: Any, event: str, argument: object) -> Any:
        nonlocal left
        code = frame.f_code
        if "lora_param" not in code.co_filename or code.co_name in CONTEXTS:
            return None
        if event == "line":
            left -= 1
            if left < 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        verb(model)
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
        torch.set_grad_enabled(True)  # a tracer can raise between a block's end and its context's
    return False


CONTEXTS = ("all_or_nothing", "without_side_effects", "_switched", "note")
"""A tracer can raise between the end of their blocks and their exits, where no interrupt arrives,
and so leave a lock locked."""


def _state(model: nn.Module) -> list[Any]:
    return [
        [
            (name, type(each), each.training, sorted(vars(each)), getattr(each, "scale", None))
            for name, each in model.named_modules()
        ],
        [
            (name, id(p), p.requires_grad, id(p.grad), p.detach().numpy().tobytes())
            for name, p in model.named_parameters()
        ],
        list(model.state_dict()),
    ]


class Delegating(nn.Module):
    """Answers for the module it holds, as wrappers do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


@pytest.mark.parametrize("wrap", [Delegating, lambda m: torch.compile(m, backend="eager")])
def test_a_wrapper_that_answers_for_its_module_is_no_obstacle(wrap: Any) -> None:
    inner = nn.Linear(6, 5)
    model = wrap(inner)
    before = fingerprint(model)
    adapted(model)
    assert fingerprint(model) == before
    remove_lora(model)
    assert type(inner) is nn.Linear


def test_what_compile_wraps_keeps_the_names_of_the_plain_model(tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Linear(6, 5), nn.Sequential(nn.Linear(5, 4)))
    model = copy.deepcopy(plain)
    model[1] = torch.compile(model[1], backend="eager")
    model = torch.compile(model, backend="eager")
    assert fingerprint(model) == fingerprint(plain)
    names = register_lora(model, rank=2, target="*.weight")
    shake(model)
    save_lora(model, tmp_path / "adapter.safetensors")
    assert load_lora(plain, tmp_path / "adapter.safetensors", base="require") == names
    assert list(lora_state_dict(plain)) == list(lora_state_dict(model))
    x = torch.randn(3, 6)
    torch.testing.assert_close(plain(x), model(x))


def test_a_buffer_adapted_by_hand_stays_a_buffer() -> None:
    module = nn.Module()
    module.register_buffer("table", torch.randn(4, 3))
    parametrize.register_parametrization(module, "table", LoRAParametrization(4, 3, 1))
    remove_lora(module)
    assert list(module.state_dict()) == ["table"]


def test_a_bare_module_can_be_adapted() -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(5, 6))
    checkpoint = {"weight": torch.randn(5, 6)}
    adapted(module, target="weight")
    module.load_state_dict(checkpoint, strict=True)
    with pytest.raises(LoRAError, match="can't assign to an adapted weight"):
        module.weight = nn.Parameter(torch.zeros(5, 6))
    remove_lora(module)
    assert type(module) is nn.Module
    assert torch.equal(module.weight, checkpoint["weight"])


def test_the_state_dict_of_a_base_with_an_adapted_buffer_leaves_the_model_alone() -> None:
    module = nn.Module()
    module.register_buffer("table", torch.randn(4, 3))
    parametrize.register_parametrization(module, "table", LoRAParametrization(4, 3, 1))
    before, digests = list(module.state_dict()), fingerprint(module, buffers=True)
    assert list(base_state_dict(module)) == list(digests) == ["table"]
    assert list(module.state_dict()) == before
    remove_lora(module)
    assert_frozen(module, digests)


class Rewrapping(nn.Linear):
    """Wraps every Parameter that it is given anew."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, nn.Parameter(value.clone()) if name == "weight" else value)


def test_a_class_that_rewraps_parameters_gets_its_own_back() -> None:
    layer = Rewrapping(6, 5)
    before = layer.weight
    adapted(layer)
    remove_lora(layer)
    assert layer.weight is before


def test_a_recurrent_layers_own_list_of_weights_is_restored() -> None:
    lstm = adapted(nn.LSTM(4, 5))
    lstm(torch.randn(3, 2, 4))
    remove_lora(lstm)
    assert lstm._flat_weights[0] is lstm.weight_ih_l0


class Closed(nn.Linear):
    """Lets nothing be set once it is built."""

    closed = False

    def __setattr__(self, name: str, value: Any) -> None:
        if self.closed:
            raise AttributeError(f"{name} can't be set")
        super().__setattr__(name, value)


@pytest.mark.parametrize("verb", [remove_lora, merge_lora])
def test_a_module_that_lets_nothing_be_set_is_adapted_and_given_back(
    verb: Callable[[nn.Module], None],
) -> None:
    layer, x = Closed(6, 5), torch.randn(2, 6)
    layer.__dict__["closed"] = True
    before, weight, expected = list(layer.state_dict()), layer.weight, layer(x)
    adapted(layer)
    assert list(base_state_dict(layer)) == before
    with lora_merged(layer):
        assert type(layer) is Closed
    with lora_disabled(layer):
        assert torch.equal(layer(x), expected)
    verb(layer)
    assert type(layer) is Closed
    assert layer.weight is weight
    assert list(layer.state_dict()) == before
    assert torch.equal(layer(x), expected) == (verb is remove_lora)


class Hiding(nn.Linear):
    """Shows an optimizer fewer parameters than it has."""

    def parameters(self, recurse: bool = True) -> Any:
        return (each for each in super().parameters(recurse) if each.ndim > 1)


def test_a_model_with_parameters_of_its_own_is_frozen_whole_and_given_back() -> None:
    layer = Hiding(6, 5)
    register_lora(layer, rank=2)
    original = layer.parametrizations.weight.original
    assert not any(each.requires_grad for each in (original, layer.bias))
    remove_lora(layer)
    assert all(each.requires_grad for each in (layer.weight, layer.bias))


def test_a_call_that_fails_leaves_flags_and_gradients_that_the_model_does_not_show(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = Hiding(6, 5)
    layer(torch.randn(2, 6)).sum().backward()
    before = [(each, each.grad) for each in (layer.weight, layer.bias)]

    def fail(*_: object) -> None:
        raise RuntimeError("on purpose")

    monkeypatch.setattr(Weight, "attach", fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        register_lora(layer, rank=2)
    assert all(each.requires_grad and each.grad is grad for each, grad in before)
