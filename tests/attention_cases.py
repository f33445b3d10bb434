"""Calls of torch's attention and of the layers that have one, and how one is held to the oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_param import named_lora_parameters

from .cases import outputs
from .reference import loss, reference


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
