"""Activation space: equal in meaning to the formula, in every way in which torch runs a layer."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils import parametrizations, parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from lora_param import (
    LoRAError,
    LoRAParametrization,
    TargetError,
    disable_lora,
    lora_parameters,
    lora_summary,
    named_lora_parameters,
    register_lora,
)

from .cases import CASES, Case, adapted, floats, images, indices, outputs, shake
from .reference import loss, reference

WEIGHT_SPACE = {
    "linear subclass", "conv2d grouped", "conv2d depthwise", "transposed conv1d",
    "transposed conv2d grouped", "transposed conv3d", "embedding bag", "bilinear", "attention",
    "attention batch first", "attention kdim vdim", "rnn", "gru bidirectional", "lstm",
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

ACTIVATION = [case for case in CASES if case.id not in WEIGHT_SPACE] + EXTRA
each_case = pytest.mark.parametrize("case", ACTIVATION, ids=lambda case: case.id)
SINGLE = [case for case in ACTIVATION if case.names == ("weight",) and "empty" not in case.id]
each_layer = pytest.mark.parametrize("case", SINGLE, ids=lambda case: case.id)
# A padding row is moved by a difference, and by no gradient.
SMOOTH = [case for case in SINGLE if getattr(case.make_layer(), "padding_idx", None) is None]
each_smooth = pytest.mark.parametrize("case", SMOOTH, ids=lambda case: case.id)
forward_mode = pytest.mark.filterwarnings(  # in torch's own code
    "ignore:.*torch.jit.script. is deprecated", "ignore:Please use .torch.vmap"
)


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


@pytest.mark.parametrize("case", CASES + EXTRA, ids=lambda case: case.id)
def test_the_summary_tells_each_weights_space(case: Case) -> None:
    layer, _ = build(case)
    spaces = {weight.name: weight.space for weight in lora_summary(layer).weights}
    in_weight_space = case.id in WEIGHT_SPACE
    assert spaces == {
        name: "weight" if in_weight_space or "self_attn" in name else "activation"
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


class Reading(nn.Module):
    """Computes with a layer's weight, and so in weight space."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer.weight.sin()


@forward_mode
@each_smooth
@pytest.mark.parametrize("adapters", [1, 2])
def test_it_differentiates_twice_forward_and_in_batches(case: Case, adapters: int) -> None:
    layer, inputs = build(case)
    for extra in range(1, adapters):
        case.adapt(layer, adapter=f"{extra}", rank=1)
        shake(layer)
    names = [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
    floating = [x for x in inputs if x.is_floating_point()]

    def run(*values: Tensor) -> Tensor:
        given = values[: len(floating)] or inputs
        factors = dict(zip(names, values[len(floating) :], strict=True))
        result: Tensor = functional_call(layer, factors, given)
        return result

    factors = [dict(layer.named_parameters())[name] for name in names]
    values = [value.detach().clone().requires_grad_() for value in (*floating, *factors)]
    torch.autograd.gradcheck(
        run, values, check_forward_ad=True, check_batched_grad=True, fast_mode=True
    )
    torch.autograd.gradgradcheck(run, values, fast_mode=True)


@each_layer
def test_per_sample_gradients_match_a_loop(case: Case) -> None:
    layer, (x,) = build(case)
    if x.dim() < 2 or "unbatched" in case.id:
        x = torch.stack([x, x])
    factors = {n: p.detach() for n, p in layer.named_parameters() if p.requires_grad}

    def total(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        result: Tensor = functional_call(layer, values, (sample,))
        return result.square().sum()

    batched = vmap(grad(total), (None, 0))(factors, x)
    for index, sample in enumerate(x):
        for name, expected in grad(total)(factors, sample).items():
            torch.testing.assert_close(batched[name][index], expected)


@each_layer
def test_many_adapters_can_be_run_at_once_by_vmap(case: Case) -> None:
    layer, (x,) = build(case)
    factors = {
        name: torch.randn(3, *p.shape, dtype=p.dtype)
        for name, p in layer.named_parameters()
        if p.requires_grad
    }
    together = vmap(lambda values: functional_call(layer, values, (x,)))(factors)
    for index in range(3):
        alone = functional_call(layer, {n: v[index] for n, v in factors.items()}, (x,))
        torch.testing.assert_close(together[index], alone)


@forward_mode
@each_smooth
def test_a_directional_derivative_matches_the_difference(case: Case) -> None:
    layer, (x,) = build(case)
    factors = {n: p.detach() for n, p in layer.named_parameters() if p.requires_grad}
    direction = {name: torch.randn_like(value) for name, value in factors.items()}

    def run(values: dict[str, Tensor]) -> Tensor:
        result: Tensor = functional_call(layer, values, (x,))
        return result

    _, tangent = jvp(run, (factors,), (direction,))
    step = 1e-6
    moved = run({name: value + step * direction[name] for name, value in factors.items()})
    torch.testing.assert_close((moved - run(factors)) / step, tangent, rtol=1e-3, atol=1e-4)


CHECKPOINTS = [
    pytest.param(case, reentrant, id=f"{case.id}-{reentrant}")
    for case in ACTIVATION
    # Torch's own rule: a reentrant block needs an input with a gradient, and indices have none.
    for reentrant in ([False, True] if "embedding" not in case.id else [False])
]


@pytest.mark.parametrize(("case", "reentrant"), CHECKPOINTS)
def test_checkpointing_gives_the_same_gradients(case: Case, reentrant: bool) -> None:
    layer, inputs = build(case)
    inputs = tuple(x.requires_grad_() if x.is_floating_point() else x for x in inputs)
    loss(outputs(layer, inputs)).backward()
    expected = [factor.grad.clone() for factor in lora_parameters(layer)]
    layer.zero_grad()
    again = checkpoint(layer, *inputs, use_reentrant=reentrant)
    loss([again]).backward()
    for factor, gradient in zip(lora_parameters(layer), expected, strict=True):
        torch.testing.assert_close(factor.grad, gradient)


@each_case
def test_autocast_matches_the_oracle_within_its_dtype(case: Case) -> None:
    layer, inputs = case.build()
    plain = copy.deepcopy(layer)
    case.adapt(layer)
    shake(layer)
    with torch.autocast("cpu", torch.bfloat16):
        check(layer, plain, inputs, 6e-2)


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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it itself
@each_case
def test_it_compiles_without_a_break(case: Case) -> None:
    torch._dynamo.reset()
    layer, inputs = build(case)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    inputs = tuple(x.requires_grad_() if x.is_floating_point() else x for x in inputs)
    loss(outputs(layer, inputs)).backward()
    expected = [factor.grad.clone() for factor in lora_parameters(layer)]
    layer.zero_grad()
    loss([compiled(*inputs)]).backward()
    for factor, gradient in zip(lora_parameters(layer), expected, strict=True):
        torch.testing.assert_close(factor.grad, gradient)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the exporter's own
@each_layer
def test_it_exports(case: Case) -> None:
    layer, inputs = build(case)
    exported = torch.export.export(layer, inputs).module()
    torch.testing.assert_close(exported(*inputs), layer(*inputs))


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
    adapted(layer)
    x = torch.randn(3, 6).double()
    assert lora_summary(layer).weights[0].space == "activation"
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_a_parametrization_behind_moves_the_layer_to_weight_space() -> None:
    layer, x = adapted(nn.Linear(6, 5)), torch.randn(3, 6)
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


DROPPING = {
    "linear": (lambda: nn.Linear(8, 5), floats(4, 8)),
    "conv1d": (lambda: nn.Conv1d(8, 5, 1), floats(4, 8, 3)),
    "transformers Conv1D": (lambda: Conv1D(5, 8), floats(4, 8)),
}


@pytest.mark.parametrize("layer", DROPPING)
def test_dropout_drops_the_adapters_input_alone(layer: str) -> None:
    model, (x,) = DROPPING[layer][0](), DROPPING[layer][1]()
    base = model(x)
    adapted(model, dropout=0.5)
    update = model.eval()(x) - base
    model.train()
    torch.manual_seed(0)
    dropped = model(x) - base
    torch.manual_seed(0)
    expected = model.eval()(nn.functional.dropout(x, 0.5)) - model(torch.zeros_like(x))
    with_base = copy.deepcopy(model)
    disable_lora(with_base)
    torch.manual_seed(0)
    expected -= with_base(nn.functional.dropout(x, 0.5)) - with_base(torch.zeros_like(x))
    torch.testing.assert_close(dropped, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(dropped, update)


def test_dropout_is_off_in_evaluation_and_spares_other_adapters() -> None:
    layer, x = nn.Linear(8, 5), torch.randn(4, 8)
    register_lora(layer, rank=2, adapter="a")
    register_lora(layer, rank=2, adapter="b", dropout=0.9)
    shake(layer, "a")
    assert torch.equal(layer.eval()(x), layer(x))
    torch.testing.assert_close(layer.train()(x), layer.eval()(x))
    shake(layer, "b")
    assert not torch.allclose(layer.train()(x), layer.eval()(x))


@pytest.mark.parametrize("dropout", [-0.1, 1, 1.5, float("nan"), True, "0.1", None])
def test_dropout_out_of_range_is_refused(dropout: Any) -> None:
    layer = nn.Linear(8, 5)
    with pytest.raises(LoRAError, match="dropout must satisfy 0 <= dropout < 1, got"):
        register_lora(layer, rank=2, dropout=dropout)
    assert type(layer) is nn.Linear


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.id in WEIGHT_SPACE], ids=lambda case: case.id
)
def test_dropout_is_refused_where_only_weight_space_is_possible(case: Case) -> None:
    layer, _ = case.build()
    with pytest.raises(
        TargetError, match="dropout needs a layer that computes in activation space"
    ):
        case.adapt(layer, dropout=0.1)
    assert not any(parametrize.is_parametrized(each) for each in layer.modules())


def test_reading_a_weight_under_dropout_warns_of_what_it_gets() -> None:
    layer = adapted(nn.Linear(8, 5), dropout=0.1)
    with pytest.warns(UserWarning, match="adapter 'default' has dropout, which needs its layer's"):
        Reading(layer)(torch.randn(2, 8))
    Reading(layer.eval())(torch.randn(2, 8))
    with torch.no_grad():
        assert layer.train().weight.shape == (5, 8)


def test_dropout_is_refused_for_indices() -> None:
    with pytest.raises(TargetError, match="an input to drop from, which a Embedding has not"):
        register_lora(nn.Embedding(7, 5), rank=2, target="weight", dropout=0.1)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it itself
@pytest.mark.parametrize(
    ("make", "shape"), [(lambda: nn.Linear(6, 5), (6,)), (lambda: nn.Conv2d(4, 5, 3), (4, 6, 6))]
)
def test_batches_of_any_size_compile_to_no_more_graphs_than_plain(make, shape) -> None:
    def graphs(layer: nn.Module) -> int:
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(layer, backend=counter)
        for batch in (4, 5, 60, 70, 300):
            compiled(torch.randn(batch, *shape))
        return int(counter.frame_count)

    plain = make().requires_grad_(False)
    assert graphs(adapted(copy.deepcopy(plain))) <= graphs(plain)


def test_a_dynamic_batch_exports() -> None:
    batch = torch.export.Dim("batch", min=2, max=4096)
    for make, x in (
        (lambda: nn.Linear(6, 5), torch.randn(4, 6)),
        (lambda: nn.Conv2d(4, 5, 3), torch.randn(4, 4, 6, 6)),
    ):
        layer = adapted(make())
        exported = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},)).module()
        more = torch.cat([x] * 30)
        torch.testing.assert_close(exported(more), layer(more), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")  # jit's own
@each_case
def test_a_trace_by_jit_gives_the_same(case: Case) -> None:
    layer, inputs = build(case)
    traced = torch.jit.trace(layer, inputs)
    torch.testing.assert_close(traced(*inputs), layer(*inputs))


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


def test_a_hook_on_an_adapter_acts_on_the_output() -> None:
    layer, x = adapted(nn.Linear(6, 5)), torch.randn(3, 6)
    layer.parametrizations.weight[0].register_forward_hook(lambda module, args, out: 2 * out)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it itself
def test_a_compiled_lookup_keeps_its_dtype_under_autocast() -> None:
    torch._dynamo.reset()
    layer, x = nn.Embedding(7, 5), torch.tensor([1, 2])
    adapted(layer, target="weight")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.compile(layer, backend="eager")(x).dtype == layer(x).dtype == torch.float32


class Gated(LoRAParametrization):
    """Another formula."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (super().forward(weight) - weight).tanh()


def by_hand(entry: LoRAParametrization) -> nn.Linear:
    """Register an adapter by hand behind one of ours, so that the class is ours too."""
    layer = adapted(nn.Linear(6, 5))
    parametrize.register_parametrization(layer, "weight", entry)
    with torch.no_grad():
        entry.lora_B.copy_(torch.randn(entry.lora_B.shape))
    return layer


HAND_MADE = {
    "a subclass": lambda: Gated(5, 6, 2, adapter="b"),
    "another matrix view": lambda: LoRAParametrization(6, 5, 2, adapter="b"),
    "a stack": lambda: LoRAParametrization(5, 3, 2, batch=(2,), adapter="b"),
    "a parametrized factor": lambda: parametrizations.weight_norm(
        LoRAParametrization(5, 6, 2, adapter="b"), "lora_A"
    ),
}


@pytest.mark.parametrize("entry", HAND_MADE)
def test_what_was_made_by_hand_is_computed_by_its_own_formula(entry: str) -> None:
    layer, x = by_hand(HAND_MADE[entry]()), torch.randn(3, 6)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


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
