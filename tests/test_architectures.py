"""Every small architecture of torchvision, and torch's own composites, against a dense oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from lora_param import (
    LoRAParametrization,
    assert_frozen,
    fingerprint,
    lora_parameters,
    lora_state_dict,
    lora_summary,
    register_lora,
    remove_lora,
)

from .architectures import FAMILIES, build, names
from .kinds import low_rank_slices

IN_EVERY_RUN = [
    ("classification", "mobilenet_v3_small"),
    ("classification", "resnet18"),
    ("classification", "shufflenet_v2_x0_5"),
    ("classification", "squeezenet1_1"),
    ("classification", "swin_t"),
    ("classification", "efficientnet_b0"),
    ("segmentation", "lraspp_mobilenet_v3_large"),
    ("detection", "fasterrcnn_mobilenet_v3_large_320_fpn"),
    ("detection", "ssdlite320_mobilenet_v3_large"),
    ("video", "r3d_18"),
    ("optical flow", "raft_small"),
]
"""A few of each family; `pytest -m zoo` runs all."""


def architectures() -> Iterator[Any]:
    for family in FAMILIES:
        for name in names(family):
            marks = [] if (family, name) in IN_EVERY_RUN else [pytest.mark.zoo]
            yield pytest.param(family, name, id=name, marks=marks)


def state(model: nn.Module) -> list[Any]:
    return [
        [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()],
        [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        list(model.state_dict()),
    ]


def shake_gently(model: nn.Module) -> None:
    """Give each update a tenth of its weight's size, so that deep networks stay finite."""
    with torch.no_grad():
        for factor in lora_parameters(model):
            factor.copy_(torch.randn(factor.shape))
        for module in model.modules():
            for name in getattr(module, "parametrizations", {}):
                lora = module.parametrizations[name][0]
                if not isinstance(lora, LoRAParametrization):
                    continue
                original = module.parametrizations[name].original
                size = (lora.lora_B @ lora.lora_A).norm() * abs(lora.scale)
                lora.lora_B.mul_(0.1 * original.norm() / size)


def oracle(plain: nn.Module, adapted: nn.Module) -> nn.Module:
    """Return a plain copy whose weights are set by the formula, ready to train as it is."""
    dense, factors = copy.deepcopy(plain), lora_state_dict(adapted)
    for weight in lora_summary(adapted).weights:
        for each in weight.adapters:
            pair = {f: factors[f"{weight.name}.{each.name}.{f}"] for f in ("lora_A", "lora_B")}
            original = dense.get_parameter(weight.name)
            original.data = low_rank_slices(original.detach(), pair, vars(each))
    return dense


def run(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    torch.manual_seed(1)
    leaves, _ = tree_flatten(model(*inputs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def close(left: list[Tensor], right: list[Tensor], ordered: bool = True) -> bool:
    """Say whether outputs differ by no more than what rounding grows to in a deep network."""
    if not ordered:
        left, right = ([each.flatten().sort().values for each in side] for side in (left, right))
    return len(left) == len(right) and all(
        a.shape == b.shape and bool((a - b).abs().max() <= ROUNDING[b.dtype] * (1 + b.abs().max()))
        for a, b in zip(left, right, strict=True)
        if b.numel()
    )


ROUNDING = {torch.float64: 1e-7, torch.float32: 1e-3, torch.int64: 0, torch.bool: 0}


@pytest.fixture(autouse=True)
def float64(request: pytest.FixtureRequest) -> Iterator[None]:
    """Leave rounding no room to hide an adapter that doesn't act."""
    if not any(name in request.node.name for name in ("raft", "swin_v2")):  # float32 by their code
        torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def check_against_oracle(
    model: nn.Module, inputs: dict[bool, tuple[Any, ...]], ordered: bool = True
) -> None:
    """Adapt a model and hold it against the oracle, training and not; then restore it.

    Args:
        model: The plain model.
        inputs: Arguments in training, under `True`, and in evaluation.
        ordered: Whether the outputs' order has a meaning.
    """
    plain, before, bits = copy.deepcopy(model), state(model), fingerprint(model)
    register_lora(model)
    shake_gently(model)
    dense, acts = oracle(plain, model), False
    for training in (False, True):
        for each in (plain, model, dense):
            each.train(training)
        with torch.set_grad_enabled(training):
            base, expected, actual = (run(each, inputs[training]) for each in (plain, dense, model))
        assert len(actual) == len(expected) > 0
        assert close(actual, expected, ordered)
        acts |= not close(actual, base, ordered)
    assert acts
    sum(leaf.sum() for leaf in actual if leaf.is_floating_point()).backward()
    gradients = [factor.grad for factor in lora_parameters(model)]
    assert all(grad is None or grad.isfinite().all() for grad in gradients)
    assert sum(grad is not None and bool(grad.any()) for grad in gradients) > len(gradients) // 2
    remove_lora(model.train(plain.training))
    assert state(model) == before
    assert_frozen(model, bits)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torchvision's own
@pytest.mark.parametrize(("family", "name"), list(architectures()))
def test_torchvision(family: str, name: str) -> None:
    torch.manual_seed(0)
    model = build(family, name)
    inputs = FAMILIES[family].inputs(name)
    evaluation = inputs[:1] if family == "detection" else inputs
    # A detector that knows nothing scores its boxes alike, so that rounding decides their order.
    check_against_oracle(model, {True: inputs, False: evaluation}, ordered=family != "detection")


def encoder(**options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2)


def sequences(*shapes: tuple[int, ...]) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: tuple(torch.randn(shape) for shape in shapes)


def padded() -> tuple[Any, ...]:
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    return torch.randn(2, 5, 8), None, padding


def labelled() -> tuple[Tensor, ...]:
    return torch.randn(6, 8), torch.tensor([0, 1, 5, 9, 12, 14])


COMPOSITES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]]]] = {
    "encoder": (encoder, sequences((2, 5, 8))),
    "encoder, gelu, norm first": (lambda: encoder(activation="gelu", norm_first=True), sequences((2, 5, 8))),
    "encoder, nested tensors": (encoder, padded),
    "decoder": (lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16), 2), sequences((5, 2, 8), (4, 2, 8))),
    "transformer": (lambda: nn.Transformer(8, 2, 1, 1, 16), sequences((5, 2, 8), (4, 2, 8))),
    "attention": (lambda: nn.MultiheadAttention(8, 2, dropout=0.1), sequences((5, 2, 8), (4, 2, 8), (4, 2, 8))),
    "attention, kdim and vdim": (lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=4), sequences((5, 2, 8), (4, 2, 6), (4, 2, 4))),
    "attention, extra biases": (lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True, add_zero_attn=True), sequences((5, 2, 8), (4, 2, 8), (4, 2, 8))),
    "lstm, bidirectional": (lambda: nn.LSTM(8, 5, 2, dropout=0.1, bidirectional=True), sequences((5, 2, 8))),
    "lstm, projected": (lambda: nn.LSTM(8, 5, proj_size=3), sequences((5, 2, 8))),
    "gru": (lambda: nn.GRU(8, 5, 2), sequences((5, 2, 8))),
    "adaptive softmax": (lambda: nn.AdaptiveLogSoftmaxWithLoss(8, 15, [5, 10], div_value=2.0), labelled),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("composite", COMPOSITES)
def test_torchs_composites(composite: str) -> None:
    torch.manual_seed(0)
    make, make_inputs = COMPOSITES[composite]
    inputs = make_inputs()
    check_against_oracle(make(), {True: inputs, False: inputs})
