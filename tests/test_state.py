"""The adapters' tensors, out and in again."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from lora_param import (
    StateDictError,
    base_state_dict,
    load_lora_state_dict,
    lora_parameters,
    lora_state_dict,
    named_lora_parameters,
    register_lora,
)

from .cases import shake


def net(*adapters: str, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).to(dtype)
    for adapter in adapters or ("default",):
        register_lora(model, rank=2, adapter=adapter)
    shake(model)
    return model


def names(adapter: str) -> list[str]:
    return [f"{index}.weight.{adapter}.lora_{factor}" for index in (0, 1) for factor in "AB"]


def test_names_are_weight_adapter_and_factor() -> None:
    assert list(lora_state_dict(net())) == names("default")


def test_names_do_not_depend_on_what_else_is_registered() -> None:
    assert list(lora_state_dict(net("a", "b"), "b")) == list(lora_state_dict(net("b")))


def test_an_optimizer_gets_exactly_what_trains() -> None:
    model = net("a", "b")
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert list(map(id, lora_parameters(model))) == list(map(id, trainable))
    assert [name for name, _ in named_lora_parameters(model, "a")] == names("a")


def test_the_state_dict_is_detached_and_shares_memory() -> None:
    model = net()
    for tensor, parameter in zip(
        lora_state_dict(model).values(), lora_parameters(model), strict=True
    ):
        assert not tensor.requires_grad
        assert tensor.data_ptr() == parameter.data_ptr()


def test_loading_copies_every_factor() -> None:
    source, model = net("a", "b"), net("a", "b")
    load_lora_state_dict(model, lora_state_dict(source))
    for a, b in zip(lora_parameters(model), lora_parameters(source), strict=True):
        assert torch.equal(a, b)
        assert a is not b


def test_loading_one_adapter_leaves_the_other() -> None:
    source, model = net("a"), net("a", "b")
    before = {name: t.clone() for name, t in lora_state_dict(model, "b").items()}
    load_lora_state_dict(model, lora_state_dict(source), "a")
    assert all(torch.equal(t, before[name]) for name, t in lora_state_dict(model, "b").items())
    assert torch.equal(model[0].weight, model[0].weight)


def test_loading_converts_to_the_adapters_dtype() -> None:
    source, model = net(dtype=torch.float64), net(dtype=torch.bfloat16)
    load_lora_state_dict(model, lora_state_dict(source))
    for a, b in zip(lora_parameters(model), lora_parameters(source), strict=True):
        assert torch.equal(a, b.to(torch.bfloat16))


A = "0.weight.default.lora_A"
BROKEN: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("missing", lambda s: s.pop(A), f"missing: {A}"),
    ("unexpected", lambda s: s.update(junk=torch.ones(1)), "unexpected: junk"),
    ("misshapen", lambda s: s.update({A: torch.ones(3, 6)}), rf"{A} is \(3, 6\), should be \(2, 6\)"),
    ("transposed", lambda s: s.update({A: s[A].T}), rf"{A} is \(6, 2\), should be \(2, 6\)"),
    ("integer", lambda s: s.update({A: torch.ones(2, 6).int()}), f"{A} is torch.int32"),
    ("complex", lambda s: s.update({A: torch.ones(2, 6) * 1j}), f"{A} is torch.complex64"),
    ("no tensor", lambda s: s.update({A: [1.0]}), f"{A} is list"),
    ("two faults", lambda s: (s.pop(A), s.update(junk=1)), f"missing: {A}; unexpected: junk"),
    ("infinite", lambda s: s[A].fill_(math.nan), f"not finite: {A}"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("breaking", "message"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN]
)
def test_a_state_dict_that_does_not_fit_is_refused_whole(
    breaking: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    model = net()
    state = {name: tensor.clone() for name, tensor in lora_state_dict(net()).items()}
    before = {name: tensor.clone() for name, tensor in lora_state_dict(model).items()}
    breaking(state)
    with pytest.raises(StateDictError, match=f"nothing was loaded: .*{message}"):
        load_lora_state_dict(model, state)
    assert all(torch.equal(t, before[name]) for name, t in lora_state_dict(model).items())


@pytest.mark.parametrize("state", [None, [], "adapter.safetensors"])
def test_what_is_no_mapping_is_refused(state: Any) -> None:
    with pytest.raises(StateDictError, match="a state dict must be a mapping, got"):
        load_lora_state_dict(net(), state)


def noisy(model: nn.Module) -> dict[str, Tensor]:
    """Return another checkpoint of the same model: the same keys, other values."""
    return {
        name: torch.rand_like(t) if t.is_floating_point() else t + 1
        for name, t in model.state_dict().items()
    }


def zoo() -> nn.ModuleDict:
    normed = parametrizations.spectral_norm(parametrizations.weight_norm(nn.Linear(5, 4)))
    return nn.ModuleDict(
        {
            "linear": nn.Linear(6, 5),
            "deep": nn.Sequential(nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4))),
            "attention": nn.MultiheadAttention(8, 2),
            "lstm": nn.LSTM(4, 5),
            "normed": normed,
        }
    )


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in base_state_dict(model).items()}


@pytest.mark.parametrize("assign", [False, True])
def test_a_plain_checkpoint_loads_into_the_adapted_model(assign: bool) -> None:
    model = zoo()
    checkpoint = noisy(model)
    register_lora(model, rank=2, adapter="a")
    register_lora(model, rank=2, adapter="b")
    shake(model)
    factors = {name: (id(p), p.clone()) for name, p in named_lora_parameters(model)}
    model.load_state_dict(checkpoint, strict=True, assign=assign)
    assert base_state_dict(model).keys() == checkpoint.keys()
    assert all(torch.equal(t, checkpoint[name]) for name, t in base_state_dict(model).items())
    for name, parameter in named_lora_parameters(model):
        assert id(parameter) == factors[name][0]
        assert torch.equal(parameter, factors[name][1])


def test_a_plain_checkpoint_of_a_submodule_loads_too() -> None:
    model = zoo()
    checkpoint = noisy(model["deep"])
    register_lora(model, rank=2)
    model["deep"].load_state_dict(checkpoint, strict=True)
    assert torch.equal(
        model["deep"][0][0].parametrizations.weight.original, checkpoint["0.0.weight"]
    )


def test_strict_false_loads_a_plain_checkpoint_as_well() -> None:
    model = nn.Linear(6, 5)
    checkpoint = noisy(model)
    register_lora(model, rank=2)
    result = model.load_state_dict(checkpoint, strict=False)
    assert result == ([], [])
    assert torch.equal(model.parametrizations.weight.original, checkpoint["weight"])


@pytest.mark.parametrize("assign", [False, True])
def test_a_full_checkpoint_loads_into_an_adapted_model(assign: bool) -> None:
    source, model = zoo(), zoo()
    for each in (source, model):
        register_lora(each, rank=2, adapter="a")
        register_lora(each, rank=2, adapter="b")
        shake(each)
    model.load_state_dict(source.state_dict(), strict=True, assign=assign)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name])


def test_a_copy_loads_a_plain_checkpoint() -> None:
    model = nn.Linear(6, 5)
    checkpoint = noisy(model)
    register_lora(model, rank=2)
    twin = copy.deepcopy(model)
    twin.load_state_dict(checkpoint)
    assert torch.equal(twin.parametrizations.weight.original, checkpoint["weight"])
    assert not torch.equal(model.parametrizations.weight.original, checkpoint["weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("0.bias"), "Missing key.*0.bias"),
        (lambda s: s.update({"0.junk": torch.ones(1)}), "Unexpected key.*0.junk"),
        (lambda s: s.update({"0.weight": torch.ones(2, 2)}), r"size mismatch for 0\..*original"),
    ],
)
def test_a_plain_checkpoint_that_does_not_fit_is_still_refused(change, message: str) -> None:
    checkpoint = noisy(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)))
    change(checkpoint)
    with pytest.raises(RuntimeError, match=message):
        net().load_state_dict(checkpoint, strict=True)


def test_a_full_checkpoint_that_lacks_an_adapter_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"Missing key.*weight\.1\.lora_A"):
        net("a", "b").load_state_dict(net("a").state_dict(), strict=True)


def test_base_state_dict_is_the_one_from_before_registering() -> None:
    model = zoo()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    register_lora(model, rank=2)
    shake(model)
    adapted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after = base_state_dict(model)
    assert list(after) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert list(model.state_dict()) == list(adapted)
    assert all(torch.equal(t, adapted[name]) for name, t in model.state_dict().items())


def test_base_state_dict_of_a_plain_model_is_its_state_dict() -> None:
    assert list(base_state_dict(zoo())) == list(zoo().state_dict())


def test_a_plain_checkpoint_reaches_a_parametrization_registered_behind_an_adapter() -> None:
    model = nn.Linear(6, 5)
    register_lora(model, rank=2)
    parametrizations.spectral_norm(model)
    checkpoint = {name: torch.rand_like(t) for name, t in base_state_dict(model).items()}
    assert list(checkpoint) == [
        "bias",
        "parametrizations.weight.original",
        "parametrizations.weight.0._u",
        "parametrizations.weight.0._v",
    ]
    model.load_state_dict(checkpoint, strict=True)
    assert torch.equal(
        model.parametrizations.weight[1]._u, checkpoint["parametrizations.weight.0._u"]
    )


class Renaming(nn.Linear):
    """Takes checkpoints in which the weight still has its old name."""

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        if f"{prefix}kernel" in state_dict:
            state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}kernel")
        super()._load_from_state_dict(state_dict, prefix, *args)


def rename(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
    if f"{prefix}kernel" in state_dict:
        state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}kernel")


@pytest.mark.parametrize("by", ["class", "hook"])
def test_a_layer_that_renames_its_keys_still_loads(by: str) -> None:
    layer = Renaming(6, 5) if by == "class" else nn.Linear(6, 5)
    if by == "hook":
        layer.register_load_state_dict_pre_hook(rename)
    register_lora(layer, rank=2)
    checkpoint = {"kernel": torch.randn(5, 6), "bias": torch.zeros(5)}
    layer.load_state_dict(checkpoint, strict=True)
    assert torch.equal(layer.parametrizations.weight.original, checkpoint["kernel"])
    assert len(layer._load_state_dict_pre_hooks) == (by == "hook")


def test_factors_can_be_exchanged_through_views_of_each_other() -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    register_lora(model, rank=2)
    shake(model)
    state = lora_state_dict(model)
    before = {name: tensor.clone() for name, tensor in state.items()}
    load_lora_state_dict(model, {f"{1 - int(name[0])}{name[1:]}": t for name, t in state.items()})
    for name, tensor in lora_state_dict(model).items():
        assert torch.equal(tensor, before[f"{1 - int(name[0])}{name[1:]}"])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(2, 5, device="meta"), "without values to copy"),
        (torch.ones(2, 5).to_sparse(), "without values to copy"),
        (torch.full((2, 5), 1e300, dtype=torch.float64), "not finite"),
    ],
)
def test_a_value_that_cannot_be_taken_over_is_refused_before_any_is(value, message: str) -> None:
    model = net()
    before = {name: tensor.clone() for name, tensor in lora_state_dict(model).items()}
    state = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    state["1.weight.default.lora_A"] = value
    with pytest.raises(StateDictError, match=f"nothing was loaded: {message}"):
        load_lora_state_dict(model, state)
    assert all(torch.equal(t, before[name]) for name, t in lora_state_dict(model).items())


def test_values_that_share_memory_with_the_factors_by_another_storage_are_copied_first() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 3))
    register_lora(model, rank=1)
    shake(model)
    first, second = "0.weight.default.lora_B", "1.weight.default.lora_B"
    old = {name: each.clone() for name, each in lora_state_dict(model).items()}
    new = lora_state_dict(model)
    new[first], new[second] = (torch.from_numpy(new[name].numpy()) for name in (second, first))
    load_lora_state_dict(model, new)
    assert torch.equal(lora_state_dict(model)[first], old[second])
    assert torch.equal(lora_state_dict(model)[second], old[first])


def test_a_checkpoint_with_a_weight_by_both_names_is_refused() -> None:
    model = net()
    state = {**model.state_dict(), "0.weight": torch.zeros(5, 6)}
    with pytest.raises(RuntimeError, match=r"Unexpected key.*0\.weight"):
        model.load_state_dict(state, strict=True)


def test_a_plain_checkpoint_with_factors_beside_it_brings_them_too() -> None:
    model, source = net(), net()
    factors = {name: each for name, each in source.state_dict().items() if "lora_" in name}
    model.load_state_dict(base_state_dict(source) | factors, strict=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name])


class Shifted(nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.register_buffer("by", torch.tensor(by))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.by


def behind(*shifts: float) -> nn.Module:
    """Register others' parametrizations behind an adapter."""
    layer = nn.Linear(6, 5)
    register_lora(layer, rank=2)
    shake(layer)
    for shift in shifts:
        parametrize.register_parametrization(layer, "weight", Shifted(shift))
    return layer


def test_a_plain_checkpoint_reaches_each_of_several_behind_an_adapter() -> None:
    model = behind(1.0, 2.0)
    model.load_state_dict(base_state_dict(behind(3.0, 4.0)), strict=True)
    assert [float(entry.by) for entry in list(model.parametrizations.weight)[1:]] == [3.0, 4.0]


def test_a_full_checkpoint_with_another_behind_the_adapter_loads() -> None:
    model, source = behind(1.0), behind(2.0)
    model.load_state_dict(source.state_dict(), strict=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name])
