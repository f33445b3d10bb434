"""Bases whose weights torchao keeps in few bits, held against the dense model of what these mean."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_param import (
    LoRAError,
    base_frozen,
    disable_lora,
    fingerprint,
    load_lora,
    lora_merged,
    lora_parameters,
    lora_summary,
    merge_lora,
    register_lora,
    remove_lora,
    save_lora,
)

from .cases import shake

torchao = pytest.importorskip("torchao.quantization")

WEIGHTS: dict[str, Callable[[], Any]] = {
    "int8": lambda: torchao.Int8WeightOnlyConfig(),
    "float8": lambda: torchao.Float8WeightOnlyConfig(),
    "int4, unpacked": lambda: torchao.IntxWeightOnlyConfig(torch.int4),
}
DYNAMIC: dict[str, Callable[[], Any]] = {
    "int8": lambda: torchao.Int8DynamicActivationInt8WeightConfig(),
    "int4, unpacked": lambda: torchao.Int8DynamicActivationIntxWeightConfig(),
}
KINDS: list[dict[str, Any]] = [{}, {"kind": "dora"}, {"kind": "dense"}, {"init": "pissa"}]


def quantised(config: Any) -> tuple[nn.Module, nn.Module]:
    """Return a model, and the dense one of what its weights mean."""
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 64, bias=False))
    dense = copy.deepcopy(model)
    torchao.quantize_(model, config)
    for index in (0, 2):
        dense[index].weight.data = model[index].weight.dequantize()
    return model, dense


@pytest.fixture(params=WEIGHTS)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    return quantised(WEIGHTS[request.param]())


def results(model: nn.Module) -> list[Tensor]:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = model(x)
    factors = [each for each in model.parameters() if each.requires_grad]
    return [y, *torch.autograd.grad(y.square().sum(), [x, *factors])]


def adapt(models: tuple[nn.Module, ...], **options: Any) -> None:
    for model in models:
        register_lora(model, **({} if options.get("kind") == "dense" else {"rank": 4}), **options)
        torch.manual_seed(4)
        shake(model)


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_an_adapted_quantised_model_computes_as_the_dense_one(
    pair: tuple[nn.Module, nn.Module], options: dict[str, Any]
) -> None:
    adapt(pair, **options)
    for got, expected in zip(*map(results, pair), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pair[0][0].weight, pair[1][0].weight)


def test_a_fresh_adapter_on_a_quantised_weight_changes_nothing(
    pair: tuple[nn.Module, nn.Module],
) -> None:
    model, x = pair[0], torch.randn(5, 64)
    expected, before = model(x), fingerprint(model)
    weight = model[0].weight
    register_lora(model, rank=4)
    assert torch.equal(model(x), expected)
    assert {each.space for each in lora_summary(model).weights} == {"activation"}
    with base_frozen(model):
        shake(model)
    disable_lora(model)
    assert torch.equal(model(x), expected)
    assert model[0].weight is weight
    remove_lora(model)
    assert fingerprint(model) == before
    assert model[0].weight is weight


def test_a_quantised_weights_digest_is_of_all_that_it_is_made_of(
    pair: tuple[nn.Module, nn.Module],
) -> None:
    model = pair[0]
    before = fingerprint(model)
    model[0].weight.scale.mul_(2)
    changed = {name for name, each in fingerprint(model).items() if each != before[name]}
    assert changed == {"0.weight"}


def test_merging_into_a_quantised_weight_takes_a_word(pair: tuple[nn.Module, nn.Module]) -> None:
    model = pair[0]
    adapt((model,))
    x = torch.randn(5, 64)
    expected = model(x)
    for merge in (merge_lora, lambda model: lora_merged(model).__enter__()):
        with pytest.raises(LoRAError, match=r"0\.weight: it is quantised, and quantising the"):
            merge(model)
    with lora_merged(model, dequantize=True):
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(x), expected)
    merge_lora(model, dequantize=True)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert {type(each) for each in model.parameters()} == {nn.Parameter}


def test_an_adapter_of_a_quantised_model_is_a_file_like_any_other(
    pair: tuple[nn.Module, nn.Module], path: Path
) -> None:
    model, x = pair[0], torch.randn(5, 64)
    plain = copy.deepcopy(model)
    adapt((model,))
    save_lora(model, path)
    load_lora(plain, path, base="require")
    assert torch.equal(plain(x), model(x))


@pytest.mark.parametrize("config", DYNAMIC)
def test_activations_quantised_as_they_come_are_for_inference_alone(
    config: str, path: Path
) -> None:
    model, dense = quantised(DYNAMIC[config]())
    adapt((dense,))
    save_lora(dense, path)
    before = fingerprint(model)
    for train in (register_lora, lambda model: load_lora(model, path, base="ignore")):
        with pytest.raises(LoRAError, match=r"0\.weight: no gradient reaches a layer's input"):
            train(model)
    assert fingerprint(model) == before
    load_lora(model, path, base="ignore", trainable=False)
    x = torch.randn(5, 64)
    torch.testing.assert_close(model(x), dense(x), rtol=0.1, atol=0.1)
    assert not any(each.requires_grad for each in lora_parameters(model))


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("kind", ["Linear8bitLt", "Linear4bit"])
def test_bitsandbytes_layers_are_refused_with_the_reason(kind: str, moved: bool) -> None:
    layers = pytest.importorskip("bitsandbytes.nn")
    model = nn.Sequential(getattr(layers, kind)(64, 32), nn.Linear(32, 4))
    model = model.to("cpu") if moved else model  # which quantises
    with pytest.raises(LoRAError, match=r"0\.weight: bitsandbytes keeps it packed"):
        register_lora(model)
    assert register_lora(model, exclude="0", freeze=False) == ["1.weight"]
