"""What a CUDA graph records: forwards that ask a device for nothing, and follow what is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from lora_param import (
    LoRAError,
    attention,
    lora_disabled,
    lora_routed,
    lora_selected,
    ops,
    register_lora,
    routing,
)
from lora_param.deltas import dora

from .cases import CASES, Case, SelfAttention, outputs, shake
from .test_route import FIRST, build


class Recorded(TorchFunctionMode):
    """Refuses what waits for a device or copies to it; what asks for values, meta itself refuses."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given, made = (
            [leaf for leaf in tree_flatten(each)[0] if isinstance(leaf, Tensor)]
            for each in ((args, kwargs), result)
        )
        name = getattr(func, "__name__", "")
        copies = name == "tensor" or not all(each.is_meta for each in given)
        assert not (copies and any(each.is_meta for each in made)), f"{name} copies to the device"
        return result


def on_meta(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Move a layer to a device that is no CPU and has no values."""
    layer._apply(lambda tensor: torch.empty_like(tensor, device="meta"))
    return tuple(torch.empty_like(each, device="meta") for each in inputs)


@pytest.fixture(autouse=True)
def every_size_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dora, "SMALL", 0)
    monkeypatch.setattr(ops, "COPY", 0)


def train_and_infer(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    for grad in (True, False):
        for module in layer.modules():
            module.training = grad and not isinstance(module, nn.BatchNorm1d)
        with torch.set_grad_enabled(grad):
            outputs(layer, inputs)


@pytest.mark.parametrize("kind", ["lora", "dora", "dense"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_forward_asks_a_device_for_nothing(case: Case, kind: str) -> None:
    layer, inputs = build(case, kind)
    inputs = on_meta(layer, inputs)
    both = ["a", "b"] if case.id != "sequential" else "a"  # whose statistics can't both be moved
    for block in (lora_selected(layer, both), lora_disabled(layer)):
        with block, Recorded():
            train_and_infer(layer, inputs)
    rows = ["a", "b", "c", None, "a", "b"]
    with lora_routed(layer, rows, dim=FIRST.get(case.id)):
        train_and_infer(layer, inputs)  # as one does in front of a capture
        with Recorded():
            train_and_infer(layer, inputs)


# What is written into strengths, while it is recorded and run again


NAMES = ["a", "b", "c"]


def net() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
    for name in NAMES:
        register_lora(model, rank=2, adapter=name)
    shake(model)
    return model


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Let all that runs from now on be captured, as far as the library asks."""

    def capture() -> None:
        for room in (attention, routing):
            monkeypatch.setattr(room, "is_captured", lambda tensor: True)

    return capture


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_what_is_captured_follows_a_tensor_of_strengths(
    rows: int, gathered: bool, capture: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "COPY", 0 if gathered else 1000)
    model, x, strengths = net(), torch.randn(rows, 4, 6), torch.eye(3)[:rows].clone()
    with torch.no_grad(), lora_routed(model, strengths, names=NAMES):
        model(x)
        capture()
        graph = make_fx(model)(x)
    for _ in range(3):
        strengths.copy_(torch.randn(rows, 3))
        with torch.no_grad(), lora_routed(model, strengths, names=NAMES):
            torch.testing.assert_close(graph(x), model(x))


@pytest.mark.parametrize(
    ("make", "kind", "rows"),
    [
        (lambda: nn.LSTM(6, 6, batch_first=True), "lora", 3),  # runs by groups of rows
        (lambda: nn.Linear(6, 6), "dora", 1),  # is on or off
    ],
)
def test_what_a_graph_would_not_follow_is_not_captured(
    make: Callable[[], nn.Module], kind: str, rows: int, capture: Callable[[], None]
) -> None:
    layer, x = make(), torch.randn(rows, 4, 6)
    for name in NAMES:
        register_lora(layer, adapter=name, kind=kind, rank=2)
    with lora_routed(layer, torch.eye(3)[:rows], names=NAMES):
        layer(x)
        capture()
        with pytest.raises(LoRAError, match="a CUDA graph sees new strengths of what adds alone"):
            layer(x)


def test_rows_that_may_mix_later_are_captured_as_if_they_did(capture: Callable[[], None]) -> None:
    layer, x = nn.Linear(6, 6), torch.randn(3, 4, 6)
    for name in NAMES:
        register_lora(layer, adapter=name, kind="dora", rank=2)
    with lora_routed(layer, torch.eye(3), names=NAMES):
        layer(x)
        capture()
        with pytest.raises(LoRAError, match="a CUDA graph sees new strengths of what adds alone"):
            layer(x)


def test_a_capture_does_not_ask_whether_an_attention_has_learnt(
    capture: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "KERNEL", -1_000_000)
    monkeypatch.setattr(torch, "equal", lambda *args: 1 / 0)
    layer, x = SelfAttention(8, 2).eval(), torch.randn(5, 2, 8)
    register_lora(layer, rank=2)
    shake(layer)
    with torch.no_grad():
        with pytest.raises(ZeroDivisionError, match="division"):
            layer(x)
        capture()
        y = layer(x)[0]
    torch.testing.assert_close(y, layer(x)[0])


on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a graph on CUDA")


@on_cuda
@pytest.mark.filterwarnings("ignore:RNN module weights are not part of single")
@pytest.mark.parametrize("kind", ["lora", "dora", "dense"])
def test_a_graph_of_cuda_replays_what_it_captured(kind: str) -> None:
    for case in CASES:
        layer, inputs = case.build(device="cuda")
        case.adapt(layer, kind=kind)
        shake(layer.eval())
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(3):
                outputs(layer, inputs)
            with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
                recorded = outputs(layer, inputs)
            shake(layer)
            graph.replay()
            for got, expected in zip(recorded, outputs(layer, inputs), strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


@on_cuda
@pytest.mark.parametrize("rows", [1, 3])
def test_a_graph_of_cuda_follows_a_tensor_of_strengths(rows: int) -> None:
    model, x = net().cuda(), torch.randn(rows, 4, 6, device="cuda")
    strengths = torch.eye(3, device="cuda")[:rows].clone()
    with torch.no_grad(), lora_routed(model, strengths, names=NAMES):
        with torch.cuda.stream(torch.cuda.Stream()):
            model(x)
        with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
            y = model(x)
    for _ in range(3):
        strengths.copy_(torch.randn(rows, 3))
        graph.replay()
        with torch.no_grad(), lora_routed(model, strengths, names=NAMES):
            torch.testing.assert_close(y, model(x), rtol=1e-3, atol=1e-4)
