"""The laws of the design, each over one table of cases."""

from __future__ import annotations

import copy
import io
import itertools

import pytest
import torch
from torch import Tensor, nn

from lora_param import (
    assert_frozen,
    disable_lora,
    enable_lora,
    fingerprint,
    lora_disabled,
    lora_parameters,
    lora_summary,
    merge_lora,
    named_lora_parameters,
    register_lora,
    remove_lora,
)
from lora_param.deltas.inits import DRAWS, STARTS
from lora_param.deltas.numbers import SCALINGS

from .cases import CASES, DEVICES, DTYPES, Case, describe, outputs, shake
from .kinds import KINDS
from .reference import loss, reference

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
each_device = pytest.mark.parametrize("device", DEVICES)
each_kind = pytest.mark.parametrize("kind", KINDS)

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Compare with a float64 reference, relative to the reference's largest entry."""
    atol = TOLERANCE[dtype] * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=atol)


def originals(layer: nn.Module, names: tuple[str, ...]) -> list[Tensor]:
    return [owner(layer, name).parametrizations[tensor(name)].original for name in names]


def owner(layer: nn.Module, name: str) -> nn.Module:
    return layer.get_submodule(name.rpartition(".")[0])


def tensor(name: str) -> str:
    return name.rpartition(".")[2]


@each_case
@each_kind
@each_dtype
@each_device
def test_law_1_a_fresh_adapter_leaves_the_output_equal(case: Case, kind, dtype, device) -> None:
    layer, inputs = case.build(dtype, device)
    before = outputs(layer, inputs)
    assert tuple(case.adapt(layer, kind=kind)) == case.names
    assert equal(outputs(layer, inputs), before)


@each_case
@each_kind
@each_dtype
@each_device
def test_law_2_reading_the_weight_gives_the_formula(case: Case, kind, dtype, device) -> None:
    layer, _ = case.build(dtype, device)
    case.adapt(layer, kind=kind)
    shake(layer)
    for name, W in zip(case.names, originals(layer, case.names), strict=True):
        delta = owner(layer, name).parametrizations[tensor(name)][0]
        tensors = dict([*delta.named_parameters(), *delta.named_buffers()])
        expected = KINDS[kind].formula(W, tensors, delta.numbers)
        assert torch.equal(getattr(owner(layer, name), tensor(name)), expected)
        assert not torch.equal(expected, W)


@each_case
@each_kind
@each_dtype
@each_device
def test_law_3_output_and_gradients_match_the_oracle(case: Case, kind, dtype, device) -> None:
    layer, inputs = case.build(dtype, device)
    plain = copy.deepcopy(layer)
    case.adapt(layer, kind=kind)
    shake(layer)
    agree(layer, plain, inputs, dtype)


def agree(
    layer: nn.Module, plain: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype
) -> None:
    """Hold output and gradients of an adapted layer against the oracle's."""
    expected = reference(plain, layer, inputs)
    inputs = tuple(x.requires_grad_() if x.is_floating_point() else x for x in inputs)
    actual = outputs(layer, inputs)
    loss(actual).backward()
    for got, want in zip(actual, expected.outputs, strict=True):
        close(got.detach(), want, dtype)
    for x, want in zip(inputs, expected.input_gradients, strict=True):
        if want is not None:
            close(x.grad, want, dtype)
    factors = dict(named_lora_parameters(layer))
    assert expected.factor_gradients.keys() == factors.keys()
    for name, want in expected.factor_gradients.items():
        close(factors[name].grad, want, dtype)


WAYS = [*itertools.product(("lora", "dora"), SCALINGS, (*DRAWS, *STARTS))]


@each_case
@pytest.mark.parametrize(("kind", "scaling", "init"), WAYS, ids=map(" ".join, WAYS))
def test_laws_1_and_3_hold_for_every_kind_scaling_and_start(
    case: Case, kind: str, scaling: str, init: str
) -> None:
    layer, inputs = case.build(torch.float64)
    plain, before = copy.deepcopy(layer), outputs(layer, inputs)
    assert tuple(case.adapt(layer, kind=kind, scaling=scaling, init=init)) == case.names
    assert equal(outputs(layer, inputs), before)
    shake(layer)
    agree(layer, plain, inputs, torch.float64)


@each_case
@each_kind
@each_dtype
@each_device
def test_law_4_disabled_gives_the_original_itself(case: Case, kind, dtype, device) -> None:
    layer, inputs = case.build(dtype, device)
    before = outputs(layer.requires_grad_(False), inputs)
    case.adapt(layer, kind=kind)
    shake(layer)
    assert not equal(outputs(layer, inputs), before)
    with lora_disabled(layer):
        for name, W in zip(case.names, originals(layer, case.names), strict=True):
            assert getattr(owner(layer, name), tensor(name)) is W
        assert equal(outputs(layer, inputs), before)
    assert not equal(outputs(layer, inputs), before)


@each_case
@each_kind
@each_device
def test_law_5_training_never_moves_an_original(case: Case, kind, device) -> None:
    layer, inputs = case.build(device=device)
    kept = {id(p): p.detach().clone() for p in layer.parameters()}
    before = fingerprint(layer)
    case.adapt(layer, kind=kind)
    optimizer = torch.optim.AdamW(lora_parameters(layer), lr=0.1, weight_decay=0.1)
    fresh = [factor.detach().clone() for factor in lora_parameters(layer)]
    for _ in range(3):
        optimizer.zero_grad()
        loss(outputs(layer, inputs)).backward()
        optimizer.step()
    assert not equal(list(lora_parameters(layer)), fresh)
    for parameter in layer.parameters():
        if id(parameter) in kept:
            assert torch.equal(parameter, kept.pop(id(parameter)))
            assert parameter.grad is None
    assert not kept
    assert_frozen(layer, before)


@each_case
@each_kind
@each_dtype
@each_device
def test_law_6_remove_gives_the_model_back(case: Case, kind, dtype, device) -> None:
    layer, inputs = case.build(dtype, device)
    list(layer.parameters())[-1].requires_grad_(False)
    before = describe(layer)
    bits = [p.detach().clone() for p in layer.parameters()]
    case.adapt(layer, kind=kind)
    case.adapt(layer, "second", kind)
    shake(layer)
    loss(outputs(layer, inputs)).backward()
    remove_lora(layer)
    assert describe(layer) == before
    assert equal(list(layer.parameters()), bits)
    assert type(layer) is type(case.make_layer())
    copy.deepcopy(layer)


def test_law_6_an_optimizer_state_saved_before_loads_after() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.LSTM(3, 5))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, 4))[0].sum().backward()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    register_lora(model, rank=2)
    remove_lora(model)
    after = torch.optim.Adam(model.parameters())
    after.load_state_dict(saved)
    for parameter, state in after.state.items():
        assert state["exp_avg"].shape == parameter.shape


@each_case
@each_kind
@each_dtype
@each_device
def test_law_7_merging_keeps_the_output_and_leaves_a_plain_module(
    case: Case, kind, dtype, device
) -> None:
    layer, inputs = case.build(dtype, device)
    layer.eval()
    before = describe(layer)
    case.adapt(layer, kind=kind)
    shake(layer)
    adapted = outputs(layer, inputs)
    merge_lora(layer)
    assert describe(layer) == before
    for got, want in zip(outputs(layer, inputs), adapted, strict=True):
        close(got.detach(), want.detach().double(), dtype)


@each_case
def test_law_11_a_call_that_raises_at_the_last_weight_changes_nothing(case: Case) -> None:
    layer, _ = case.build()
    model = nn.Sequential(layer, nn.Linear(9, 1))
    before, bits = describe(model), fingerprint(model)
    targets = [f"0.{name}" for name in case.names]
    with pytest.raises(ValueError, match=r"1\.weight: rank must satisfy 1 <= rank <= min\(1, 9\)"):
        register_lora(model, rank={"1": 2, "*": 2}, target=[*targets, "1"])
    assert describe(model) == before
    assert_frozen(model, bits)


@each_case
@each_kind
def test_several_adapters_add_up_and_leave_each_other_alone(case: Case, kind) -> None:
    layer, inputs = case.build(torch.float64)
    plain = copy.deepcopy(layer)
    case.adapt(layer, "a", kind)
    shake(layer)
    only_a = outputs(layer, inputs)
    factors = [factor.detach().clone() for factor in lora_parameters(layer, "a")]
    case.adapt(layer, "b", kind)
    for got, want in zip(outputs(layer, inputs), only_a, strict=True):
        close(got.detach(), want.detach(), torch.float64)
    shake(layer, "b")
    expected = reference(plain, layer, inputs).outputs
    for got, want in zip(outputs(layer, inputs), expected, strict=True):
        close(got.detach(), want, torch.float64)
    assert equal(list(lora_parameters(layer, "a")), factors)
    remove_lora(layer, "b")
    assert equal(outputs(layer, inputs), only_a)
    assert len(lora_summary(layer).weights) == len(case.names)


@each_case
@each_kind
def test_each_adapter_switches_by_itself(case: Case, kind) -> None:
    layer, inputs = case.build()
    before = outputs(layer.requires_grad_(False), inputs)
    case.adapt(layer, "a", kind)
    shake(layer)
    only_a = outputs(layer, inputs)
    case.adapt(layer, "b", kind)
    shake(layer, "b")
    disable_lora(layer, "b")
    assert equal(outputs(layer, inputs), only_a)
    disable_lora(layer)
    assert equal(outputs(layer, inputs), before)
    enable_lora(layer, "a")
    assert equal(outputs(layer, inputs), only_a)


@each_case
@each_kind
def test_law_9_a_deepcopy_is_independent_and_a_pickle_round_trips(case: Case, kind) -> None:
    layer, inputs = case.build()
    layer.eval().requires_grad_(False)
    before = outputs(layer, inputs)
    case.adapt(layer, kind=kind)
    shake(layer)
    loss(outputs(layer, inputs)).backward()
    adapted = outputs(layer, inputs)
    twin = copy.deepcopy(layer)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for copied in (twin, loaded):
        assert equal(outputs(copied, inputs), adapted)
        remove_lora(copied)
        assert equal(outputs(copied, inputs), before)
    assert equal(outputs(layer, inputs), adapted)
