"""Torch's attention and transformer layers in activation space, held against the oracle."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 as everybody calls it

from lora_param import (
    attention,
    lora_merged,
    lora_parameters,
    lora_summary,
    register_lora,
)

from .attention_cases import (
    CASES,
    PADDING,
    SELF,
    Called,
    check,
    each_case,
    tensors,
)
from .cases import adapted, outputs, shake
from .reference import reference

BY_COST = "activation or weight, by cost"
WIDTH = 32


@pytest.fixture(params=[-1_000_000, attention.KERNEL], ids=["calls", "kernel"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave torch's kernels of several layers for the smallest layer, and stay in them."""
    monkeypatch.setattr(attention, "KERNEL", request.param)


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


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_fresh_layer_keeps_the_bits_until_it_has_learnt(mode: Any) -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, WIDTH, batch_first=True).eval()
    x = torch.randn(2, 5, WIDTH)
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
    layer = nn.TransformerEncoderLayer(WIDTH, 2, WIDTH, batch_first=True).eval()
    adapted(layer, target=target, space="activation")
    x = torch.randn(1, 2, WIDTH)
    with torch.no_grad():
        layer(x)
        del sums[:]
        got = layer(x)
        assert not sums
        with lora_merged(layer):
            torch.testing.assert_close(got, layer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention_alone", [True, False])
def test_a_kernel_of_several_layers_gets_sums_that_are_formed_once(
    attention_alone: bool, sums: list[Tensor]
) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).eval()
    adapted(layer)
    x = torch.randn(2, 5, 8)
    del sums[:]
    with torch.no_grad():
        layer.self_attn(x, x, x) if attention_alone else layer(x)
    assert len(sums) == (2 if attention_alone else 4)


@pytest.mark.parametrize(("tokens", "formed"), [(2, 0), (96, 4)])
def test_inference_forms_sums_for_a_kernel_where_tokens_are_many(
    tokens: int, formed: int, sums: list[Tensor]
) -> None:
    layer = adapted(nn.TransformerEncoderLayer(256, 2, 256, batch_first=True).eval())
    x = torch.randn(1, tokens, 256)
    with torch.no_grad():
        layer(x)
        del sums[:]
        got = layer(x)
        assert len(sums) == formed
        with lora_merged(layer):
            torch.testing.assert_close(got, layer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(5, 2, 0), ()])
def test_an_input_that_torch_refuses_is_refused_by_torch(shape: tuple[int, ...]) -> None:
    layer, x = adapted(nn.MultiheadAttention(8, 2).eval()), torch.randn(shape)
    with torch.no_grad(), pytest.raises(AssertionError, match=r"embedding dimension|-D"):
        layer(x, x, x)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("target", [None, "layers.1.*", "*out_proj"])
def test_padding_and_nested_sequences_give_what_merged_weights_give(target: Any) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).double().eval()
    adapted(encoder, target=target)
    x = torch.randn(3, 5, 8).double()
    nested = torch.nested.nested_tensor([x[0], x[1][:3]])
    with torch.no_grad():
        got = encoder(x, src_key_padding_mask=PADDING), *encoder.layers[1](nested).unbind()
        with lora_merged(encoder):
            want = encoder(x, src_key_padding_mask=PADDING), *encoder.layers[1](nested).unbind()
    for each, expected in zip(got, want, strict=True):
        torch.testing.assert_close(each, expected)


def test_nothing_of_a_weights_size_is_kept_for_backward() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, WIDTH, batch_first=True)
    adapted(layer, space="activation")
    kept: list[Tensor] = []
    own = {each.untyped_storage().data_ptr() for each in layer.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        layer(torch.randn(1, 3, WIDTH))
    made = [each for each in kept if each.untyped_storage().data_ptr() not in own]
    assert not [each for each in made if each.shape[-2:] in {(WIDTH, WIDTH), (3 * WIDTH, WIDTH)}]


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


@pytest.mark.usefixtures("kernel")
def test_dropout_acts_without_a_gradient_too() -> None:
    layer = adapted(nn.MultiheadAttention(8, 2), dropout=0.5)
    x = torch.randn(5, 2, 8)
    with torch.no_grad():
        layer(x, x, x)
        assert not torch.allclose(layer(x, x, x)[0], layer(x, x, x)[0])
