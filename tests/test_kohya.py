"""Files of Kohya's scripts and LyCORIS, read and written."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_param import FileError, LoRAError, load_lora, lora_summary, register_lora, save_lora

from .cases import shake
from .kohya_cases import CLIPText, UNet, linear, pipeline, saved, update

Q = "lora_unet_mid_attn1_to_q"
PREFIXES = [
    ("lora_unet_", UNet, "mid.attn1.to_q"),
    ("lora_te_", CLIPText, "self_attn.q_proj"),
    ("lora_te1_", CLIPText, "self_attn.q_proj"),
    ("lora_te2_", CLIPText, "self_attn.q_proj"),
    ("lora_te3_", CLIPText, "self_attn.q_proj"),
    ("lycoris_", UNet, "mid.attn1.to_q"),
    ("lora_unet_", pipeline, "unet.mid.attn1.to_q"),
    ("lora_te_", pipeline, "text_encoder.self_attn.q_proj"),
    ("lora_te1_", pipeline, "text_encoder.self_attn.q_proj"),
    ("lycoris_", pipeline, "unet.mid.attn1.to_q"),
]


@pytest.mark.parametrize(("prefix", "make", "path"), PREFIXES)
def test_names_are_resolved_below_their_part(
    prefix: str, make: Callable[[], nn.Module], path: str, tmp_path: Path
) -> None:
    inside = path.removeprefix("unet.").removeprefix("text_encoder.")
    flat = prefix + (path if prefix == "lycoris_" else inside).replace(".", "_")
    tensors, model = linear(flat, alpha=3.0), make()
    assert load_lora(model, saved(tmp_path, tensors)) == [f"{path}.weight"]
    A, B = tensors[f"{flat}.lora_down.weight"], tensors[f"{flat}.lora_up.weight"]
    torch.testing.assert_close(update(model, path), B @ A * 1.5)


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (0.0, 1.0), (1.0, 0.5), (4.0, 2.0)])
def test_a_missing_alpha_means_the_rank(alpha: float | None, scale: float, tmp_path: Path) -> None:
    name = "lora_unet_mid_attn1_to_q"
    tensors, model = linear(name, 2, alpha), UNet()
    load_lora(model, saved(tmp_path, tensors))
    A, B = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
    torch.testing.assert_close(update(model, "mid.attn1.to_q"), B @ A * scale)


CONVOLUTIONS: list[tuple[str, nn.Module]] = [
    ("conv1d", nn.Conv1d(4, 6, 3)),
    ("conv2d", nn.Conv2d(4, 6, (3, 2))),
    ("conv2d grouped", nn.Conv2d(4, 6, 3, groups=2)),
    ("conv3d", nn.Conv3d(4, 6, 2)),
]


@pytest.mark.parametrize("layer", [c[1] for c in CONVOLUTIONS], ids=[c[0] for c in CONVOLUTIONS])
def test_a_convolution_is_down_by_its_kernel_and_up_by_one(
    layer: nn.Module, tmp_path: Path
) -> None:
    model = nn.Sequential(copy.deepcopy(layer))
    shape = model[0].weight.shape
    down, up = torch.randn(2, *shape[1:]), torch.randn(6, 2, *[1] * len(shape[2:]))
    tensors = {"lycoris_0.lora_down.weight": down, "lycoris_0.lora_up.weight": up}
    load_lora(model, saved(tmp_path, tensors))
    expected = torch.einsum("r...,or->o...", down, up.flatten(1))
    torch.testing.assert_close(update(model, "0"), expected)


def test_a_linear_layer_takes_the_factors_of_a_1x1_convolution(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    tensors = {f"{key}": each[..., None, None] for key, each in linear("lora_unet_0").items()}
    assert load_lora(model, saved(tmp_path, tensors)) == ["0.weight"]


@pytest.mark.parametrize("make", [UNet, CLIPText, pipeline])
def test_what_is_written_is_read_to_the_bit(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    base = make()
    model = copy.deepcopy(base)
    register_lora(model, rank=2, alpha=3)
    shake(model)
    save_lora(model, tmp_path / "lora.safetensors", format="kohya")
    load_lora(base, tmp_path / "lora.safetensors")
    for weight in lora_summary(model).weights:
        path = weight.name.removesuffix(".weight")
        assert torch.equal(base.get_submodule(path).weight, model.get_submodule(path).weight)


def test_a_layers_bias_is_trained_beside_its_pair(tmp_path: Path) -> None:
    base = UNet()
    model = copy.deepcopy(base)
    register_lora(model, rank=2, target="to_q", train="*.to_q.bias")
    shake(model)
    save_lora(model, tmp_path / "lora.safetensors", format="kohya")
    roles = ("alpha", "diff_b", "lora_down.weight", "lora_up.weight")
    assert sorted(load_file(tmp_path / "lora.safetensors")) == [f"{Q}.{role}" for role in roles]
    load_lora(base, tmp_path / "lora.safetensors")
    x = torch.randn(1, 4, 3, 3)
    assert torch.equal(base(x), model(x))


def test_what_is_trained_whole_is_a_difference_of_a_layer_or_a_norm(tmp_path: Path) -> None:
    base = nn.ModuleDict({"layer": nn.Linear(4, 3), "norm": nn.LayerNorm(3)})
    model = copy.deepcopy(base)
    register_lora(model, target=(), train="*")
    shake(model)
    save_lora(model, tmp_path / "lora.safetensors", format="kohya")
    names = {"layer.diff": "layer.weight", "layer.diff_b": "layer.bias"}
    names |= {"norm.w_norm": "norm.weight", "norm.b_norm": "norm.bias"}
    held = load_file(tmp_path / "lora.safetensors")
    assert held.keys() == {f"lycoris_{name}" for name in names}
    load_lora(base, tmp_path / "lora.safetensors")
    for name, weight in names.items():
        path, tensor = weight.split(".")
        new, old = getattr(base[path], tensor), base[path].parametrizations[tensor].original
        assert torch.equal(new, getattr(model[path], tensor))
        assert torch.equal(new, old + held[f"lycoris_{name}"])


def test_a_pair_and_a_bias_go_into_the_adapter_that_there_is(tmp_path: Path) -> None:
    model = UNet()
    register_lora(model, rank=2, target="to_q", train="*.to_q.bias")
    shake(model)
    save_lora(model, tmp_path / "lora.safetensors", format="kohya")
    x = torch.randn(1, 4, 3, 3)
    wanted = model(x)
    shake(model)
    load_lora(model, tmp_path / "lora.safetensors")
    assert torch.equal(model(x), wanted)


class Plain(CLIPText):
    """A model of no known name."""


WRITTEN: list[tuple[str, Callable[[], nn.Module], dict[str, Any], set[str]]] = [
    ("a UNet", UNet, {}, {"lora_unet_"}),
    ("a text encoder", CLIPText, {}, {"lora_te_"}),
    ("any other", Plain, {}, {"lycoris_"}),
    ("as asked", CLIPText, {"prefix": "lora_te2_"}, {"lora_te2_"}),
    ("an unknown prefix", CLIPText, {"prefix": "my_"}, {"my_"}),
    ("a pipeline", pipeline, {}, {"lora_unet_", "lora_te_"}),
    ("a pipeline of two encoders", lambda: nn.ModuleDict({"text_encoder": CLIPText(), "text_encoder_2": CLIPText()}), {}, {"lora_te1_", "lora_te2_"}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "options", "prefixes"), [w[1:] for w in WRITTEN], ids=[w[0] for w in WRITTEN]
)
def test_the_written_prefix_follows_the_model(
    make: Callable[[], nn.Module], options: dict[str, Any], prefixes: set[str], tmp_path: Path
) -> None:
    base = make()
    model = copy.deepcopy(base)
    names = register_lora(model, rank=2)
    path = tmp_path / "lora.safetensors"
    save_lora(model, path, format="kohya", **options)
    keys = load_file(path)
    starts = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lycoris_", "my_")
    assert {start for key in keys for start in starts if key.startswith(start)} == prefixes
    assert load_lora(base, path, **options if "my_" in prefixes else {}) == names


@pytest.mark.parametrize(
    ("prefix", "message"),
    [(3, "prefix must be a string, got 3"), ("my.", "no name in the file can")],
)
def test_a_prefix_that_no_name_can_have_is_refused(
    prefix: Any, message: str, tmp_path: Path
) -> None:
    model = UNet()
    register_lora(model, rank=2)
    with pytest.raises(LoRAError, match=message):
        save_lora(model, tmp_path / "lora.safetensors", format="kohya", prefix=prefix)
    assert not list(tmp_path.iterdir())


def test_only_keys_of_the_asked_prefix_are_read(tmp_path: Path) -> None:
    tensors = linear("lora_unet_mid_attn1_to_q") | linear("lora_te_self_attn_q_proj")
    path = saved(tmp_path, tensors)
    assert load_lora(UNet(), path, prefix="lora_unet_") == ["mid.attn1.to_q.weight"]
    with pytest.raises(FileError, match="no module for lora_te_self_attn_q_proj; the nearest"):
        load_lora(UNet(), path)


def test_names_that_collide_are_refused_both_ways(tmp_path: Path) -> None:
    model = nn.ModuleDict({
        "a": nn.ModuleDict({"b_c": nn.Linear(6, 6)}),
        "a_b": nn.ModuleDict({"c": nn.Linear(6, 6)}),
    })  # fmt: skip
    message = r"lycoris_a_b_c could be a\.b_c or a_b\.c"
    with pytest.raises(FileError, match=message):
        load_lora(model, saved(tmp_path, linear("lycoris_a_b_c")))
    register_lora(model, rank=2)
    with pytest.raises(FileError, match=f"nothing was written: {message}"):
        save_lora(model, tmp_path / "out.safetensors", format="kohya")


DOWN, UP = f"{Q}.lora_down.weight", f"{Q}.lora_up.weight"


BROKEN: list[tuple[str, Callable[[dict[str, Tensor]], Any], str]] = [
    ("OFT", lambda t: (t.clear(), t.update({f"{Q}.oft_blocks": torch.ones(2, 2)})), "oft_blocks is of no kind that is supported"),
    ("DoRA", lambda t: t.update({f"{Q}.dora_scale": torch.ones(7, 1)}), r"its magnitude is \(7, 1\), for a weight of \(6, 6\)"),
    ("a scalar", lambda t: t.update({f"{Q}.scalar": torch.ones(())}), "scalar is of no kind that is supported"),
    ("no up", lambda t: t.pop(UP), f"{Q}: has no lora_B"),
    ("no module", lambda t: t.update(linear("lora_unet_x") | linear("lora_unet_y")), "no module for lora_unet_x, lora_unet_y; the nearest"),
    ("an alpha alone", lambda t: t.update({"lora_unet_conv_in.alpha": torch.ones(())}), "lora_unet_conv_in: has no lora_A"),
    ("many alphas", lambda t: t.update({f"{Q}.alpha": torch.ones(2)}), r"has an alpha of \(2,\), not one number"),
    ("NaN for an alpha", lambda t: t.update({f"{Q}.alpha": torch.tensor(float("nan"))}), "alpha must be a finite number"),
    ("another shape", lambda t: t.update({DOWN: torch.ones(2, 7)}), r"has factors \(2, 7\) and \(6, 2\) for a weight of \(6, 6\)"),
    ("another rank", lambda t: t.update({DOWN: torch.ones(3, 6)}), r"has factors \(3, 6\) and \(6, 2\)"),
    ("a kernel turned", lambda t: t.update({"lora_unet_conv_in.lora_down.weight": torch.ones(2, 3, 3, 4), "lora_unet_conv_in.lora_up.weight": torch.ones(6, 2, 1, 1)}), r"for a weight of \(6, 4, 3, 3\)"),
    ("a difference of another shape", lambda t: t.update({f"{Q}.diff_b": torch.ones(7)}), r"mid.attn1.to_q.bias: its D is \(7,\), should be \(6,\)"),
    ("a difference and a pair", lambda t: t.update({f"{Q}.diff": torch.ones(6, 6)}), "there are 2 updates of it"),
    ("a difference without a module", lambda t: t.update({"lora_unet_x.diff": torch.ones(6)}), "no module for lora_unet_x; the nearest"),
    ("one weight twice", lambda t: t.update(linear("lycoris_mid_attn1_to_q")), "there are 2 updates of it"),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "message"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_a_file_that_does_not_fit_is_refused_whole(
    edit: Callable[[dict[str, Tensor]], Any], message: str, tmp_path: Path
) -> None:
    tensors, model = linear(Q), UNet()
    edit(tensors)
    with pytest.raises(FileError, match=message):
        load_lora(model, saved(tmp_path, tensors))
    assert not any(hasattr(module, "parametrizations") for module in model.modules())


HOMELESS: list[tuple[str, nn.Module, dict[str, Any], str]] = [
    ("an LSTM", nn.Sequential(nn.LSTM(4, 5)), {}, "no place for 0.weight_ih_l0 of a LSTM"),
    ("an embedding", nn.Sequential(nn.Embedding(4, 5)), {"target": "0"}, "no place for 0.weight of a"),
    ("the model itself", nn.Linear(4, 5), {}, "no place for weight of a"),
    ("an alpha beyond float32", nn.Sequential(nn.Linear(4, 5)), {"alpha": 1e39}, "0.weight has an alpha of 1e.39, in float32 inf"),
    ("an embedding trained whole", nn.Sequential(nn.Embedding(4, 5)), {"train": "0", "target": ()}, "no place for 0.weight of a"),
    ("an alpha of 0", nn.Sequential(nn.Linear(4, 5)), {"alpha": 0}, "0.weight has an alpha of 0"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "options", "message"), [h[1:] for h in HOMELESS], ids=[h[0] for h in HOMELESS]
)
def test_what_the_format_cannot_hold_is_refused_before_writing(
    model: nn.Module, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = copy.deepcopy(model)
    register_lora(model, rank=1, **options)
    with pytest.raises(FileError, match=f"nothing was written: {message}"):
        save_lora(model, tmp_path / "out.safetensors", format="kohya")
    assert not (tmp_path / "out.safetensors").exists()
