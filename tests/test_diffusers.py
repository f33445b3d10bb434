"""Files in diffusers' layouts, new and old, and their config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_param import FileError, load_lora
from lora_param.io.formats import open_adapter
from lora_param.io.outline import UNKNOWN

from .kohya_cases import UNet, pipeline, saved, update

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
    ("another rank", json.dumps({"unet.r": 3}), r"unet\.mid\.attn1\.to_q: has rank 2, by its config 3"),
    ("no JSON", "{", "lora_adapter_metadata can't be read as JSON"),
    ("no object", "[1]", "can't be read as JSON: no JSON object"),
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
    path = with_config(tmp_path, tensors, r=2, rank_pattern={".*a.*a.*x": 2})
    with open_adapter(path) as file, pytest.raises(FileError, match="too many repetitions"):
        file.parse(UNKNOWN)


def test_the_config_in_the_metadata_is_no_string_of_the_callers(tmp_path: Path) -> None:
    path = with_config(tmp_path, diffusers(), r=2)
    with open_adapter(path) as file:
        assert file.about.metadata == {"license": "MIT"}
