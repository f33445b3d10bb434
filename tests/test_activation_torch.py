"""Activation space in every way in which torch runs a layer: derivatives, batches, compilers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

from lora_param import lora_parameters

from .activation_cases import (
    ACTIVATION,
    build,
    check,
    each_case,
    each_layer,
    each_smooth,
)
from .cases import Case, adapted, outputs, shake
from .reference import loss

forward_mode = pytest.mark.filterwarnings(  # in torch's own code
    "ignore:.*torch.jit.script. is deprecated", "ignore:Please use .torch.vmap"
)


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


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it itself
def test_a_compiled_lookup_keeps_its_dtype_under_autocast() -> None:
    torch._dynamo.reset()
    layer, x = nn.Embedding(7, 5), torch.tensor([1, 2])
    adapted(layer, target="weight")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.compile(layer, backend="eager")(x).dtype == layer(x).dtype == torch.float32
