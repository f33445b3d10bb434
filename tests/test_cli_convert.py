"""Converting files: nothing is lost, nothing is guessed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_param import (
    base_state_dict,
    load_lora,
    lora_parameters,
    register_lora,
    save_lora,
)
from lora_param.__main__ import main

from .cli_cases import fails, linears, works, written


def test_converting_beside_another_base_keeps_the_bases_fingerprint(
    files: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, base, out = files
    other = tmp_path / "other.safetensors"
    save_file({name: each + 1 for name, each in load_file(base).items()}, other)
    works(capsys, "convert", str(adapter), str(out), "--to", "native", "--base", str(other))
    works(capsys, "check", str(out), "--base", str(base))
    fails(capsys, "check", str(out), "--base", str(other))


@pytest.mark.parametrize(("to", "name"), [("peft", "folder"), ("kohya", "kohya.safetensors")])
def test_converting_there_and_back_gives_the_same_adapter(
    to: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, adapter, base = written(linears(), tmp_path)
    there, back = tmp_path / name, tmp_path / "back.safetensors"
    works(capsys, "convert", adapter, there, "--to", to)
    found = json.loads(works(capsys, "info", there, "--json"))
    assert (found["format"], found["totals"]["weights"]) == (to, 3)
    works(capsys, "convert", there, back, "--to", "native", "--base", base)
    fresh = linears()
    fresh.load_state_dict(base_state_dict(model))
    load_lora(fresh, back, base="require")
    for a, b in zip(lora_parameters(fresh), lora_parameters(model), strict=True):
        assert torch.equal(a, b)
    works(capsys, "merge", there, "--base", base, "--out", tmp_path / "merged.safetensors")


def test_attention_is_known_by_its_names_in_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    _, adapter, base = written(model, tmp_path)
    assert main(["convert", str(adapter), str(tmp_path / "folder"), "--to", "peft"]) == 0
    option = "--option", 'mha_out_proj="once"'
    capsys.readouterr()
    back = tmp_path / "back.safetensors"
    works(capsys, "convert", tmp_path / "folder", back, "--to", "native", "--base", base, *option)
    load_lora(model, back, base="require")


def test_a_grouped_convolution_is_refused_by_peft_though_only_the_file_knows_it(
    files: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = fails(capsys, "convert", files[0], tmp_path / "folder", "--to", "peft")
    assert "conv.weight: PEFT's update of a grouped convolution" in error
    assert not (tmp_path / "folder").exists()


def test_converting_asks_for_what_the_file_does_not_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, adapter, base = written(linears(), tmp_path)
    there = tmp_path / "kohya.safetensors"
    works(capsys, "convert", adapter, there, "--to", "kohya")
    out = tmp_path / "out"
    assert "with --base" in fails(capsys, "convert", there, out, "--to", "native")
    error = fails(capsys, "convert", there, out, "--to", "peft", "--base", base)
    assert "no checkpoint says how a convolution is grouped" in error
    assert "would be read and written" in fails(
        capsys, "convert", adapter, adapter, "--to", "native"
    )
    assert not out.exists()


def test_converting_never_writes_into_the_folder_that_it_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, adapter, base = written(linears(), tmp_path)
    folder = tmp_path / "folder"
    works(capsys, "convert", adapter, folder, "--to", "peft")
    (file,) = folder.glob("*.safetensors")
    error = fails(capsys, "convert", file, folder, "--to", "peft", "--base", base)
    assert "would be read and written" in error


@pytest.mark.parametrize("to", ["native", "peft", "kohya"])
def test_converting_keeps_the_bases_name_and_the_callers_metadata(
    to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = linears()
    model.name_or_path = "someone/something"
    register_lora(model, rank=2)
    adapter, base = tmp_path / "adapter.safetensors", tmp_path / "base.safetensors"
    there, back = tmp_path / "there", tmp_path / "back.safetensors"
    save_lora(model, adapter, metadata={"license": "MIT"})
    save_file(base_state_dict(model), base)
    works(capsys, "convert", adapter, there, "--to", to)
    works(capsys, "convert", there, back, "--to", "native", "--base", base)
    found = json.loads(works(capsys, "info", back, "--json"))
    assert found["metadata"] == {"license": "MIT"}
    assert found["base"] == ("" if to == "kohya" else "someone/something")


def test_the_outline_of_a_model_is_not_taken_for_its_class(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, adapter, base = written(linears(), tmp_path)
    there, back = tmp_path / "there", tmp_path / "back.safetensors"
    works(capsys, "convert", adapter, there, "--to", "kohya")
    works(capsys, "convert", there, back, "--to", "native", "--base", base)
    assert json.loads(works(capsys, "info", back, "--json"))["base"] == ""
