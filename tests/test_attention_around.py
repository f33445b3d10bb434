"""Torch's attention in activation space beside all else that reads or runs it."""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F  # noqa: N812 as everybody calls it
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from lora_param import (
    LoRAParametrization,
    disable_lora,
    lora_routed,
    lora_summary,
    register_lora,
)

from .attention_cases import CASES, CROSS, LONG, SHORT, Called, check, tensors
from .cases import adapted, shake


def test_only_torchs_attention_gets_what_is_not_the_sum() -> None:
    layer = adapted(nn.MultiheadAttention(8, 2))
    x, read = torch.randn(5, 2, 8), []
    look = lambda *_: read.extend([layer.in_proj_weight, layer.out_proj.weight])  # noqa: E731
    layer.register_forward_pre_hook(look)
    with parametrize.cached():
        layer(x, x, x)
        look()
    for each, owner, name in zip(read, [layer, layer.out_proj] * 2, ["in_proj_weight", "weight"] * 2, strict=True):  # fmt: skip
        assert type(each) is Tensor
        chain = owner.parametrizations[name]
        assert torch.equal(each, chain[0](chain.original))


def test_others_attention_and_others_linear_compute_with_the_sum(
    monkeypatch: pytest.MonkeyPatch, sums: list[Tensor]
) -> None:
    layer, x = adapted(nn.MultiheadAttention(8, 2)), torch.randn(5, 2, 8)
    want = layer(x, x, x)[0]
    for name in ("multi_head_attention_forward", "linear"):
        with monkeypatch.context() as patch:
            own = getattr(F, name)
            patch.setattr(F, name, lambda *args, own=own, **kwargs: own(*args, **kwargs))
            del sums[:]
            torch.testing.assert_close(layer(x, x, x)[0], want)
            assert sums


USES: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda x, weight: x @ weight.T,
    lambda x, weight: x @ weight.mT,
    lambda x, weight: x @ weight.data.t(),
    lambda x, weight: F.linear(x, weight=weight),
    lambda x, weight: F.linear(weight, x[0]),
    lambda x, weight: F.linear(x[..., :4], weight.split(4, 1)[1]),
    lambda x, weight: F.linear(x[..., :4], weight.chunk(2, dim=-1)[1]),
    lambda x, weight: F.linear(x, weight.split(16)[0].chunk(2)[1]),
]


@pytest.mark.parametrize("use", USES)
def test_an_attention_in_the_place_of_torchs_reads_the_sum_in_any_way(
    use: Callable[[Tensor, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = adapted(nn.MultiheadAttention(8, 2)), torch.randn(5, 2, 8)
    attend = lambda *args, **kwargs: (use(args[0], args[5]), None)  # noqa: E731
    monkeypatch.setattr(F, "multi_head_attention_forward", attend)
    torch.testing.assert_close(layer(x, x, x)[0], use(x, layer.in_proj_weight.detach()))


def test_an_attention_with_a_forward_of_its_instances_own_computes_in_weight_space_as_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, x, formed = adapted(nn.MultiheadAttention(8, 2)), torch.randn(5, 2, 8), []
    formula = LoRAParametrization.formula
    note = lambda delta, weight: formed.append(weight.shape) or formula(delta, weight)  # noqa: E731
    monkeypatch.setattr(LoRAParametrization, "formula", note)
    want = layer(x, x, x)[0]
    assert formed == []
    layer.forward = functools.partial(type(layer).forward, layer)
    torch.testing.assert_close(layer(x, x, x)[0], want)
    assert (24, 8) in formed
    assert lora_summary(layer).weights[0].space == "weight"


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace", "ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_a_trace_passes_torchs_check_and_computes_the_same() -> None:
    layer, x = adapted(nn.TransformerEncoderLayer(8, 2, 16)).eval(), torch.randn(5, 2, 8)
    torch.testing.assert_close(torch.jit.trace(layer, (x,))(x), layer(x))


@torch.no_grad()
def test_inference_keeps_no_model_alive() -> None:
    layer, x = adapted(nn.MultiheadAttention(8, 2)).eval(), torch.randn(5, 2, 8)
    disable_lora(layer)
    layer(x, x, x)
    kept = [weakref.ref(each) for each in layer.parameters()]
    del layer
    gc.collect()
    assert not any(each() is not None for each in kept)


@torch.no_grad()
def test_inference_on_the_meta_device_gives_a_shape() -> None:
    layer, x = adapted(nn.MultiheadAttention(8, 2)).to("meta"), torch.randn(5, 2, 8, device="meta")
    assert layer(x, x, x)[0].shape == x.shape


@pytest.mark.parametrize("case", ["self", "cross", "kdim and vdim"])
def test_transforms_checkpoints_and_functional_calls_give_the_same(case: str) -> None:
    make, shapes = CASES[case]
    layer, inputs = adapted(make().double()), tensors(*shapes)
    factors = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    total = lambda values: functional_call(layer, values, inputs)[0].square().sum()  # noqa: E731
    total(factors).backward()
    expected = [factor.grad for factor in factors.values()]
    layer.zero_grad()
    checkpoint(layer, *inputs, use_reentrant=False)[0].square().sum().backward()
    found = [[factor.grad for factor in factors.values()]]
    found += [[*grad(total)({n: p.detach() for n, p in factors.items()}).values()]]
    stacked = {n: torch.stack([p.detach()] * 2) for n, p in factors.items()}
    found += [[each[1] for each in vmap(grad(total))(stacked).values()]]
    for gradients in found:
        torch.testing.assert_close(gradients, expected)


def test_autocast_computes_in_its_dtype_and_close_to_float32() -> None:
    layer, x = adapted(nn.MultiheadAttention(8, 2, batch_first=True)), torch.randn(2, 5, 8)
    want = layer(x, x, x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x, x, x)[0]
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=0.1, atol=0.1)


def test_a_routed_batch_gives_each_row_its_own_adapter() -> None:
    layer, x = nn.MultiheadAttention(8, 2, batch_first=True).double(), torch.randn(3, 5, 8).double()
    for adapter in "ab":
        adapted(layer, adapter=adapter)
    with lora_routed(layer, ["a", None, "b"]):
        got = layer(x, x, x)[0]
    for row, adapter in enumerate(["a", None, "b"]):
        with lora_routed(layer, [adapter]):
            torch.testing.assert_close(got[row : row + 1], layer(*[x[row : row + 1]] * 3)[0])


def test_several_adapters_blocks_and_a_dense_one_beside_match_the_oracle() -> None:
    layer = Called(nn.MultiheadAttention(8, 2, batch_first=True), *CROSS).double()
    plain = copy.deepcopy(layer)
    adapted(layer, adapter="a", rank=3)
    adapted(layer, adapter="b", target=["*in_proj_weight[4:20]"])
    check(layer, plain, tensors(LONG, SHORT))
    register_lora(layer, adapter="c", target="*out_proj", kind="dense")
    shake(layer, "c")
    layer.zero_grad()
    check(layer, plain, tensors(LONG, SHORT))
