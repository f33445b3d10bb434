"""Models whose tensors accelerate has put away, and brings in for a module's call."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, remove_hook_from_submodules
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_param import (
    LoRAError,
    base_state_dict,
    fingerprint,
    load_lora_state_dict,
    lora_state_dict,
    lora_summary,
    merge_lora,
    register_lora,
    remove_lora,
    save_lora,
    select_lora,
)

from .cases import shake


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4, bias=False))


def adapted() -> nn.Module:
    model = net()
    register_lora(model, rank=2)
    shake(model)
    return model


def dense(model: Any) -> nn.Module:
    """Build the plain model of a model's weights as they are read."""
    plain: Any = net()
    with torch.no_grad():
        plain[0].weight.copy_(model[0].weight), plain[0].bias.copy_(model[0].bias)
        plain[2].weight.copy_(model[2].weight)
    return plain


OFFLOADS: dict[str, Callable[[nn.Module, str], object]] = {
    "cpu": lambda model, folder: cpu_offload(model, execution_device=torch.device("cpu")),
    "disk": lambda model, folder: disk_offload(model, folder, execution_device=torch.device("cpu")),
    "dispatch": lambda model, folder: dispatch_model(
        model, {"0": "cpu", "1": "cpu", "2": "disk"}, main_device="cpu", offload_dir=folder
    ),
}


@pytest.fixture(params=OFFLOADS)
def offload(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[nn.Module], None]:
    def offload(model: nn.Module) -> None:
        OFFLOADS[request.param](model, tempfile.mkdtemp(dir=tmp_path))

    return offload


def test_what_is_adapted_and_then_offloaded_computes_the_same(offload: Any) -> None:
    model = adapted()
    x = torch.randn(3, 6)
    expected = model(x)
    offload(model)
    assert any(each.is_meta for each in model.parameters())
    torch.testing.assert_close(model(x), expected)


class Products(TorchDispatchMode):
    """Notes the shapes of all that is computed, but of tensors that are moved as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes = set[tuple[int, ...]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        moves = func.__name__.split(".")[0] in ("_to_copy", "lift_fresh", "detach", "t")
        if isinstance(result, Tensor) and not moves:
            self.shapes.add(tuple(result.shape))
        return result


@pytest.mark.parametrize("options", [{}, {"init": "pissa"}, {"dropout": 0.5}], ids=str)
def test_what_is_offloaded_forms_no_weight(offload: Any, options: dict[str, Any]) -> None:
    model = net()
    register_lora(model, rank=1, **options)
    shake(model.eval())
    oracle, x = dense(model), torch.randn(7, 6, requires_grad=True)
    offload(model)
    torch.testing.assert_close(model(x), oracle(x))
    gradients = [torch.autograd.grad(each(x).square().sum(), x) for each in (model, oracle)]
    torch.testing.assert_close(*gradients)
    model.train()
    with torch.no_grad(), Products() as products:
        model(x)
    assert products.shapes.isdisjoint({(5, 6), (6, 5), (4, 5), (5, 4)})
    assert {weight.space for weight in lora_summary(model).weights} <= ACTIVATION


ACTIVATION = {"activation", "activation or weight, by cost"}


def test_adapters_that_are_off_stay_offloaded(offload: Any, monkeypatch: Any) -> None:
    model = net()
    for adapter in ("a", "off"):
        register_lora(model, rank=2, adapter=adapter)
    select_lora(model, "a")
    offload(model)
    seen = list[nn.Module]()
    bring = AlignDevicesHook.pre_forward
    monkeypatch.setattr(
        AlignDevicesHook,
        "pre_forward",
        lambda hook, module, *a, **k: seen.append(module) or bring(hook, module, *a, **k),
    )
    model(torch.randn(3, 6))
    on, off = model[2].parametrizations.weight
    assert on in seen
    assert off not in seen


def test_a_forward_that_others_put_in_front_of_accelerates_is_called(offload: Any) -> None:
    model = net()
    register_lora(model, rank=2)
    shake(model)
    offload(model)
    x, chain = torch.randn(3, 6), model[2].parametrizations.weight
    expected, hooked = model(x), chain.forward
    chain.forward = lambda: hooked() * 2
    torch.testing.assert_close(model(x), 2 * expected)


def test_a_fault_in_bringing_in_leaves_the_hooks(offload: Any, monkeypatch: Any) -> None:
    model = net()
    register_lora(model, rank=2)
    x = torch.randn(3, 6)
    offload(model)
    expected, delta = model(x), model[2].parametrizations.weight[0]
    with monkeypatch.context() as patch:
        patch.setattr(delta._hf_hook, "pre_forward", lambda module: 1 / 0)
        with pytest.raises(ZeroDivisionError, match="division"):
            model(x)
    torch.testing.assert_close(model(x), expected)
    assert all(each.is_meta for each in model[2].parameters())


@pytest.mark.parametrize(
    "verb",
    [
        merge_lora,
        remove_lora,
        base_state_dict,
        lora_state_dict,
        lambda model: load_lora_state_dict(model, {}),
        lambda model: save_lora(model, "nowhere"),
        lambda model: register_lora(model, rank=2, adapter="b"),
    ],
    ids=["merge", "remove", "base", "state", "load", "save", "register"],
)
def test_what_needs_the_values_of_an_offloaded_model_is_refused(offload: Any, verb: Any) -> None:
    model = adapted()
    x = torch.randn(3, 6)
    expected = model(x)
    offload(model)
    with pytest.raises(LoRAError, match="are away, where accelerate has put them; first"):
        verb(model)
    torch.testing.assert_close(model(x), expected)
    remove_hook_from_submodules(model)
    merge_lora(model)
    torch.testing.assert_close(model(x), expected)


def test_what_was_offloaded_first_is_refused_until_it_is_back(offload: Any) -> None:
    model = net()
    x = torch.randn(3, 6)
    expected = model(x)
    offload(model)
    with pytest.raises(LoRAError, match="register_lora can't be called: its weights are away"):
        register_lora(model, rank=2)
    with pytest.raises(LoRAError, match="has no bytes of its own"):
        fingerprint(model)
    remove_hook_from_submodules(model)
    register_lora(model, rank=2)
    offload(model)
    torch.testing.assert_close(model(x), expected)
