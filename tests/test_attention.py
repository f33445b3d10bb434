"""Torch's attention and transformer layers in activation space, held against the oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F  # noqa: N812 as everybody calls it
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from lora_param import (
    LoRAParametrization,
    lora_merged,
    lora_parameters,
    lora_routed,
    lora_summary,
    named_lora_parameters,
    register_lora,
)
from lora_param.attention import NARROW

from .cases import adapted, outputs, shake
from .reference import loss, reference

BY_COST = "activation or weight, by cost"
WIDE = 2 * NARROW


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """List the weights whose sum with a delta is formed from now on."""
    seen: list[Tensor] = []
    for name in ("sum", "formula"):
        own = getattr(LoRAParametrization, name)
        form = lambda self, weight, own=own: seen.append(weight) or own(self, weight)  # noqa: E731
        monkeypatch.setattr(LoRAParametrization, name, form)
    return seen


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)


class Called(nn.Module):
    """An attention, or a layer with one, that is called with certain arguments."""

    def __init__(self, inner: nn.Module, *order: int, **options: Any) -> None:
        super().__init__()
        self.inner, self.order, self.options = inner, order, options

    def forward(self, *given: Tensor) -> Any:
        return self.inner(*(given[index] for index in self.order), **self.options)


def attention(*order: int, batch_first: bool = True, **options: Any) -> Callable[[], nn.Module]:
    """Make an attention whose query, key and value are which of the inputs."""
    own = {k: options.pop(k) for k in [*options] if k in ("bias", "kdim", "vdim", "add_bias_kv", "add_zero_attn")}  # fmt: skip
    return lambda: Called(nn.MultiheadAttention(8, 2, batch_first=batch_first, **own), *order, **options)  # fmt: skip


SELF, CROSS, APART = (0, 0, 0), (0, 1, 1), (0, 1, 2)
LONG, SHORT = (3, 5, 8), (3, 4, 8)
PADDING = torch.arange(5) >= torch.tensor([5, 3, 4])[:, None]  # of keys as long as the queries
CAUSAL = torch.ones(5, 5).triu(1).bool()

# What is made, and the shapes of its inputs.
CASES = {
    "self": (attention(*SELF), [LONG]),
    "self, outputs alone": (attention(*SELF, need_weights=False), [LONG]),
    "self, weights by head": (attention(*SELF, average_attn_weights=False), [LONG]),
    "self, sequence first": (attention(*SELF, batch_first=False), [LONG]),
    "self, unbatched": (attention(*SELF), [(5, 8)]),
    "self, without biases": (attention(*SELF, bias=False), [LONG]),
    "self, padding": (attention(*SELF, key_padding_mask=PADDING), [LONG]),
    "self, mask": (attention(*SELF, attn_mask=CAUSAL, need_weights=False), [LONG]),
    "self, mask by head": (attention(*SELF, attn_mask=CAUSAL.expand(6, 5, 5)), [LONG]),
    "self, float mask": (attention(*SELF, attn_mask=CAUSAL.double() * -2), [LONG]),
    "self, both masks": (attention(*SELF, attn_mask=CAUSAL, key_padding_mask=PADDING), [LONG]),
    "self, causal": (attention(*SELF, attn_mask=CAUSAL, is_causal=True, need_weights=False), [LONG]),
    "cross": (attention(*CROSS), [LONG, SHORT]),
    "cross, sequence first": (attention(*CROSS, batch_first=False, need_weights=False), [LONG, (2, 5, 8)]),
    "cross, unbatched": (attention(*CROSS, need_weights=False), [(5, 8), (4, 8)]),
    "cross, padding": (attention(*CROSS, key_padding_mask=PADDING), [SHORT, LONG]),
    "apart": (attention(*APART, need_weights=False), [LONG, SHORT, SHORT]),
    "kdim and vdim": (attention(*APART, kdim=6, vdim=7), [LONG, (3, 4, 6), (3, 4, 7)]),
    "extra key and zeros": (attention(*CROSS, add_bias_kv=True, add_zero_attn=True), [LONG, SHORT]),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True), [LONG]),
    "decoder layer": (lambda: nn.TransformerDecoderLayer(8, 2, 12, 0.0), [LONG, (2, 5, 8)]),
}  # fmt: skip
each_case = pytest.mark.parametrize("case", CASES)


def check(layer: nn.Module, plain: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Hold outputs and all gradients against the oracle's."""
    expected = reference(plain, layer, tuple(x.detach() for x in inputs))
    actual = outputs(layer, inputs)
    loss(actual).backward()
    pairs = [*zip(actual, expected.outputs, strict=True)]
    pairs += [(x.grad, own) for x, own in zip(inputs, expected.input_gradients, strict=True)]
    factors = dict(named_lora_parameters(layer))
    pairs += [(factors[name].grad, own) for name, own in expected.factor_gradients.items()]
    for got, want in pairs:
        torch.testing.assert_close(got.double(), want, rtol=1e-9, atol=1e-9)


@each_case
@pytest.mark.parametrize("options", [{}, {"kind": "dora"}, {"init": "pissa"}], ids=str)
def test_outputs_and_gradients_match_the_oracle(
    case: str, options: dict[str, Any], sums: list[Tensor]
) -> None:
    make, shapes = CASES[case]
    layer = make().double()
    plain = copy.deepcopy(layer)
    adapted(layer, space="activation", **options)
    del sums[:]
    check(layer, plain, tensors(*shapes))
    assert not sums


@each_case
@pytest.mark.parametrize("space", ["auto", "activation", "weight"])
def test_inference_matches_the_oracle(case: str, space: str) -> None:
    make, shapes = CASES[case]
    layer = make().double().eval()
    plain = copy.deepcopy(layer)
    adapted(layer, space=space)
    inputs = tensors(*shapes)
    expected = reference(plain, layer, inputs)
    with torch.no_grad():
        for got, want in zip(outputs(layer, inputs), expected.outputs, strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("rank", "tokens", "pays"), [(2, 4, False), (32, 400, True)])
def test_both_sides_of_the_border_match_the_oracle(
    rank: int, tokens: int, pays: bool, sums: list[Tensor]
) -> None:
    layer = Called(nn.MultiheadAttention(48, 2, batch_first=True), *SELF).double()
    plain = copy.deepcopy(layer)
    adapted(layer, rank=rank, target="*in_proj_weight", space="auto" if pays else "activation")
    del sums[:]
    check(layer, plain, tensors((1, tokens, 48)))
    assert bool(sums) == pays


@each_case
def test_a_fresh_adapter_keeps_the_bits_in_training_and_in_inference(case: str) -> None:
    make, shapes = CASES[case]
    layer, inputs = make().double(), tensors(*shapes)
    for training in (True, False):
        layer.train(training)
        with torch.set_grad_enabled(training):
            before = outputs(layer, inputs)
            register_lora(layer, rank=2, adapter=f"{training}")
            for got, want in zip(outputs(layer, inputs), before, strict=True):
                assert torch.equal(got, want)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_fresh_wide_layer_keeps_the_bits_until_it_has_learnt(mode: Any) -> None:
    layer = nn.TransformerEncoderLayer(WIDE, 2, WIDE, batch_first=True).eval()
    x = torch.randn(2, 5, WIDE)
    with mode():
        before = layer(x)
    register_lora(layer, rank=2)
    with mode():
        assert torch.equal(layer(x), before)
        shake(layer)
        got = layer(x)
        with lora_merged(layer):
            torch.testing.assert_close(got, layer(x), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, before)


# Which space


def test_the_summary_says_the_space() -> None:
    class Own(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Any:  # type: ignore[override]
            return super().forward(x, x, x)

    said = {
        "activation": adapted(nn.MultiheadAttention(8, 2), space="activation"),
        BY_COST: adapted(nn.MultiheadAttention(8, 2, kdim=4)),
        "weight": adapted(Own(8, 2), target="in_proj_weight"),
    }
    for space, layer in said.items():
        assert {weight.space for weight in lora_summary(layer).weights} == {space}


@pytest.mark.parametrize("target", [None, "*linear1", "*out_proj", "*in_proj_weight"])
def test_inference_of_a_wide_transformer_forms_no_sum(target: Any, sums: list[Tensor]) -> None:
    layer = nn.TransformerEncoderLayer(WIDE, 2, WIDE, batch_first=True).eval()
    adapted(layer, target=target, space="activation")
    x = torch.randn(1, 2, WIDE)
    with torch.no_grad():
        layer(x)
        del sums[:]
        got = layer(x)
        assert not sums
        with lora_merged(layer):
            torch.testing.assert_close(got, layer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("width", [8, WIDE])
@pytest.mark.parametrize("target", [None, "layers.1.*", "*out_proj"])
def test_padding_and_nested_sequences_give_what_merged_weights_give(
    width: int, target: Any
) -> None:
    layer = nn.TransformerEncoderLayer(width, 2, 12, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).double().eval()
    adapted(encoder, target=target)
    x = torch.randn(3, 5, width).double()
    nested = torch.nested.nested_tensor([x[0], x[1][:3]])
    with torch.no_grad():
        got = encoder(x, src_key_padding_mask=PADDING), *encoder.layers[1](nested).unbind()
        with lora_merged(encoder):
            want = encoder(x, src_key_padding_mask=PADDING), *encoder.layers[1](nested).unbind()
    for each, expected in zip(got, want, strict=True):
        torch.testing.assert_close(each, expected)


def test_nothing_of_a_weights_size_is_kept_for_backward() -> None:
    layer = adapted(nn.TransformerEncoderLayer(WIDE, 2, WIDE, batch_first=True))
    kept: list[Tensor] = []
    own = {each.untyped_storage().data_ptr() for each in layer.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        layer(torch.randn(1, 3, WIDE))
    made = [each for each in kept if each.untyped_storage().data_ptr() not in own]
    assert max(each.numel() for each in made) < WIDE * WIDE


def test_bfloat16_loses_nothing_of_a_small_update() -> None:
    errors = []
    for space in ("activation", "weight"):
        torch.manual_seed(0)
        layer = nn.MultiheadAttention(32, 2, batch_first=True).bfloat16()
        x = torch.randn(2, 5, 32).bfloat16()
        base = layer(x, x, x)[0].double()
        register_lora(layer, rank=2, dtype=torch.float32, target="out_proj", space=space)
        with torch.no_grad():
            for factor in lora_parameters(layer):
                factor.copy_(torch.randn(factor.shape) / 50)
        exact = copy.deepcopy(layer).double()
        want = exact(*[x.double()] * 3)[0]
        with torch.no_grad():
            exact.out_proj.parametrizations.weight[0].lora_B.zero_()
        update = want - exact(*[x.double()] * 3)[0]
        errors.append(((layer(x, x, x)[0].double() - base - update).norm() / update.norm()).item())
    assert errors[0] < errors[1]


# Dropout


def test_dropout_drops_what_is_in_front_of_each_projection() -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True).double()
    adapted(layer, dropout=0.5)
    x = torch.randn(2, 5, 8).double()
    A, B = layer.parametrizations.in_proj_weight[0]._both
    C, D = layer.out_proj.parametrizations.weight[0]._both
    W, V = (chain.original for chain in (layer.parametrizations.in_proj_weight, layer.out_proj.parametrizations.weight))  # fmt: skip
    torch.manual_seed(0)
    got = layer(x, x, x)[0]
    torch.manual_seed(0)
    rows = x.transpose(0, 1).reshape(-1, 8)
    q, k, v = (
        (rows @ W.T + F.dropout(rows, 0.5) @ A.T @ B.T).view(5, 2, 3, 2, 4).permute(2, 1, 3, 0, 4)
    )
    heads = F.scaled_dot_product_attention(q, k, v).permute(2, 0, 1, 3).reshape(-1, 8)
    want = heads @ V.T + F.dropout(heads, 0.5) @ C.T @ D.T + layer.out_proj.bias
    torch.testing.assert_close(got, want.view(5, 2, 8).transpose(0, 1))
    assert not torch.allclose(got, layer(x, x, x)[0])
    assert torch.equal(layer.eval()(x, x, x)[0], layer(x, x, x)[0])


@pytest.mark.parametrize("width", [8, WIDE])
def test_dropout_acts_without_a_gradient_too(width: int) -> None:
    layer = adapted(nn.MultiheadAttention(width, 2), dropout=0.5)
    x = torch.randn(5, 2, width)
    with torch.no_grad():
        layer(x, x, x)
        assert not torch.allclose(layer(x, x, x)[0], layer(x, x, x)[0])


# Who else reads or runs it


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
