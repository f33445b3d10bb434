"""Models whose tensors accelerate has put away, and brings in for a module's call."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import (
    AlignDevicesHook,
    remove_hook_from_module,
    remove_hook_from_submodules,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_param import (
    LoRAError,
    base_state_dict,
    fingerprint,
    load_lora_state_dict,
    lora_parameters,
    lora_state_dict,
    lora_summary,
    merge_lora,
    register_lora,
    remove_lora,
    save_lora,
    select_lora,
)
from lora_param.deltas import Delta

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


class Recurrent(nn.Module):
    """Computes in weight space."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)[0]
        return y


@pytest.mark.parametrize("make", [net, Recurrent])
def test_an_offloaded_adapter_is_not_trained_in_silence(
    offload: Any, make: Callable[[], nn.Module]
) -> None:
    model = make()
    for adapter in ("a", "frozen"):
        register_lora(model, rank=2, adapter=adapter)
    for factor in lora_parameters(model, "frozen"):
        factor.requires_grad_(False)
    if isinstance(model, Recurrent):
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        offload(model)
    loss = model(torch.randn(3, 6)).square().sum()
    with pytest.raises(LoRAError, match="gradients would be lost with the copies that it brings"):
        loss.backward()
    select_lora(model, "frozen")
    model(torch.randn(3, 6).requires_grad_()).square().sum().backward()


def test_what_is_hooked_and_stays_at_home_is_trained() -> None:
    model, x = adapted(), torch.randn(3, 6)
    expected = torch.autograd.grad(model(x).sum(), list(lora_parameters(model)))
    dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    got = torch.autograd.grad(model(x).sum(), list(lora_parameters(model)))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_an_adapter_that_stays_at_home_is_trained_on_an_offloaded_base(offload: Any) -> None:
    model, data = adapted(), torch.randn(3, 6)
    plain = copy.deepcopy(model)
    offload(model)
    for module in model.modules():
        if isinstance(module, Delta):
            remove_hook_from_module(module)
    for each in (model, plain):
        optimizer = torch.optim.AdamW(lora_parameters(each), lr=0.1)
        for _ in range(3):
            each(data).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert any(each.is_meta for each in model.parameters())
    expected = lora_state_dict(plain)
    for name, tensor in lora_state_dict(model).items():
        torch.testing.assert_close(tensor, expected[name])


def test_a_model_whose_blocks_are_brought_in_whole_is_away_too() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(6, 2, 8))
    register_lora(model, rank=2)
    device, blocks = torch.device("cpu"), ["TransformerEncoderLayer"]
    cpu_offload(model, execution_device=device, preload_module_classes=blocks)
    for verb in (merge_lora, lora_state_dict):
        with pytest.raises(LoRAError, match=r"^0: .* are away, where accelerate has put them"):
            verb(model)


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
