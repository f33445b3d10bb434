"""Kohya's, LyCORIS' and diffusers' files: names, alphas, kernels, and what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_param import FileError, LoRAError, load_lora, lora_summary, register_lora, save_lora
from lora_param.formats import FORMATS, recognised

from .cases import shake


class UNet(nn.Module):
    """Names as a Stable Diffusion's UNet has them, with an underscore inside."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, 6, 3, padding=1)
        self.mid = nn.ModuleDict({"attn1": Projections(6), "conv_out": nn.Conv2d(6, 4, 1)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        x = self.mid["attn1"](x.movedim(1, -1)).movedim(-1, 1)
        return self.mid["conv_out"](x)


class Projections(nn.Module):
    """The layers of an attention, in a row."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(width, width), nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)])

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out[0](self.to_k(self.to_q(x)))


class CLIPText(nn.Module):
    """Names as a text encoder has them."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict({"q_proj": nn.Linear(6, 6), "out_proj": nn.Linear(6, 6)})

    def forward(self, x: Tensor) -> Tensor:
        return self.self_attn["out_proj"](self.self_attn["q_proj"](x))


def pipeline() -> nn.ModuleDict:
    return nn.ModuleDict({"unet": UNet(), "text_encoder": CLIPText()})


def linear(name: str, rank: int = 2, alpha: float | None = None) -> dict[str, Tensor]:
    tensors = {
        f"{name}.lora_down.weight": torch.randn(rank, 6),
        f"{name}.lora_up.weight": torch.randn(6, rank),
    }
    return tensors if alpha is None else tensors | {f"{name}.alpha": torch.tensor(alpha)}


def saved(folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file(tensors, folder / "lora.safetensors", metadata)
    return folder / "lora.safetensors"


def update(model: nn.Module, path: str, name: str = "weight") -> Tensor:
    """Return what an adapter adds to a weight."""
    module = model.get_submodule(path)
    return getattr(module, name) - module.parametrizations[name].original


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


Q = "lora_unet_mid_attn1_to_q"
DOWN, UP = f"{Q}.lora_down.weight", f"{Q}.lora_up.weight"
BROKEN: list[tuple[str, Callable[[dict[str, Tensor]], Any], str]] = [
    ("Tucker", lambda t: t.update({f"{Q}.lora_mid.weight": torch.ones(2, 2, 3, 3)}), r"lora_mid\.weight is no plain LoRA's"),
    ("LoHa", lambda t: (t.clear(), t.update({f"{Q}.hada_w1_a": torch.ones(2, 2)})), "hada_w1_a is no plain LoRA's"),
    ("LoKr", lambda t: (t.clear(), t.update({f"{Q}.lokr_w1": torch.ones(2, 2)})), "lokr_w1 is no plain LoRA's"),
    ("OFT", lambda t: (t.clear(), t.update({f"{Q}.oft_blocks": torch.ones(2, 2)})), "oft_blocks is no plain LoRA's"),
    ("DoRA", lambda t: t.update({f"{Q}.dora_scale": torch.ones(6, 1)}), "dora_scale is no plain LoRA's"),
    ("a scalar", lambda t: t.update({f"{Q}.scalar": torch.ones(())}), "scalar is no plain LoRA's"),
    ("no up", lambda t: t.pop(UP), f"{Q} has no lora_B"),
    ("no module", lambda t: t.update(linear("lora_unet_x") | linear("lora_unet_y")), "no module for lora_unet_x, lora_unet_y; the nearest"),
    ("an alpha alone", lambda t: t.update({"lora_unet_conv_in.alpha": torch.ones(())}), "lora_unet_conv_in has no lora_A"),
    ("many alphas", lambda t: t.update({f"{Q}.alpha": torch.ones(2)}), r"alpha of .* is \(2,\), not one number"),
    ("NaN for an alpha", lambda t: t.update({f"{Q}.alpha": torch.tensor(float("nan"))}), "alpha and factors must be finite"),
    ("another shape", lambda t: t.update({DOWN: torch.ones(2, 7)}), r"has factors \(2, 7\) and \(6, 2\) for a weight of \(6, 6\)"),
    ("another rank", lambda t: t.update({DOWN: torch.ones(3, 6)}), r"has factors \(3, 6\) and \(6, 2\)"),
    ("a kernel turned", lambda t: t.update({"lora_unet_conv_in.lora_down.weight": torch.ones(2, 3, 3, 4), "lora_unet_conv_in.lora_up.weight": torch.ones(6, 2, 1, 1)}), r"for a weight of \(6, 4, 3, 3\)"),
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
    ("an LSTM", nn.Sequential(nn.LSTM(4, 5)), {}, "no place for 0.weight_ih_l0 of a ParametrizedLSTM"),
    ("an embedding", nn.Sequential(nn.Embedding(4, 5)), {"target": "0"}, "no place for 0.weight of a"),
    ("the model itself", nn.Linear(4, 5), {}, "no place for weight of a"),
    ("an alpha beyond float32", nn.Sequential(nn.Linear(4, 5)), {"alpha": 1e39}, "0.weight has an alpha of 1e.39, in float32 inf"),
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


# diffusers

A, B = "lora_A.weight", "lora_B.weight"
LAYOUTS: list[tuple[str, str, str, str]] = [
    ("as PEFT's", f"unet.mid.attn1.to_q.{A}", f"unet.mid.attn1.to_q.{B}", "unet.mid.attn1.to_q"),
    ("without a part", f"mid.attn1.to_q.{A}", f"mid.attn1.to_q.{B}", "unet.mid.attn1.to_q"),
    ("processors", "unet.mid.attn1.processor.to_q_lora.down.weight", "unet.mid.attn1.processor.to_q_lora.up.weight", "unet.mid.attn1.to_q"),
    ("processors' out", "unet.mid.attn1.processor.to_out_lora.down.weight", "unet.mid.attn1.processor.to_out_lora.up.weight", "unet.mid.attn1.to_out.0"),
    ("lora", "unet.mid.attn1.to_k.lora.down.weight", "unet.mid.attn1.to_k.lora.up.weight", "unet.mid.attn1.to_k"),
    ("an encoder's", "text_encoder.self_attn.q_proj.lora_linear_layer.down.weight", "text_encoder.self_attn.q_proj.lora_linear_layer.up.weight", "text_encoder.self_attn.q_proj"),
    ("an encoder's, old", "text_encoder.self_attn.to_q_lora.down.weight", "text_encoder.self_attn.to_q_lora.up.weight", "text_encoder.self_attn.q_proj"),
    ("an encoder's out, old", "text_encoder.self_attn.to_out_lora.down.weight", "text_encoder.self_attn.to_out_lora.up.weight", "text_encoder.self_attn.out_proj"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("down", "up", "path"), [each[1:] for each in LAYOUTS], ids=[each[0] for each in LAYOUTS]
)
def test_layouts_of_diffusers_are_read(down: str, up: str, path: str, tmp_path: Path) -> None:
    part, _, inside = path.partition(".")
    tensors = {down: torch.randn(2, 6), up: torch.randn(6, 2)}
    models = [(pipeline()[part], inside), (pipeline(), path)]
    for model, place in models if down.startswith(part) else models[:1]:
        assert load_lora(model, saved(tmp_path, tensors)) == [f"{place}.weight"]
        torch.testing.assert_close(update(model, place), tensors[up] @ tensors[down])


def diffusers(part: str = "unet.") -> dict[str, Tensor]:
    name = f"{part}mid.attn1.to_q"
    return {f"{name}.{A}": torch.randn(2, 6), f"{name}.{B}": torch.randn(6, 2)}


@pytest.mark.parametrize("part", ["unet.", ""], ids=["pipeline", "one model"])
def test_the_config_in_the_metadata_scales(part: str, tmp_path: Path) -> None:
    fields = {"r": 1, "lora_alpha": 3, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_k": 9}}
    config = {f"{part}{field}": value for field, value in fields.items()}
    tensors, model = diffusers(part), UNet()
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(config)}
    load_lora(model, saved(tmp_path, tensors, metadata))
    A_, B_ = tensors.values()
    torch.testing.assert_close(update(model, "mid.attn1.to_q"), B_ @ A_ * 1.5)


METADATA: list[tuple[str, str, str]] = [
    ("DoRA", json.dumps({"unet.r": 2, "unet.use_dora": True}), "use_dora=True"),
    ("another rank", json.dumps({"unet.r": 3}), r"unet\.mid\.attn1\.to_q has rank 2, by its config 3"),
    ("no JSON", "{", "lora_adapter_metadata is no JSON"),
    ("no object", "[1]", "lora_adapter_metadata is no JSON object"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"), [m[1:] for m in METADATA], ids=[m[0] for m in METADATA]
)
def test_metadata_that_cannot_be_honoured_are_refused(
    text: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(FileError, match=message):
        load_lora(UNet(), saved(tmp_path, diffusers(), {"lora_adapter_metadata": text}))


def test_diffusers_keys_beside_plain_lora_are_refused_by_name(tmp_path: Path) -> None:
    tensors = diffusers() | {"unet.mid.attn1.to_q.lora_magnitude_vector": torch.ones(6)}
    with pytest.raises(FileError, match=r"to_q\.lora_magnitude_vector is no plain LoRA's"):
        load_lora(UNet(), saved(tmp_path, tensors))
    tensors = diffusers() | {
        f"text_encoder.x.{A}": torch.ones(2, 6),
        f"text_encoder.x.{B}": torch.ones(6, 2),
    }
    path, model = saved(tmp_path, tensors), UNet()
    with pytest.raises(FileError, match=r"no module for text_encoder\.x; the nearest"):
        load_lora(model, path)
    assert load_lora(model, path, prefix="unet.") == ["mid.attn1.to_q.weight"]


def with_config(folder: Path, tensors: dict[str, Tensor], **fields: Any) -> Path:
    config = {f"unet.{name}": value for name, value in fields.items()}
    metadata = {"format": "pt", "license": "MIT", "lora_adapter_metadata": json.dumps(config)}
    return saved(folder, tensors, metadata)


def test_a_pattern_of_the_config_is_held_against_the_name_in_its_part(tmp_path: Path) -> None:
    ranks = {"^mid.attn1.to_q": 2, "^unet.mid.attn1.to_q": 3}
    path = with_config(tmp_path, diffusers(), r=1, rank_pattern=ranks)
    assert load_lora(UNet(), path) == ["mid.attn1.to_q.weight"]


def test_a_config_in_the_metadata_that_could_take_minutes_is_refused(tmp_path: Path) -> None:
    names = {"unet.mid.attn1.to_q": f"unet.{'a.' * 400}a"}
    tensors = {key.replace(*next(iter(names.items()))): t for key, t in diffusers().items()}
    path = with_config(tmp_path, tensors, r=2, rank_pattern={"a*a*a*x": 2})
    with pytest.raises(FileError, match="has too many repetitions"):
        FORMATS[3].read(path, None)


def test_the_config_in_the_metadata_is_no_string_of_the_callers(tmp_path: Path) -> None:
    path = with_config(tmp_path, diffusers(), r=2)
    assert recognised(path).about(path).metadata == {"license": "MIT"}
