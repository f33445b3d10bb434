"""The laws of the design, each over one table of cases."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from lora_param import (
    LoRAParametrization,
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

from .cases import CASES, DEVICES, DTYPES, Case, outputs, shake
from .reference import loss, reference

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
each_device = pytest.mark.parametrize("device", DEVICES)

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
@each_dtype
@each_device
def test_law_1_a_fresh_adapter_leaves_the_output_equal(case: Case, dtype, device) -> None:
    layer, inputs = case.build(dtype, device)
    before = outputs(layer, inputs)
    assert tuple(case.adapt(layer)) == case.names
    assert equal(outputs(layer, inputs), before)


@each_case
@each_dtype
@each_device
def test_law_2_reading_the_weight_gives_the_formula(case: Case, dtype, device) -> None:
    layer, _ = case.build(dtype, device)
    case.adapt(layer)
    shake(layer)
    for name, W in zip(case.names, originals(layer, case.names), strict=True):
        lora = owner(layer, name).parametrizations[tensor(name)][0]
        expected = W + (lora.lora_B @ lora.lora_A).view_as(W) * lora.scale
        assert torch.equal(getattr(owner(layer, name), tensor(name)), expected)
        assert not torch.equal(expected, W)


@each_case
@each_dtype
@each_device
def test_law_3_output_and_gradients_match_the_oracle(case: Case, dtype, device) -> None:
    layer, inputs = case.build(dtype, device)
    plain = copy.deepcopy(layer)
    case.adapt(layer)
    shake(layer)
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


@each_case
@each_dtype
@each_device
def test_law_4_disabled_gives_the_original_itself(case: Case, dtype, device) -> None:
    layer, inputs = case.build(dtype, device)
    before = outputs(layer.requires_grad_(False), inputs)
    case.adapt(layer)
    shake(layer)
    assert not equal(outputs(layer, inputs), before)
    with lora_disabled(layer):
        for name, W in zip(case.names, originals(layer, case.names), strict=True):
            assert getattr(owner(layer, name), tensor(name)) is W
        assert equal(outputs(layer, inputs), before)
    assert not equal(outputs(layer, inputs), before)


@each_case
@each_device
def test_law_5_training_never_moves_an_original(case: Case, device) -> None:
    layer, inputs = case.build(device=device)
    kept = {id(p): p.detach().clone() for p in layer.parameters()}
    before = fingerprint(layer)
    case.adapt(layer)
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
@each_dtype
@each_device
def test_law_6_remove_gives_the_model_back(case: Case, dtype, device) -> None:
    layer, inputs = case.build(dtype, device)
    list(layer.parameters())[-1].requires_grad_(False)
    before = describe(layer)
    bits = [p.detach().clone() for p in layer.parameters()]
    case.adapt(layer)
    case.adapt(layer, "second")
    shake(layer)
    loss(outputs(layer, inputs)).backward()
    remove_lora(layer)
    assert describe(layer) == before
    assert equal(list(layer.parameters()), bits)
    assert type(layer) is type(case.make_layer())
    copy.deepcopy(layer)


def describe(layer: nn.Module) -> tuple[object, ...]:
    """All that `remove_lora` must restore, but for the bits."""
    return (
        [(name, type(module), module.training) for name, module in layer.named_modules()],
        [(name, id(p), p.requires_grad) for name, p in layer.named_parameters()],
        list(layer.state_dict()),
        [sorted(vars(module)) for module in layer.modules()],
    )


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
@each_dtype
@each_device
def test_law_7_merging_keeps_the_output_and_leaves_a_plain_module(
    case: Case, dtype, device
) -> None:
    layer, inputs = case.build(dtype, device)
    layer.eval()
    before = describe(layer)
    case.adapt(layer)
    shake(layer)
    adapted = outputs(layer, inputs)
    merge_lora(layer)
    assert describe(layer) == before
    for got, want in zip(outputs(layer, inputs), adapted, strict=True):
        close(got.detach(), want.detach().double(), dtype)


FOREIGN = {
    "weight_norm": lambda layer: parametrizations.weight_norm(layer),
    "spectral_norm": lambda layer: parametrizations.spectral_norm(layer),
    "orthogonal": lambda layer: parametrizations.orthogonal(layer),
    "its own": lambda layer: parametrize.register_parametrization(layer, "weight", Halved()),
}


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight * 2


@pytest.mark.parametrize("foreign", FOREIGN)
@pytest.mark.parametrize("training", [True, False])
def test_law_8_a_foreign_parametrization_survives_register_and_remove(foreign, training) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 5).train(training)
    FOREIGN[foreign](layer)
    state = copy.deepcopy(layer.state_dict())
    before = describe(layer)
    register_lora(layer, rank=2)
    shake(layer)
    remove_lora(layer)
    assert describe(layer) == before
    for name, value in layer.state_dict().items():
        assert torch.equal(value, state[name])


@pytest.mark.parametrize("foreign", FOREIGN)
def test_law_8_the_update_is_added_to_what_a_foreign_parametrization_gives(foreign) -> None:
    layer = nn.Linear(6, 5).eval()
    FOREIGN[foreign](layer)
    weight = layer.weight.detach().clone()
    register_lora(layer, rank=2)
    shake(layer)
    lora = layer.parametrizations.weight[1]
    expected = weight + (lora.lora_B @ lora.lora_A).view_as(weight) * lora.scale
    assert torch.equal(layer.weight, expected)


@pytest.mark.parametrize("foreign", ["weight_norm", "spectral_norm", "its own"])
def test_law_8_a_foreign_parametrization_registered_later_survives(foreign) -> None:
    layer = nn.Linear(6, 5).eval()
    register_lora(layer, rank=2)
    shake(layer)
    if foreign == "weight_norm":  # of several originals, so it can only come first
        parametrizations.weight_norm(layer, "bias", dim=None)
    else:
        FOREIGN[foreign](layer)
    parts = [entry for name in layer.parametrizations for entry in layer.parametrizations[name]]
    foreign_parts = [part for part in parts if not isinstance(part, LoRAParametrization)]
    remove_lora(layer)
    parts = [entry for name in layer.parametrizations for entry in layer.parametrizations[name]]
    assert parts == foreign_parts
    assert isinstance(layer, nn.Linear)
    layer(torch.ones(1, 6))


@pytest.mark.parametrize("foreign", ["weight_norm", "its own"])
def test_law_8_merging_goes_through_a_foreign_parametrization(foreign) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 5), torch.randn(3, 6)
    FOREIGN[foreign](layer)
    entries = list(layer.parametrizations.weight)
    register_lora(layer, rank=2)
    shake(layer)
    before = layer(x)
    merge_lora(layer)
    assert list(layer.parametrizations.weight) == entries
    torch.testing.assert_close(layer(x), before)


@each_case
def test_law_11_a_call_that_raises_at_the_last_weight_changes_nothing(case: Case) -> None:
    layer, _ = case.build()
    model = nn.Sequential(layer, nn.Linear(9, 1))
    before, bits = describe(model), fingerprint(model)
    targets = [f"0.{name}" for name in case.names]
    with pytest.raises(ValueError, match=r"1\.weight: rank must satisfy 1 <= rank <= min\(1, 9\)"):
        register_lora(model, rank=2, target=[*targets, "1"])
    assert describe(model) == before
    assert_frozen(model, bits)


@each_case
def test_several_adapters_add_up_and_leave_each_other_alone(case: Case) -> None:
    layer, inputs = case.build(torch.float64)
    plain = copy.deepcopy(layer)
    case.adapt(layer, "a")
    shake(layer)
    only_a = outputs(layer, inputs)
    factors = [factor.detach().clone() for factor in lora_parameters(layer, "a")]
    case.adapt(layer, "b", rank=1)
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
def test_each_adapter_switches_by_itself(case: Case) -> None:
    layer, inputs = case.build()
    before = outputs(layer.requires_grad_(False), inputs)
    case.adapt(layer, "a")
    shake(layer)
    only_a = outputs(layer, inputs)
    case.adapt(layer, "b")
    shake(layer, "b")
    disable_lora(layer, "b")
    assert equal(outputs(layer, inputs), only_a)
    disable_lora(layer)
    assert equal(outputs(layer, inputs), before)
    enable_lora(layer, "a")
    assert equal(outputs(layer, inputs), only_a)


@each_case
def test_law_9_a_deepcopy_is_independent_and_a_pickle_round_trips(case: Case) -> None:
    layer, inputs = case.build()
    layer.eval().requires_grad_(False)
    before = outputs(layer, inputs)
    case.adapt(layer)
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
