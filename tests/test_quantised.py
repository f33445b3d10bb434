"""Bases whose weights are kept in few bits, held against the dense model of what these mean."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_param import (
    LoRAError,
    TargetError,
    base_frozen,
    base_state_dict,
    disable_lora,
    fingerprint,
    load_lora,
    lora_disabled,
    lora_merged,
    lora_parameters,
    lora_routed,
    lora_state_dict,
    lora_summary,
    merge_lora,
    register_lora,
    remove_lora,
    save_lora,
    select_lora,
)

from .cases import shake


def torchaos(name: str, *args: Any) -> nn.Module:
    library = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64, bias=False))
    library.quantize_(model, getattr(library, name)(*args))
    return model


def nf4() -> nn.Module:
    library = pytest.importorskip("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64, bias=False))
    for index in (0, 2):
        weight = library.to_nf4(model[index].weight.detach(), 64, 256)
        model[index].weight = nn.Parameter(weight, requires_grad=False)
    return model


def bitsandbytes(kind: str, **options: Any) -> nn.Module:
    layer = getattr(pytest.importorskip("bitsandbytes.nn"), kind)
    layers = layer(64, 256, **options), nn.Tanh(), layer(256, 64, bias=False, **options)
    return nn.Sequential(*layers).to("cpu")  # which quantises


PLAIN = {"has_fp16_weights": False}
PACKED: dict[str, Callable[[], nn.Module]] = {
    "bitsandbytes int8": lambda: bitsandbytes("Linear8bitLt", **PLAIN),
    "bitsandbytes nf4": lambda: bitsandbytes("Linear4bit", quant_type="nf4"),
    "bitsandbytes fp4": lambda: bitsandbytes("Linear4bit", compress_statistics=False),
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "torchao int8": lambda: torchaos("Int8WeightOnlyConfig"),
    "torchao float8": lambda: torchaos("Float8WeightOnlyConfig"),
    "torchao int4, unpacked": lambda: torchaos("IntxWeightOnlyConfig", torch.int4),
    "torchao nf4": nf4,
    **PACKED,
}
DYNAMIC: dict[str, Callable[[], nn.Module]] = {
    "int8": lambda: torchaos("Int8DynamicActivationInt8WeightConfig"),
    "int4, unpacked": lambda: torchaos("Int8DynamicActivationIntxWeightConfig"),
}
KINDS: list[dict[str, Any]] = [{}, {"kind": "dora"}, {"kind": "dense"}, {"init": "pissa"}]


def meaning(weight: Any) -> Tensor:
    """Return what a weight means, as its library says it."""
    if getattr(weight, "quant_state", None) is not None:
        functional = pytest.importorskip("bitsandbytes.functional")
        return functional.dequantize_4bit(weight.data, weight.quant_state)  # type: ignore[no-any-return]
    if hasattr(weight, "SCB"):
        return weight.CB * (weight.SCB.view(-1, 1) * (1 / 127))  # type: ignore[no-any-return]
    if hasattr(weight, "get_original_weight"):
        return weight.get_original_weight()  # type: ignore[no-any-return]
    return weight.dequantize()  # type: ignore[no-any-return]


def dense_of(model: nn.Module) -> nn.Module:
    dense = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64, bias=False))
    dense[0].bias.data = model[0].bias.detach().clone()
    for index in (0, 2):
        dense[index].weight.data = meaning(model[index].weight)
    return dense


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return MODELS[request.param]()


@pytest.fixture(params=PACKED)
def packed(request: pytest.FixtureRequest) -> nn.Module:
    return PACKED[request.param]()


def results(model: nn.Module) -> list[Tensor]:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = model(x)
    factors = [each for each in model.parameters() if each.requires_grad]
    return [y, *torch.autograd.grad(y.square().sum(), [x, *factors])]


def adapt(*models: nn.Module, **options: Any) -> None:
    for model in models:
        register_lora(model, **({} if options.get("kind") == "dense" else {"rank": 4}), **options)
        torch.manual_seed(4)
        shake(model)


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_an_adapted_quantised_model_computes_as_the_dense_one(
    model: nn.Module, options: dict[str, Any]
) -> None:
    adapt(model, dense := dense_of(model), **options)
    for got, expected in zip(results(model), results(dense), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model[0].weight, dense[0].weight)


def test_a_fresh_adapter_on_a_quantised_weight_changes_nothing(model: nn.Module) -> None:
    x = torch.randn(5, 64)
    expected, before = model(x), fingerprint(model)
    weight = model[0].weight
    register_lora(model, rank=4)
    assert torch.equal(model(x), expected)
    assert {(each.space, *each.shape) for each in lora_summary(model).weights} == {
        ("activation", 256, 64),
        ("activation", 64, 256),
    }
    with base_frozen(model):
        shake(model)
        model(x)
        with lora_disabled(model), torch.no_grad():
            model.eval()(x)
    disable_lora(model.train())
    assert torch.equal(model(x), expected)
    assert model[0].weight is weight
    remove_lora(model)
    assert fingerprint(model) == before
    assert model[0].weight is weight


def test_a_quantised_weights_digest_is_of_all_that_it_is_made_of(model: nn.Module) -> None:
    before, weight = fingerprint(model), model[0].weight
    if hasattr(weight, "quant_state"):
        weight.quant_state.absmax.add_(1)
    else:
        names = ("SCB", "scale", "quantized_scalers")
        next(getattr(weight, name) for name in names if hasattr(weight, name)).mul_(2)
    changed = {name for name, each in fingerprint(model).items() if each != before[name]}
    assert changed == {"0.weight"}


def test_merging_into_a_quantised_weight_takes_a_word(model: nn.Module) -> None:
    adapt(model)
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
    assert type(model[0]) is nn.Linear


def test_an_adapter_of_a_quantised_model_is_a_file_like_any_other(
    model: nn.Module, path: Path
) -> None:
    x, plain, peft = torch.randn(5, 64), copy.deepcopy(model), copy.deepcopy(model)
    adapt(model)
    save_lora(model, path)
    load_lora(plain, path, base="require")
    assert torch.equal(plain(x), model(x))
    save_lora(model, path.with_name("peft"), format="peft")
    load_lora(peft, path.with_name("peft"))
    assert torch.equal(peft(x), model(x))


def test_adapters_on_a_quantised_model_are_selected_and_routed(model: nn.Module) -> None:
    adapt(model, adapter="a")
    adapt(model, adapter="b", target="0")
    adapt(model, adapter="rows", target="0.weight[3:9]")
    x, wanted = torch.randn(3, 64), []
    for row, name in enumerate(names := ["a", "b", "rows"]):
        select_lora(model, name)
        wanted.append(model(x[row : row + 1]))
    with lora_routed(model, names):
        torch.testing.assert_close(model(x), torch.cat(wanted))


@pytest.mark.parametrize("config", DYNAMIC)
def test_activations_quantised_as_they_come_are_for_inference_alone(
    config: str, path: Path
) -> None:
    model = DYNAMIC[config]()
    adapt(dense := dense_of(model))
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


# What is bitsandbytes' own


@pytest.mark.parametrize("ready", [False, True])
def test_a_packed_layer_is_copied_and_pickled(packed: nn.Module, ready: bool) -> None:
    x = torch.randn(5, 64)
    if ready:
        packed(x)
    adapt(packed)
    torch.save(packed, file := io.BytesIO())
    file.seek(0)
    for other in (copy.deepcopy(packed), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), packed(x))
        assert torch.equal(other[0].weight, packed[0].weight)
        remove_lora(other)
        assert list(other.state_dict()) == list(base_state_dict(packed))


def test_an_8_bit_base_is_loaded_as_ever() -> None:  # bitsandbytes itself loads no 4-bit state
    packed = PACKED["bitsandbytes int8"]()
    plain = copy.deepcopy(packed)
    adapt(packed)
    state = copy.deepcopy(plain.state_dict())
    state["0.SCB"] *= 2
    plain.load_state_dict(state)
    packed.load_state_dict(state)
    assert fingerprint(packed) == fingerprint(plain)


def test_of_a_packed_layers_adapters_one_is_merged(packed: nn.Module) -> None:
    adapt(packed)
    adapt(packed, adapter="b")
    x = torch.randn(5, 64)
    expected = packed(x)
    merge_lora(packed, "default", dequantize=True)
    torch.testing.assert_close(packed(x), expected)
    remove_lora(packed)
    assert type(packed[0]) is nn.Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_layer_with_its_bias_trained_computes_in_the_inputs_dtype(
    packed: nn.Module, dtype: torch.dtype
) -> None:
    x = torch.randn(5, 64, dtype=dtype, requires_grad=True)
    adapt(packed, train="0.bias")
    y = packed(x)
    y.float().square().sum().backward()
    assert y.dtype is dtype
    assert all(each.grad is not None for each in lora_parameters(packed))
    merge_lora(packed, dequantize=True)
    torch.testing.assert_close(packed.to(dtype)(x), y, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: bitsandbytes("Linear8bitLt"),
        lambda: pytest.importorskip("bitsandbytes.nn").Linear8bitLt(64, 32, **PLAIN),
        lambda: pytest.importorskip("bitsandbytes.nn").Linear4bit(64, 32),
    ],
    ids=["float weights", "8 bits, not moved", "4 bits, not moved"],
)
def test_a_layer_that_has_not_quantised_its_weight_is_refused(
    layer: Callable[[], nn.Module],
) -> None:
    model = nn.ModuleDict({"layer": layer(), "other": nn.Linear(4, 4)})
    with pytest.raises(TargetError, match="bitsandbytes hasn't quantised it"):
        register_lora(model)
    assert register_lora(model, exclude="layer*", freeze=False) == ["other.weight"]


def test_a_float8_linear_of_transformers_is_refused_by_its_dtype() -> None:
    library = pytest.importorskip("transformers.integrations.finegrained_fp8")
    model = nn.Sequential(nn.Linear(64, 64), library.FP8Linear(64, 64))
    with pytest.raises(
        TargetError, match=r"1\.weight: .*got float8_e4m3fn; convert it, or exclude"
    ):
        register_lora(model, rank=2)
    assert register_lora(model, rank=2, exclude="1") == ["0.weight"]


def test_a_weight_packed_for_inference_is_refused() -> None:
    layer = pytest.importorskip("bitsandbytes.nn").Linear4bit
    model = layer(64, 64).to("cpu").eval()
    with torch.no_grad():
        model(torch.randn(2, 64))
    if not getattr(model.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("bitsandbytes packs nothing on this CPU")
    with pytest.raises(TargetError, match="or has packed it for inference alone"):
        register_lora(model)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
def test_transformers_loads_a_4_bit_model_that_trains(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    transformers = pytest.importorskip("transformers")
    from .test_trainers import examples, small_llama

    small_llama().save_pretrained(tmp_path)
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    options = {"quantization_config": config, "device_map": "cpu", "dtype": torch.bfloat16}
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path, **options).train()
    names = register_lora(model, rank=2)
    assert "model.layers.0.mlp.up_proj.weight" in names
    model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=0.05)
    batch = {name: torch.stack([each[name] for each in examples()]) for name in examples()[0]}
    losses = []
    with base_frozen(model):
        for _ in range(5):
            losses.append(loss := model(**batch).loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert all(each.isfinite().all() for each in lora_state_dict(model).values())
