"""Layers of all sorts under adapters of all kinds: compiled, exported, and as ONNX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_param import disable_lora, select_lora
from lora_param.deltas.pair import Pair

from .cases import CASES, outputs, shake

pytestmark = pytest.mark.filterwarnings("ignore")  # of compilers and exporters, about their own

NAMES = [f"a{index}" for index in range(10)]
BY_ID = {case.id: case for case in CASES}
TABLE = [
    ("linear", ["lora", "dora"]),
    ("conv2d", ["dora"]),
    ("conv2d grouped", ["pissa"]),
    ("embedding padded", ["dora"]),
    ("transformers Conv1D", ["lora", "dense"]),
    ("attention", ["dora", "dense"]),
    ("experts", ["dense"]),
]
each = pytest.mark.parametrize(("case", "kinds"), TABLE, ids=str)


def build(case: str, kinds: list[str]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Build a layer in eval mode with ten adapters of these kinds in turn."""
    layer, inputs = BY_ID[case].build()
    for index, name in enumerate(NAMES):
        BY_ID[case].adapt(layer, name, kinds[index % len(kinds)])
        shake(layer, name)
    return layer.eval(), inputs


def graphs(case: str, kinds: list[str], change: Callable[[nn.Module, Any], object], to: Any) -> int:
    """Count a compiled layer's graphs, which is right after each change."""
    layer, inputs = build(case, kinds)
    torch._dynamo.reset()
    found = []
    compiled = torch.compile(
        layer, backend=lambda graph, _: found.append(graph) or graph.forward, fullgraph=True
    )
    for each in to:
        change(layer, each)
        for one, other in zip(outputs(compiled, inputs), outputs(layer, inputs), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    return len(found)


@each
def test_ten_adapters_take_a_graph_for_each_kind(case: str, kinds: list[str]) -> None:
    assert graphs(case, kinds, select_lora, [*NAMES, *NAMES[:2]]) == len(kinds)


def rescale(layer: nn.Module, scale: float) -> None:
    for module in layer.modules():
        if isinstance(module, Pair):
            module.scale = scale


@each
def test_scales_of_adapters_that_act_together_take_two_graphs(case: str, kinds: list[str]) -> None:
    def change(layer: nn.Module, scale: float) -> None:
        select_lora(layer, NAMES[: len(kinds)])
        rescale(layer, scale)

    assert graphs(case, kinds, change, (1.0, 0.5, 2.0, -1.0, 7.0)) <= 2


@each
@pytest.mark.parametrize("switch", [lambda layer: select_lora(layer, NAMES[1]), disable_lora])
def test_what_is_exported_computes_the_same(case: str, kinds: list[str], switch: Any) -> None:
    layer, inputs = build(case, kinds)
    switch(layer)
    exported = torch.export.export(layer, inputs).module()
    for one, other in zip(outputs(exported, inputs), outputs(layer, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@each
def test_what_is_exported_to_onnx_computes_the_same(case: str, kinds: list[str]) -> None:
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    layer, inputs = build(case, kinds)
    select_lora(layer, NAMES[: len(kinds)])
    with torch.no_grad():
        model = torch.onnx.export(layer, inputs, dynamo=True, verbose=False).model_proto  # type: ignore[union-attr]
        expected = outputs(layer, inputs)
    names = [each.name for each in model.graph.input]
    given = {name: each.numpy() for name, each in zip(names, inputs, strict=True)}
    got = reference.ReferenceEvaluator(model).run(None, given)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(one), other, rtol=1e-4, atol=1e-5)
