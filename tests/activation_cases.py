"""The layers that compute in activation space, and how one is held against the oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_param import named_lora_parameters

from .cases import CASES, Case, floats, images, indices, outputs, shake
from .reference import loss, reference

WEIGHT_SPACE = {
    "linear subclass", "conv2d grouped", "conv2d depthwise", "transposed conv1d",
    "transposed conv2d grouped", "transposed conv3d", "embedding bag", "bilinear", "attention",
    "attention batch first", "rnn", "gru bidirectional", "lstm",
    "lstm projected", "rnn cell", "gru cell", "lstm cell", "experts",
}  # fmt: skip


EXTRA = [
    Case("linear of a vector", lambda: nn.Linear(6, 5), floats(6)),
    Case("linear, five dimensions", lambda: nn.Linear(6, 5), floats(2, 1, 3, 2, 6)),
    Case("linear, transposed input", lambda: nn.Linear(6, 5), lambda: (torch.randn(6, 3).t(),)),
    Case("linear, permuted input", lambda: nn.Linear(6, 5), lambda: (torch.randn(3, 6, 2).permute(2, 0, 1),)),
    Case("linear, empty batch", lambda: nn.Linear(6, 5), floats(0, 6)),
    Case("linear, empty batch of sequences", lambda: nn.Linear(6, 5), floats(0, 3, 6)),
    Case("transformers Conv1D, sequences", lambda: Conv1D(5, 6), floats(2, 3, 6)),
    Case("conv2d unbatched", lambda: nn.Conv2d(4, 5, 3), floats(4, 6, 6)),
    Case("conv2d empty batch", lambda: nn.Conv2d(4, 5, 3), floats(0, 4, 6, 6)),
    Case("conv3d circular", lambda: nn.Conv3d(4, 5, 3, padding=1, padding_mode="circular"), images(3)),
    Case("conv2d channels last input", lambda: nn.Conv2d(4, 5, 3), lambda: (torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last),)),
    Case("embedding of one index", lambda: nn.Embedding(7, 5, padding_idx=2), lambda: (torch.tensor(2),), target="weight"),
    Case("embedding, empty", lambda: nn.Embedding(7, 5), indices(0, 3), target="weight"),
]  # fmt: skip


# What has one output; of attention see test_attention.py.
BOTH = [
    case for case in CASES if case.id not in WEIGHT_SPACE and case.id != "attention kdim vdim"
] + EXTRA


ACTIVATION = [replace(case, space="activation") for case in BOTH]


each_case = pytest.mark.parametrize("case", ACTIVATION, ids=lambda case: case.id)


SINGLE = [case for case in ACTIVATION if case.names == ("weight",) and "empty" not in case.id]


each_layer = pytest.mark.parametrize("case", SINGLE, ids=lambda case: case.id)


# A padding row is moved by a difference, and by no gradient.
SMOOTH = [case for case in SINGLE if getattr(case.make_layer(), "padding_idx", None) is None]


each_smooth = pytest.mark.parametrize("case", SMOOTH, ids=lambda case: case.id)


def build(case: Case, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    layer, inputs = case.build(dtype)
    case.adapt(layer, **options)
    shake(layer)
    return layer, inputs


def check(layer: nn.Module, plain: nn.Module, inputs: tuple[Tensor, ...], tolerance: float) -> None:
    """Hold outputs and gradients against the oracle."""
    expected = reference(plain, layer, inputs)
    actual = outputs(layer, inputs)
    loss(actual).backward()
    pairs = list(zip(actual, expected.outputs, strict=True))
    factors = dict(named_lora_parameters(layer))
    pairs += [(factors[name].grad, want) for name, want in expected.factor_gradients.items()]
    for got, want in pairs:
        atol = tolerance * max([1.0, *want.abs().flatten().tolist()])
        torch.testing.assert_close(got.detach().double(), want, rtol=0, atol=atol)


class Reading(nn.Module):
    """Computes with a layer's weight, and so in weight space."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer.weight.sin()
