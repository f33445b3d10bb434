"""How exactly layers of few bits compute with adapters: their kernel's bits, and float32's rounding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lora_param import lora_disabled, lora_merged, merge_lora, register_lora

from .cases import shake
from .test_quantised import MODELS, bitsandbytes, meaning

EPS = torch.finfo(torch.float32).eps
OUT, IN, RANK, TOKENS, SCALE = 256, 64, 4, 5, 2.0


@pytest.fixture(params=MODELS)
def layer(request: pytest.FixtureRequest) -> nn.Module:
    make: Callable[[], nn.Module] = MODELS[request.param]
    return make()[0]  # type: ignore[index]


def adapted(layer: nn.Module) -> tuple[Tensor, Tensor]:
    register_lora(layer, rank=RANK, alpha=SCALE * RANK)
    shake(layer)
    lora = layer.parametrizations.weight[0]  # type: ignore[union-attr, index]
    return lora.lora_A, lora.lora_B


@pytest.mark.parametrize("train", [True, False])
def test_an_output_is_the_kernels_own_with_the_update_added(layer: nn.Module, train: bool) -> None:
    x = torch.randn(TOKENS, IN)
    A, B = adapted(layer.train(train))
    with lora_disabled(layer):
        base = layer(x)
    assert torch.equal(layer(x), torch.addmm(base, x @ A.t(), B.t(), alpha=SCALE))


def test_outputs_and_gradients_are_exact_but_for_float32s_rounding(layer: nn.Module) -> None:
    """Hold each entry to the bound of a sum of products in any order, `n eps` times its parts' sizes.

    Source: Higham, "Accuracy and Stability of Numerical Algorithms", equation 3.5.
    """
    W, b = meaning(layer.weight).double(), layer.bias.detach().double()
    x, g = torch.randn(TOKENS, IN, requires_grad=True), torch.randn(TOKENS, OUT)
    A, B = adapted(layer)
    y = layer(x)
    got = [y.detach(), *torch.autograd.grad(y, [x, A, B], g)]
    parts = [each.detach().double() for each in (x, g, A, B)]

    def results(W: Tensor, b: Tensor, x: Tensor, g: Tensor, A: Tensor, B: Tensor) -> list[Tensor]:
        up, down = g @ B * SCALE, x @ A.t()
        return [
            x @ W.t() + down @ B.t() * SCALE + b,
            g @ W + up @ A,
            up.t() @ x,
            g.t() @ down * SCALE,
        ]

    sizes = results(*(each.abs() for each in (W, b, *parts)))
    terms = OUT + RANK + 3  # as many as the longest of the sums has, and its factors
    for one, exact, size in zip(got, results(W, b, *parts), sizes, strict=True):
        assert ((one - exact).abs() <= terms * EPS * size).all()


def test_a_merged_weight_of_8_bits_has_the_dtype_of_the_models_others() -> None:
    packed = bitsandbytes("Linear8bitLt", has_fp16_weights=False)[0]  # type: ignore[index]
    model = nn.Sequential(nn.LayerNorm(IN, dtype=torch.bfloat16), packed)
    register_lora(model, rank=RANK)
    with lora_merged(model, dequantize=True):
        assert packed.weight.dtype is torch.bfloat16
    merge_lora(model, dequantize=True)
    assert packed.weight.dtype is torch.bfloat16
