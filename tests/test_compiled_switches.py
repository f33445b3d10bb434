"""Numbers and switches of adapters that change while a model is compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from lora_param import LoRAParametrization, lora_routed, register_lora, select_lora

from .cases import shake

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's look

LIMIT = (
    "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
)


class Attended(nn.Module):
    """A model that computes in weight space."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2)

    def forward(self, x: Tensor) -> Any:
        return self.attention(x, x, x)[0]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "activation space": lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)),
    "weight space": Attended,
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    model = MODELS[request.param]()
    for index in range(4):
        register_lora(model, rank=2, adapter=f"a{index}")
    shake(model)
    return model


def graphs(model: nn.Module, changes: Sequence[Callable[[], object]]) -> int:
    """Count the graphs of a compiled model that gives after each change what the model gives."""
    torch._dynamo.reset()
    counter, x = CompileCounter(), torch.randn(3, 2, 6)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch._dynamo.config.patch({LIMIT: 16}):
        for change in changes:
            change()
            torch.testing.assert_close(compiled(x), model(x))
    return int(counter.frame_count)


def rescale(model: nn.Module, scale: float) -> None:
    for module in model.modules():
        if isinstance(module, LoRAParametrization):
            module.scale = scale


def test_changing_a_scale_keeps_the_graph(model: nn.Module) -> None:
    select_lora(model, "a0")
    scales = (1.0, 0.5, 2.0, -1.0, 7.0, 0.1)
    changes = [lambda scale=scale: rescale(model, scale) for scale in scales]
    assert graphs(model, changes) <= 2  # of one value, and of any


def test_changing_strengths_keeps_the_graph(model: nn.Module) -> None:
    shares = [0.05 + index / 10 for index in range(5)]
    changes = [lambda s=s: select_lora(model, {"a0": s, "a1": 1 - s}) for s in shares]
    assert graphs(model, changes) <= 2


def test_coming_back_to_an_adapter_compiles_nothing(model: nn.Module) -> None:
    changes = [lambda index=index: select_lora(model, f"a{index}") for index in range(4)]
    once = graphs(model, changes)
    assert graphs(model, changes * 3) == once <= 4


@pytest.mark.skipif(torch.__version__ < "2.7", reason="no compiled code reads a context variable")
def test_ten_adapters_routed_by_their_names_share_one_graph() -> None:
    model, x = MODELS["activation space"](), torch.randn(3, 6)
    names = [f"a{index}" for index in range(10)]
    for name in names:
        register_lora(model, rank=2, adapter=name)
    shake(model)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for name in names:
        select_lora(model, name)
        expected = model(x)
        with lora_routed(model, [name] * 3, names=names):
            torch.testing.assert_close(compiled(x), expected)
    assert counter.frame_count == 1
