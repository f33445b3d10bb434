"""Activation space: equal in meaning to the formula, and nothing of the weight's size is kept."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from lora_param import (
    activation,
    disable_lora,
    lora_parameters,
    lora_summary,
    register_lora,
)

from .activation_cases import (
    EXTRA,
    SINGLE,
    WEIGHT_SPACE,
    Reading,
    build,
    check,
    each_case,
)
from .cases import CASES, Case, adapted, floats, indices, outputs, shake


@pytest.mark.parametrize("case", CASES + EXTRA, ids=lambda case: case.id)
def test_the_summary_tells_each_weights_space(case: Case) -> None:
    layer, _ = build(case)
    spaces = {weight.name: weight.space for weight in lora_summary(layer).weights}
    by_cost = "activation" if "embedding" in case.id else "activation or weight, by cost"
    in_weight_space = case.id in WEIGHT_SPACE
    assert spaces == {
        name: by_cost if name == "out_proj.weight" or not in_weight_space else "weight"
        for name in case.names
    }


@each_case
@pytest.mark.parametrize("with_gradient", [True, False])
def test_any_shape_of_input_matches_the_oracle(case: Case, with_gradient: bool) -> None:
    layer, inputs = case.build(torch.float64)
    plain = copy.deepcopy(layer)
    case.adapt(layer)
    shake(layer)
    inputs = tuple(x.requires_grad_(with_gradient and x.is_floating_point()) for x in inputs)
    check(layer, plain, inputs, 1e-10)


@each_case
def test_a_fresh_adapter_keeps_the_bases_bits_and_strides(case: Case) -> None:
    layer, inputs = case.build()
    layer.requires_grad_(False)  # on which torch's own choice of kernel depends
    before = outputs(layer, inputs)
    case.adapt(layer)
    for got, want in zip(outputs(layer, inputs), before, strict=True):
        assert torch.equal(got, want)
        assert got.stride() == want.stride()


def saved_by(model: nn.Module, x: Tensor, size: int) -> set[int]:
    """Locate the storages of at least `size` bytes that a forward keeps for its backward."""
    storages = []

    def pack(tensor: Tensor) -> Tensor:
        storages.append(tensor.untyped_storage())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return {storage.data_ptr() for storage in storages if storage.nbytes() >= size}


SAVING: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "linear": (lambda: nn.Linear(96, 80), floats(4, 96)),
    "transformers Conv1D": (lambda: Conv1D(80, 96), floats(4, 96)),
    "conv2d": (lambda: nn.Conv2d(32, 40, 3), floats(1, 32, 4, 4)),
    "embedding": (lambda: nn.Embedding(100, 80), indices(4)),
}


@pytest.mark.parametrize("layer", SAVING)
def test_nothing_of_the_weights_size_is_held_for_backward(layer: str) -> None:
    model, x = SAVING[layer][0]().requires_grad_(False), SAVING[layer][1]()[0]
    size = model.weight.nbytes
    if x.is_floating_point():
        x.requires_grad_()
    floor = saved_by(model, x, size)
    adapted(model, target="weight")
    assert saved_by(model, x, size) == floor
    assert saved_by(Reading(model), x, size) - floor


@each_case
def test_float32_factors_serve_a_bfloat16_base(case: Case) -> None:
    layer, inputs = case.build(torch.bfloat16)
    plain = copy.deepcopy(layer)
    case.adapt(layer, dtype=torch.float32)
    shake(layer)
    check(layer, plain, inputs, 6e-2)
    assert {factor.grad.dtype for factor in lora_parameters(layer)} == {torch.float32}


def test_bfloat16_keeps_small_updates_that_weight_space_rounds_away() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    register_lora(layer, rank=4, dtype=torch.float32)
    shake(layer)
    lora = layer.parametrizations.weight[0]
    update = (lora.lora_B @ lora.lora_A).detach()
    lora.scale = float(1e-3 * layer.weight.detach().float().norm() / update.norm())
    update *= lora.scale
    x = torch.randn(100_000, 64).bfloat16()
    # The map that the outputs' differences follow, by least squares: rounding averages out, bias not.
    with torch.no_grad():
        change = layer(x).float() - x.float() @ layer.parametrizations.weight.original.float().T
    seen = torch.linalg.lstsq(x.float(), change).solution.T
    in_weight_space = layer.weight.float() - layer.parametrizations.weight.original.float()
    assert (seen - update).norm() < 0.1 * update.norm()
    assert (in_weight_space - update).norm() > 0.4 * update.norm()


@each_case
@pytest.mark.parametrize("rank", [1, 4])
def test_several_adapters_match_the_oracle(case: Case, rank: int) -> None:
    layer, inputs = case.build(torch.float64)
    plain = copy.deepcopy(layer)
    for adapter in "abc":
        case.adapt(layer, adapter, rank=min(rank, 3))
    shake(layer)
    disable_lora(layer, "b")
    check(layer, plain, inputs, 1e-10)


PRODUCTS = {"mm", "addmm", "addmm_", "baddbmm", "baddbmm_", "bmm", "convolution", "embedding"}


PASSES = {"mul", "mul_", "add", "add_", "clone", "copy_", "sum"}


class Operations(TorchDispatchMode):
    """Counts what a forward runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.sizes: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.calls[name] += 1
        if isinstance(result, Tensor):
            self.sizes[name] = max(self.sizes.get(name, 0), result.numel())
        return result


LARGE = [
    Case("linear", lambda: nn.Linear(64, 48), floats(100, 64)),
    Case("linear, sequences", lambda: nn.Linear(64, 48), floats(4, 25, 64)),
    Case("transformers Conv1D", lambda: Conv1D(48, 64), floats(100, 64)),
    Case("conv2d", lambda: nn.Conv2d(8, 48, 3), floats(2, 8, 12, 12)),
    Case("conv2d channels last", lambda: nn.Conv2d(8, 48, 3).to(memory_format=torch.channels_last), floats(2, 8, 12, 12)),
    Case("embedding", lambda: nn.Embedding(50, 48), lambda: (torch.randint(0, 50, (100,)),), target="weight"),
]  # fmt: skip


@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.id)
@pytest.mark.parametrize("adapters", ["a", "abc"])
def test_any_number_of_adapters_is_one_product_and_no_pass_over_the_output(
    case: Case, adapters: str
) -> None:
    layer, inputs = case.build()
    with Operations() as plain:
        size = layer(*inputs).numel()
    for adapter in adapters:
        case.adapt(layer, adapter)
    shake(layer)
    with Operations() as seen:
        layer(*inputs)
    products = sum(seen.calls[name] - plain.calls[name] for name in PRODUCTS)
    assert products == 2
    passes = {name for name in PASSES & seen.sizes.keys() if seen.sizes[name] >= size}
    assert passes <= {name for name in plain.sizes if plain.sizes[name] >= size}


def test_a_parametrization_in_front_stays_in_activation_space() -> None:
    layer = parametrizations.weight_norm(nn.Linear(6, 5)).double()
    adapted(layer, space="activation")
    x = torch.randn(3, 6).double()
    assert lora_summary(layer).weights[0].space == "activation"
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_a_parametrization_behind_moves_the_layer_to_weight_space() -> None:
    layer, x = adapted(nn.Linear(6, 5)), torch.randn(3, 6)
    layer(x)  # after which how to compute is known
    parametrize.register_parametrization(layer, "weight", nn.Tanh())
    assert lora_summary(layer).weights[0].space == "weight"
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_the_argument_can_be_named_and_a_wrong_call_fails_as_it_does_without() -> None:
    plain = nn.Linear(6, 5)
    layer, x = adapted(copy.deepcopy(plain)), torch.randn(3, 6)
    assert torch.equal(layer(input=x), layer(x))
    for call in (lambda f: f(), lambda f: f(x, x), lambda f: f(wrong=x), lambda f: f(None)):
        with pytest.raises(TypeError) as expected:
            call(plain)
        with pytest.raises(TypeError) as got:
            call(layer)
        assert str(got.value) == str(expected.value)


# Stock unbatched convolutions give views too, and a product permuted to channels last is one.
FRESH = [case for case in SINGLE if not any(each in case.id for each in ("unbatched", "last"))]


@pytest.mark.parametrize("case", FRESH, ids=lambda case: case.id)
def test_an_output_can_be_changed_in_place(case: Case) -> None:
    layer, inputs = build(case)
    with torch.no_grad():
        y = layer(*inputs)
    y += torch.ones_like(y, requires_grad=True)
    layer(*inputs).detach_()


def test_a_method_that_somebody_has_replaced_is_called() -> None:
    layer, x = nn.Conv2d(4, 5, 3), torch.randn(2, 4, 6, 6)
    layer._conv_forward = lambda x, weight, bias: nn.functional.conv2d(x, 2 * weight, bias)
    plain = copy.deepcopy(layer)
    adapted(layer)
    assert lora_summary(layer).weights[0].space == "weight"
    expected = nn.functional.conv2d(x, 2 * layer.weight, plain.bias)
    torch.testing.assert_close(layer(x), expected)


def test_a_forward_that_somebody_has_patched_into_the_class_is_called(monkeypatch) -> None:
    layer, x = adapted(nn.Linear(6, 5)), torch.randn(3, 6)
    expected = layer(x)
    stock = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, input: stock(self, input) + 1)
    torch.testing.assert_close(layer(x), expected + 1)
    another = adapted(nn.Linear(6, 5))
    wanted = nn.functional.linear(x, another.weight, another.bias) + 1
    torch.testing.assert_close(another(x), wanted)


def test_a_forward_that_was_patched_before_its_class_was_seen_is_called(monkeypatch) -> None:
    stock = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, input: stock(self, input) + 1)
    layer, x = adapted(type("Unseen", (nn.Linear,), {})(6, 5)), torch.randn(3, 6)
    wanted = nn.functional.linear(x, layer.weight, layer.bias) + 1
    torch.testing.assert_close(layer(x), wanted)


@pytest.mark.parametrize(
    ("name", "layer", "inputs"),
    [
        ("linear", nn.Linear(6, 5), floats(3, 6)),
        ("conv2d", nn.Conv2d(4, 5, 3), floats(2, 4, 6, 6)),
        ("embedding", nn.Embedding(7, 5), indices(3)),
    ],
)
def test_a_function_of_torchs_that_somebody_has_replaced_is_called(
    name: str, layer: nn.Module, inputs: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted(layer, target="weight")
    stock, given = getattr(nn.functional, name), inputs()
    expected = 2 * layer(*given)
    monkeypatch.setattr(nn.functional, name, lambda *args: 2 * stock(*args))
    torch.testing.assert_close(layer(*given), expected)


@each_case
def test_inference_without_a_graph_gives_the_same(case: Case) -> None:
    layer, inputs = build(case)
    expected = outputs(layer, inputs)
    with torch.no_grad():
        without = outputs(layer, inputs)
    with torch.inference_mode():
        inference = outputs(layer, inputs)
    for want, *got in zip(expected, without, inference, strict=True):
        assert all(torch.allclose(want, each, rtol=1e-12, atol=1e-12) for each in got)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
def test_a_nested_input_gives_what_its_parts_give(layout: torch.layout) -> None:
    layer, parts = adapted(nn.Linear(6, 5)), [torch.randn(2, 6), torch.randn(3, 6)]
    nested = layer(torch.nested.nested_tensor(parts, layout=layout))
    for got, part in zip(nested.unbind(), parts, strict=True):
        torch.testing.assert_close(got, layer(part))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="mkldnn isn't built in")
def test_an_input_of_another_layout_gives_what_a_strided_one_gives() -> None:
    layer, x = adapted(nn.Linear(6, 5)), torch.randn(3, 6)
    with torch.no_grad():
        torch.testing.assert_close(layer(x.to_mkldnn()).to_dense(), layer(x))


def test_adding_in_place_under_a_graph_costs_no_copy_of_the_gradient() -> None:
    (layer, inputs), copies = LARGE[3].build(), []  # a convolution
    for adapting in (False, True):
        if adapting:
            adapted(layer, space="activation")
        y = layer(*inputs)
        with Operations() as seen:
            y.backward(torch.ones_like(y))
        copies.append(sum(seen.calls[name] for name in ("clone", "copy_", "as_strided")))
    assert copies[1] <= copies[0]


def test_a_switch_while_it_is_found_out_how_to_compute_is_not_lost(monkeypatch) -> None:
    plain = nn.Linear(6, 5).requires_grad_(False)
    layer, x = adapted(copy.deepcopy(plain)), torch.randn(3, 6)
    misfits, switched = activation._misfits, []

    def switching(*args: Any) -> bool:
        if not switched:
            switched.append(disable_lora(layer))
        return misfits(*args)

    monkeypatch.setattr(activation, "_misfits", switching)
    layer(x)
    assert switched
    assert torch.equal(layer(x), plain(x))
