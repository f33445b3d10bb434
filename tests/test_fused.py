"""Flux and SD3 in their two layouts: with fused projections, as their authors have them, and split."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from torch import Tensor, nn

from lora_param import FileError, load_lora, lora_parameters, save_lora

from .kohya_cases import saved

D = 6
FUSED_FLUX = {
    "double_blocks.0.img_attn.qkv": (3 * D, D),
    "double_blocks.0.txt_attn.qkv": (3 * D, D),
    "double_blocks.0.img_attn.proj": (D, D),
    "double_blocks.0.txt_mlp.2": (D, 4 * D),
    "single_blocks.0.linear1": (7 * D, D),
    "single_blocks.0.linear2": (D, 5 * D),
}
SPLIT_FLUX = {
    **{f"transformer_blocks.0.attn.{n}": (D, D) for n in ("to_q", "to_k", "to_v", "to_out.0")},
    **{f"transformer_blocks.0.attn.add_{n}_proj": (D, D) for n in "qkv"},
    "transformer_blocks.0.ff_context.net.2": (D, 4 * D),
    **{f"single_transformer_blocks.0.attn.to_{n}": (D, D) for n in "qkv"},
    "single_transformer_blocks.0.proj_mlp": (4 * D, D),
    "single_transformer_blocks.0.proj_out": (D, 5 * D),
}
FUSED_SD3 = {
    "joint_blocks.0.x_block.attn.qkv": (3 * D, D),
    "joint_blocks.0.x_block.mlp.fc1": (4 * D, D),
}
SPLIT_SD3 = {
    **{f"transformer_blocks.0.attn.to_{n}": (D, D) for n in "qkv"},
    "transformer_blocks.0.ff.net.0.proj": (4 * D, D),
}

Shapes = dict[str, tuple[int, int]]


def model(shapes: Shapes) -> nn.Module:
    """Build a model of linear layers at these paths."""
    torch.manual_seed(0)
    root = nn.Module()
    for path, (out, width) in shapes.items():
        *parents, leaf = path.split(".")
        inner = root
        for name in parents:
            if name not in inner._modules:
                inner.add_module(name, nn.Module())
            inner = inner._modules[name]
        inner.add_module(leaf, nn.Linear(width, out))
    return root


def kohya(shapes: Shapes) -> dict[str, Tensor]:
    tensors = {}
    for path, (out, width) in shapes.items():
        name = f"lora_unet_{path.replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"] = torch.randn(2, width)
        tensors[f"{name}.lora_up.weight"] = torch.randn(out, 2)
        tensors[f"{name}.alpha"] = torch.tensor(3.0)
    return tensors


def diffusers(shapes: Shapes) -> dict[str, Tensor]:
    tensors = {}
    for path, (out, width) in shapes.items():
        tensors[f"transformer.{path}.lora_A.weight"] = torch.randn(2, width)
        tensors[f"transformer.{path}.lora_B.weight"] = torch.randn(out, 2)
    return tensors


def added(net: nn.Module, path: str) -> Tensor:
    layer = net.get_submodule(path)
    return layer.weight - layer.parametrizations.weight.original


def products(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what factors add, by their layers, for files in either spelling."""
    found = {}
    for key, A in tensors.items():
        for down, up in (
            (".lora_A.weight", ".lora_B.weight"),
            (".lora_down.weight", ".lora_up.weight"),
        ):
            if key.endswith(down):
                name = key.removesuffix(down)
                found[name] = tensors[name + up] @ A * (tensors.get(f"{name}.alpha", 2.0) / 2)
    return found


PARTS = [
    ("single_blocks.0.linear1", [f"single_transformer_blocks.0.{n}" for n in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]),
    ("double_blocks.0.txt_attn.qkv", [f"transformer_blocks.0.attn.add_{n}_proj" for n in "qkv"]),
    ("double_blocks.0.img_attn.qkv", [f"transformer_blocks.0.attn.to_{n}" for n in "qkv"]),
    ("double_blocks.0.txt_mlp.2", ["transformer_blocks.0.ff_context.net.2"]),
    ("single_blocks.0.linear2", ["single_transformer_blocks.0.proj_out"]),
]  # fmt: skip


def test_a_fused_file_goes_onto_split_layers_part_by_part(tmp_path: Path) -> None:
    net, tensors = model(SPLIT_FLUX), kohya(FUSED_FLUX)
    names = load_lora(net, saved(tmp_path, tensors))
    assert names == [f"{path}.weight" for path in SPLIT_FLUX]
    updates = products(tensors)
    for whole, parts in PARTS:
        expected = updates[f"lora_unet_{whole.replace('.', '_')}"]
        torch.testing.assert_close(torch.cat([added(net, part) for part in parts]), expected)


def test_a_fused_file_is_placed_as_diffusers_places_it(tmp_path: Path) -> None:
    shapes = {path: shape for path, shape in FUSED_FLUX.items() if "linear1" not in path}
    net, tensors = model(SPLIT_FLUX), kohya(shapes)
    load_lora(net, saved(tmp_path, tensors))
    theirs = products(
        _convert_kohya_flux_lora_to_diffusers({k: t.clone() for k, t in tensors.items()})
    )
    assert len(theirs) == 9
    for name, expected in theirs.items():
        torch.testing.assert_close(added(net, name.removeprefix("transformer.")), expected)


def test_a_split_file_goes_onto_fused_layers_as_blocks(tmp_path: Path) -> None:
    net, tensors = model(FUSED_FLUX), diffusers(SPLIT_FLUX)
    names = load_lora(net, saved(tmp_path, tensors))
    assert names[:3] == [f"double_blocks.0.img_attn.qkv.weight[{k}:{k + 6}]" for k in (0, 6, 12)]
    updates = products(tensors)
    for whole, parts in PARTS:
        expected = torch.cat([updates[f"transformer.{part}"] for part in parts])
        torch.testing.assert_close(added(net, whole), expected)
    kept = sum(each.numel() for each in tensors.values())
    assert sum(each.numel() for each in lora_parameters(net)) == kept


def test_blocks_of_fused_layers_come_back_onto_split_ones_by_kohyas_file(tmp_path: Path) -> None:
    fused, split, path = model(FUSED_FLUX), model(SPLIT_FLUX), tmp_path / "back.safetensors"
    load_lora(fused, saved(tmp_path, diffusers(SPLIT_FLUX)))
    with pytest.warns(UserWarning, match="has no blocks of rows"):
        save_lora(fused, path, format="kohya")
    with pytest.warns(UserWarning, match="rank lowered"):  # to that of these small layers
        load_lora(split, path)
    for whole, parts in PARTS:
        expected = added(fused, whole)
        torch.testing.assert_close(torch.cat([added(split, part) for part in parts]), expected)


def test_some_parts_of_a_fused_layer_leave_the_others_alone(tmp_path: Path) -> None:
    shapes = {
        path: shape for path, shape in SPLIT_FLUX.items() if "single" in path and "to_k" not in path
    }
    net = model(FUSED_FLUX)
    load_lora(net, saved(tmp_path, diffusers(shapes)))
    moved = added(net, "single_blocks.0.linear1").any(1)
    assert moved.tolist() == [not D <= row < 2 * D for row in range(7 * D)]


@pytest.mark.parametrize(("have", "given"), [(SPLIT_SD3, FUSED_SD3), (FUSED_SD3, SPLIT_SD3)])
def test_sd3_has_two_layouts_too(have: Shapes, given: Shapes, tmp_path: Path) -> None:
    net, tensors = model(have), kohya(given)
    load_lora(net, saved(tmp_path, tensors))
    got = torch.cat([added(net, path) for path in have])
    torch.testing.assert_close(got, torch.cat([*products(tensors).values()]))


REFUSED: dict[str, tuple[Shapes, dict[str, Tensor], str]] = {
    "another kind": (SPLIT_FLUX, {"lora_unet_single_blocks_0_linear1.diff": torch.ones(42, 6)}, "in this model's layout only a plain LoRA can be put"),
    "another size": (SPLIT_FLUX, kohya({"single_blocks.0.linear1": (18, 6)}), r"has 18 outputs, and its parts here \[6, 6, 6, 24\]"),
    "no known layout": ({"blocks.0.qkv": (18, 6)}, kohya({"blocks.0.to_q": (6, 6)}), "no module for lora_unet_blocks_0_to_q"),
    "a part alone": ({"transformer_blocks.0.attn.to_q": (6, 6)}, kohya({"double_blocks.0.img_attn.qkv": (18, 6)}), "no module for lora_unet_double_blocks_0_img_attn_qkv"),
    "both": (FUSED_SD3, kohya({"joint_blocks.0.x_block.attn.qkv": (18, 6), "transformer_blocks.0.attn.to_k": (6, 6)}), r"x_block\.attn\.qkv\.weight(\[6:12\])? and .* overlap"),
}  # fmt: skip


@pytest.mark.parametrize(("have", "tensors", "message"), REFUSED.values(), ids=REFUSED)
def test_what_fits_neither_layout_is_refused(
    have: Shapes, tensors: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    with pytest.raises(FileError, match=message):
        load_lora(model(have), saved(tmp_path, tensors))
