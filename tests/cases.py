"""Every supported layer type as data: how to build it, what to feed it, what gets adapted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from transformers.pytorch_utils import Conv1D

from lora_param import lora_parameters, register_lora

from .kinds import KINDS


class Doubled(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * 2, self.bias)


class Experts(nn.Module):
    """A stack of matrices that no table lists."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 6, 4) / 2)
        self.gain = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("eoi,bi->beo", self.up, x) * self.gain


class SelfAttention(nn.MultiheadAttention):
    """Attention of one argument, so that a case has one input with a gradient."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x, x, x, need_weights=False)


def floats(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(*shape),)


def indices(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randint(0, 7, shape),)


def images(dimensions: int) -> Callable[[], tuple[Tensor, ...]]:
    return floats(2, 4, *[6] * dimensions)


@dataclass(frozen=True)
class Case:
    """One layer.

    Attributes:
        id: The test's id.
        make_layer: Builds it.
        make_input: Builds its arguments.
        names: What `register_lora` returns.
        target: What has to be named for that.
        space: Where it is computed.
    """

    id: str
    make_layer: Callable[[], nn.Module]
    make_input: Callable[[], tuple[Tensor, ...]]
    names: tuple[str, ...] = ("weight",)
    target: Any = None
    space: str = "auto"

    def build(
        self, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> tuple[nn.Module, tuple[Tensor, ...]]:
        torch.manual_seed(0)
        layer = self.make_layer().to(device, dtype)
        inputs = tuple(
            x.to(device, dtype) if x.is_floating_point() else x.to(device)
            for x in self.make_input()
        )
        return layer, inputs

    def adapt(
        self, layer: nn.Module, adapter: str = "default", kind: str = "lora", **options: Any
    ) -> list[str]:
        row = KINDS[kind]
        options = {"target": self.target, "kind": row.name, **row.options, **options}
        options = {"space": self.space, **options}
        return register_lora(layer, adapter=adapter, **options)


def shake(layer: nn.Module, adapter: str | None = None) -> None:
    """Give every adapter factors that change the output, as training would."""
    with torch.no_grad():
        for factor in lora_parameters(layer, adapter):
            factor.copy_(torch.randn(factor.shape) / 3)


def adapted(module: nn.Module, **options: Any) -> nn.Module:
    """Register adapters of rank 2 and give them factors that change the output."""
    register_lora(module, **{"rank": 2} | options)
    shake(module)
    return module


def outputs(layer: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Run a layer and flatten what it returns to its tensors."""
    leaves, _ = tree_flatten(layer(*inputs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def describe(layer: nn.Module) -> tuple[object, ...]:
    """All that `remove_lora` must restore, but for the bits."""
    return (
        [(name, type(module), module.training) for name, module in layer.named_modules()],
        [(name, id(p), p.requires_grad) for name, p in layer.named_parameters()],
        list(layer.state_dict()),
        [sorted(vars(module)) for module in layer.modules()],
    )


def recurrent(*names: str) -> tuple[str, ...]:
    return tuple(f"weight_{name}" for name in names)


QKV = ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")

CASES = [
    Case("linear", lambda: nn.Linear(6, 5), floats(3, 6)),
    Case("linear without bias, many dimensions", lambda: nn.Linear(6, 5, False), floats(2, 3, 4, 6)),
    Case("linear subclass", lambda: Doubled(6, 5), floats(3, 6)),
    Case("conv1d", lambda: nn.Conv1d(4, 5, 3), images(1)),
    Case("conv2d", lambda: nn.Conv2d(4, 5, 3, stride=2, padding=1), images(2)),
    Case("conv3d", lambda: nn.Conv3d(4, 5, 2), images(3)),
    Case("conv2d same", lambda: nn.Conv2d(4, 5, 3, padding="same"), images(2)),
    Case("conv2d grouped", lambda: nn.Conv2d(4, 6, 3, groups=2), images(2)),
    Case("conv2d depthwise", lambda: nn.Conv2d(4, 4, 3, groups=4), images(2)),
    Case("conv2d dilated", lambda: nn.Conv2d(4, 5, 3, dilation=2), images(2)),
    Case("conv1d reflect", lambda: nn.Conv1d(4, 5, 3, padding=1, padding_mode="reflect"), images(1)),
    Case("conv2d circular", lambda: nn.Conv2d(4, 5, 3, padding=1, padding_mode="circular"), images(2)),
    Case("conv2d replicate", lambda: nn.Conv2d(4, 5, 3, padding=1, padding_mode="replicate"), images(2)),
    Case("conv2d channels last", lambda: nn.Conv2d(4, 5, 3).to(memory_format=torch.channels_last), images(2)),
    Case("transposed conv1d", lambda: nn.ConvTranspose1d(4, 5, 3, stride=2), images(1)),
    Case("transposed conv2d grouped", lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), images(2)),
    Case("transposed conv3d", lambda: nn.ConvTranspose3d(4, 5, 2, output_padding=0), images(3)),
    Case("embedding", lambda: nn.Embedding(7, 5), indices(3, 4), target=nn.Embedding),
    Case("embedding padded", lambda: nn.Embedding(7, 5, padding_idx=2), indices(3, 4), target="weight"),
    Case("embedding bag", lambda: nn.EmbeddingBag(7, 5, mode="mean"), indices(3, 4), target="weight"),
    Case("bilinear", lambda: nn.Bilinear(4, 3, 5), lambda: (torch.randn(2, 4), torch.randn(2, 3))),
    Case("attention", lambda: SelfAttention(8, 2), floats(5, 2, 8), ("in_proj_weight", "out_proj.weight")),
    Case("attention batch first", lambda: SelfAttention(8, 2, batch_first=True), floats(2, 5, 8), ("in_proj_weight", "out_proj.weight"), nn.MultiheadAttention),
    Case("attention kdim vdim", lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=4), lambda: (torch.randn(5, 2, 8), torch.randn(3, 2, 6), torch.randn(3, 2, 4)), QKV),
    Case("rnn", lambda: nn.RNN(4, 5, 2), floats(3, 2, 4), recurrent("ih_l0", "hh_l0", "ih_l1", "hh_l1")),
    Case("gru bidirectional", lambda: nn.GRU(4, 5, bidirectional=True), floats(3, 2, 4), recurrent("ih_l0", "hh_l0", "ih_l0_reverse", "hh_l0_reverse")),
    Case("lstm", lambda: nn.LSTM(4, 5, batch_first=True), floats(2, 3, 4), recurrent("ih_l0", "hh_l0")),
    Case("lstm projected", lambda: nn.LSTM(4, 6, proj_size=3), floats(3, 2, 4), recurrent("ih_l0", "hh_l0", "hr_l0")),
    Case("rnn cell", lambda: nn.RNNCell(4, 5), floats(2, 4), recurrent("ih", "hh")),
    Case("gru cell", lambda: nn.GRUCell(4, 5), floats(2, 4), recurrent("ih", "hh")),
    Case("lstm cell", lambda: nn.LSTMCell(4, 5), floats(2, 4), recurrent("ih", "hh")),
    Case("transformers Conv1D", lambda: Conv1D(5, 6), floats(3, 6)),
    Case("experts", Experts, floats(2, 4), ("up",), "up"),
    Case("sequential", lambda: nn.Sequential(nn.Conv1d(4, 5, 3), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(4, 3)), images(1), ("0.weight", "3.weight")),
    Case("transformer layer", lambda: nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0), floats(5, 2, 8), ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")),
]  # fmt: skip

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
