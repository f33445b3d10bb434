"""Routed batches among selections, tasks and adapters that come while they are routed."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from torch import nn

from lora_param import (
    LoRAError,
    lora_disabled,
    lora_routed,
    lora_selected,
    named_lora_parameters,
    register_lora,
)

from .cases import Case, shake
from .test_route import NAMES, build, close, linear, one_by_one


@pytest.mark.parametrize("block", [lora_selected, lora_disabled])
def test_the_innermost_block_decides(block: Any) -> None:
    layer, x = linear(), torch.randn(2, 6).double()
    within = (layer, "c") if block is lora_selected else (layer,)
    with block(*within):
        want = layer(x)
        with lora_routed(layer, ["a", "b"]):
            routed = layer(x)
    with lora_routed(layer, ["a", "b"]):
        with block(*within):
            assert torch.equal(layer(x), want)
            with lora_routed(layer, ["a", "b"]):
                assert torch.equal(layer(x), routed)
        assert torch.equal(layer(x), routed)


def test_one_adapter_can_be_off_on_all_rows() -> None:
    layer, x = linear(), torch.randn(3, 6).double()
    with lora_routed(layer, [None, "b", {"b": 0.5}]):
        want = layer(x)
    with lora_routed(layer, ["a", "b", {"a": 2, "b": 0.5}]), lora_disabled(layer, "a"):
        close(layer(x), want)


@pytest.mark.parametrize("kind", ["lora", "dense"])
@pytest.mark.parametrize("target", ["weight", "bias"])
def test_a_new_adapter_acts_on_no_row_that_is_being_routed(kind: str, target: str) -> None:
    layer, x = linear(), torch.randn(3, 6).double()
    with lora_routed(layer, ["a", {"b": 0.5, "c": 2}, "a"]):
        want = layer(x)
        own = "dense" if target == "bias" else kind
        register_lora(layer, adapter="new", kind=own, target=target)
        shake(layer, "new")
        close(layer(x), want)
    with lora_routed(layer, ["new", None, "a"]):
        assert not torch.allclose(layer(x)[0], want[0])


@pytest.mark.parametrize(
    ("make", "shape"),
    [(lambda: nn.Linear(4, 2), (3, 5, 4)), (lambda: nn.Conv1d(4, 2, 3), (3, 4, 5))],
)
def test_a_trained_bias_is_each_rows_own(make: Any, shape: tuple[int, ...]) -> None:
    layer, x = make().double(), torch.randn(shape).double()
    for name in "ab":
        register_lora(layer, adapter=name, train="bias")
        shake(layer, name)
    rows: list[Any] = ["a", {"b": 1.0}, {"a": 0.5, "b": 2.0}]
    want = []
    for row, setting in enumerate(rows):
        with lora_selected(layer, setting):
            want.append(layer(x[row : row + 1]))
    with lora_routed(layer, rows):
        close(layer(x), torch.cat(want))


def test_a_projection_out_has_each_rows_bias_where_what_is_in_front_acts_on_no_row() -> None:
    attention, x = nn.MultiheadAttention(4, 2, batch_first=True).double(), torch.randn(3, 2, 4)
    register_lora(attention, rank=1, target="in_proj_weight", adapter="a")
    register_lora(attention, target=(), train="out_proj.bias", adapter="b")
    shake(attention)
    compute = lambda x: attention(x, x, x)[0]  # noqa: E731
    with lora_selected(attention, "b"):
        alone = compute(x.double())
    with lora_routed(attention, ["b", None, "b"]):
        together = compute(x.double())
    close(together[[0, 2]], alone[[0, 2]])
    assert not torch.allclose(together[1], alone[1])


@pytest.mark.parametrize("rows", [[{"a": 0.5}, None], [{"a": 0.5}] * 2])
def test_an_attention_in_inference_has_each_rows_strength(rows: list[Any]) -> None:
    attention, x = (
        nn.MultiheadAttention(4, 2, batch_first=True).double().eval(),
        torch.randn(2, 3, 4),
    )
    register_lora(attention, rank=1, adapter="a")
    shake(attention)
    compute = lambda x: attention(x, x, x)[0]  # noqa: E731
    with torch.no_grad():
        with lora_selected(attention, {"a": 0.5}):
            alone = compute(x.double())
        with lora_routed(attention, rows):
            close(compute(x.double())[0], alone[0])


def test_a_block_is_of_one_task() -> None:
    layer, x = linear(), torch.randn(2, 6).double()
    plain = layer(x)

    async def both() -> torch.Tensor:
        entered, done = asyncio.Event(), asyncio.Event()

        async def route() -> None:
            with lora_routed(layer, ["a", None]):
                entered.set()
                await done.wait()

        task = asyncio.create_task(route())
        await entered.wait()
        output: torch.Tensor = layer(x)
        done.set()
        await task
        return output

    assert torch.equal(asyncio.run(both()), plain)


def test_gathered_factors_keep_the_digits_of_a_strength() -> None:
    case = Case("", lambda: nn.Linear(6, 5), lambda: (torch.randn(3, 400, 6),))
    layer, _ = build(case, "lora")
    x, rows = torch.randn(3, 400, 6).double(), [{"a": 0.3}, {"b": 0.1}, {"c": -0.7}]
    with lora_routed(layer, rows):
        close(layer(x), one_by_one(layer, case, (x,), rows)[0])


def test_a_scale_is_not_rounded_to_the_strengths_dtype() -> None:
    layer = linear().float()
    x, strengths = torch.randn(3, 6), torch.eye(3)
    with lora_routed(layer, strengths, names=NAMES):
        want = layer(x)
    with lora_routed(layer, strengths.bfloat16(), names=NAMES):
        assert torch.equal(layer(x), want)


def test_sequences_in_front_are_known_by_the_layers_attention() -> None:
    make = lambda: nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0)  # noqa: E731
    case = Case("transformer layer", make, lambda: (torch.randn(6, 1, 8),), target="*.weight")
    torch.manual_seed(0)
    layer, x = make().double().eval(), torch.randn(6, 4, 8).double()  # two beams a row
    for name in NAMES:
        register_lora(layer, rank=2, adapter=name)
    shake(layer)
    want = one_by_one(layer, case, (x,), [{"a": 1.0}, {"a": 1.0}, {"b": 1.0}, {"b": 1.0}])
    with torch.no_grad(), lora_routed(layer, ["a", "b"]):
        close(layer(x), want[0])


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (lambda: nn.MultiheadAttention(8, 2, batch_first=True), [torch.randn(4, 8)] * 3),
        (lambda: nn.LSTM(8, 3, batch_first=True), [torch.randn(4, 8)]),
        (lambda: nn.Conv1d(4, 5, 3), [torch.randn(4, 8)]),
        (lambda: nn.EmbeddingBag(8, 5), [torch.arange(8), torch.tensor([0, 4])]),
    ],
    ids=["attention", "lstm", "convolution", "bag"],
)
def test_one_sample_has_no_rows(make: Any, inputs: Any) -> None:
    layer = make()
    target = None if isinstance(layer, nn.MultiheadAttention) else "weight*"
    for name in ("a", "b"):
        register_lora(layer, rank=1, adapter=name, target=target)
    with lora_routed(layer, ["a", "b"]), pytest.raises(LoRAError, match="can't hold 2 rows"):
        layer(*inputs)


@pytest.mark.parametrize("rows", [["a", "b", None], ["b", {"b": 0.5}, "c"]])
def test_blocks_of_rows_are_routed_beside_whole_weights(rows: list[Any]) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 9).double(), torch.randn(3, 40, 6).double()
    register_lora(layer, rank=2, adapter="a", target="weight[0:3]")
    register_lora(layer, rank=2, adapter="b", target=["weight[3:6]", "weight[6::2]"])
    register_lora(layer, rank=2, adapter="c")
    shake(layer)
    found = []
    for routed in (False, True):
        layer.zero_grad()
        if routed:
            with lora_routed(layer, rows):
                y = layer(x)
        else:
            parts = []
            for index, setting in enumerate(rows):
                with lora_selected(layer, setting):
                    parts.append(layer(x[index : index + 1]))
            y = torch.cat(parts)
        y.square().sum().backward()
        found.append([y, *(p.grad for _, p in named_lora_parameters(layer))])
    for got, want in zip(*found, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            close(got, want)
