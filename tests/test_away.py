"""Models whose tensors have no values, or aren't there: on meta, offloaded, partitioned."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lora_param import (
    LoRAError,
    base_state_dict,
    fingerprint,
    load_lora,
    lora_parameters,
    lora_state_dict,
    register_lora,
    save_lora,
)

from .cases import shake


def net(device: str = "cpu") -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 5, device=device), nn.Tanh(), nn.Linear(5, 4, bias=False, device=device)
    )


def factors(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in lora_state_dict(model).items() if "lora_" in name}


# Meta


def emptied(model: nn.Module, base: dict[str, Tensor]) -> None:
    model.to_empty(device="cpu")
    model.load_state_dict(base)


def assigned(model: nn.Module, base: dict[str, Tensor]) -> None:
    model.load_state_dict(base, assign=True)


def assigned_as_ever(model: nn.Module, base: dict[str, Tensor]) -> None:
    model.load_state_dict(base, assign=True, strict=False)


ARRIVALS = [emptied, assigned, assigned_as_ever]


@pytest.mark.parametrize("arrive", ARRIVALS)
@pytest.mark.parametrize(
    "options", [{}, {"init": "orthogonal"}, {"train": "0.bias"}, {"kind": "dora"}], ids=str
)
def test_what_was_registered_on_meta_is_drawn_when_it_gets_values(
    arrive: Callable[..., None], options: dict[str, Any]
) -> None:
    plain = net()
    torch.manual_seed(3)
    register_lora(expected := copy.deepcopy(plain), rank=2, **options)
    register_lora(model := net("meta"), rank=2, **options)
    torch.manual_seed(3)
    arrive(model, dict(plain.state_dict()))
    x = torch.randn(3, 6)
    assert torch.equal(model(x), plain(x))
    for name, factor in factors(model).items():
        assert torch.equal(factor, factors(expected)[name]), name
    assert all(factor.isfinite().all() for factor in lora_parameters(model))


@pytest.mark.parametrize("arrive", ARRIVALS)
def test_a_generator_given_on_meta_is_drawn_from_when_there_are_values(
    arrive: Callable[..., None],
) -> None:
    plain = net()
    first, second = (torch.Generator().manual_seed(7) for _ in range(2))
    register_lora(expected := copy.deepcopy(plain), rank=2, generator=first)
    register_lora(model := net("meta"), rank=2, generator=second)
    arrive(copy.deepcopy(model), dict(plain.state_dict()))
    arrive(model, dict(plain.state_dict()))
    for name, factor in factors(model).items():
        assert torch.equal(factor, factors(expected)[name]), name


@pytest.mark.parametrize("arrive", ARRIVALS)
def test_a_batch_norms_statistics_are_the_bases_when_it_gets_values(
    arrive: Callable[..., None],
) -> None:
    plain = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    plain(torch.randn(9, 6))
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    register_lora(model, rank=2)
    arrive(model, dict(plain.state_dict()))
    x = torch.randn(3, 6)
    assert torch.equal(model.eval()(x), plain.eval()(x))


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter:UserWarning")
def test_strict_loading_does_not_count_what_stays_on_meta() -> None:
    model = net("meta")
    register_lora(model, rank=2)
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.parametrizations\.weight\.0\.lora_A"):
        model.load_state_dict(dict(net().state_dict()))
    without = {name: each for name, each in net().state_dict().items() if name != "2.weight"}
    with pytest.raises(RuntimeError, match=r"Missing key.*2\.parametrizations\.weight\.0\.lora_A"):
        model.load_state_dict(without, assign=True)


def test_factors_that_have_values_keep_them_when_a_base_is_assigned() -> None:
    model = net()
    register_lora(model, rank=2)
    shake(model)
    before = factors(model)
    model.load_state_dict(dict(net().state_dict()), assign=True)
    assert all(torch.equal(factors(model)[name], before[name]) for name in before)


def test_a_model_built_and_adapted_on_empty_weights_takes_a_checkpoint() -> None:
    plain = net()
    with init_empty_weights():
        model = net()
        register_lora(model, rank=2)
    assert all(each.is_meta for each in model.parameters())
    model.load_state_dict(dict(plain.state_dict()), assign=True)
    x = torch.randn(3, 6)
    assert torch.equal(model(x), plain(x))
    assert all(factor.isfinite().all() for factor in lora_parameters(model))


def test_a_model_with_values_is_adapted_with_values_also_among_empty_weights() -> None:
    model = net()
    x = torch.randn(3, 6)
    expected = model(x)
    with init_empty_weights():
        register_lora(model, rank=2, train="0.bias")
    assert torch.equal(model(x), expected)
    assert not any(each.is_meta for each in model.parameters())


# Partitioned


def partitioned(model: nn.Module) -> nn.Module:
    """Take the parameters away as DeepSpeed's ZeRO-3 does."""
    for index, parameter in enumerate(model.parameters()):
        parameter.ds_id, parameter.ds_shape = index, parameter.shape
        parameter.data = torch.empty(0)
    return model


def test_partitioned_parameters_have_no_fingerprint() -> None:
    with pytest.raises(LoRAError, match=r"0\.weight: .* has no bytes of its own"):
        fingerprint(partitioned(net()))


@pytest.mark.parametrize("gathered", [True, False])
def test_a_partitioned_model_is_not_adapted(gathered: bool) -> None:
    model = net()
    parameters = [each.data for each in model.parameters()]
    partitioned(model)
    for parameter, data in zip(model.parameters(), parameters, strict=True):
        parameter.data = data if gathered else parameter.data
    with pytest.raises(
        LoRAError, match=r"0\.weight: register_lora can't be called: DeepSpeed part"
    ):
        register_lora(model, rank=2)
    if gathered:
        assert len(set(fingerprint(model).values())) == 3


# Wrapped for checkpointing


def test_a_checkpoint_wrapper_is_in_no_name(path: Path) -> None:
    plain = net()
    model = copy.deepcopy(plain)
    model[0] = checkpoint_wrapper(model[0])
    assert register_lora(model, rank=2) == ["0.weight", "2.weight"]
    shake(model)
    assert fingerprint(model) == fingerprint(plain)
    assert list(base_state_dict(model)) == list(plain.state_dict())
    save_lora(model, path)
    assert load_lora(plain, path, base="require") == ["0.weight", "2.weight"]
    x = torch.randn(3, 6)
    torch.testing.assert_close(plain(x), model(x))
