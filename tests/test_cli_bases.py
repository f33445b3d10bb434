"""What a checkpoint can be: a pickle, shards, a folder, and names that lack a prefix or have one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_param import base_state_dict, merge_lora, register_lora, save_lora

from .cases import shake
from .cli_cases import fails, merging, works
from .file_cases import header_of

Tensors = dict[str, Tensor]


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(6, 5), nn.BatchNorm1d(5)


def adapted() -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleDict({"bert": Inner(), "head": nn.Linear(5, 2)})
    register_lora(model, rank=2, target="fc", train="bert.norm")
    shake(model)
    model["bert"].norm(torch.randn(4, 5))
    return model


def pickled(tensors: Tensors, folder: Path) -> Path:
    torch.save(tensors, folder / "model.pt")
    return folder / "model.pt"


def in_a_training(tensors: Tensors, folder: Path) -> Path:
    torch.save({"epoch": 3, "state_dict": tensors, "loss": [0.1]}, folder / "last.ckpt")
    return folder / "last.ckpt"


def single(tensors: Tensors, folder: Path) -> Path:
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def sharded(tensors: Tensors, folder: Path) -> Path:
    names = {}
    for index in range(3):
        shard = folder / f"model-{index}.safetensors"
        own = dict(list(tensors.items())[index::3])
        save_file(own, shard, {"format": "pt"})
        names |= dict.fromkeys(own, shard.name)
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


def index_of_shards(tensors: Tensors, folder: Path) -> Path:
    return sharded(tensors, folder) / "model.safetensors.index.json"


def shards_of_pickles(tensors: Tensors, folder: Path) -> Path:
    torch.save(tensors, folder / "a.bin")
    names = dict.fromkeys(tensors, "a.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


WAYS = [pickled, in_a_training, single, sharded, index_of_shards, shards_of_pickles]
RENAMED: dict[str, Callable[[str], str]] = {
    "the model's names": lambda name: name,
    "names with a prefix": lambda name: f"model.{name}",
    "names of the wrapped model": lambda name: f"_orig_mod.{name}",
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("names", RENAMED)
def test_a_checkpoint_is_found_in_all_the_ways_it_is_kept(
    way: Callable[[Tensors, Path], Path],
    names: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, out = adapted(), tmp_path / "out.safetensors"
    save_lora(model, adapter := tmp_path / "adapter.safetensors")
    plain = {name: each.clone() for name, each in base_state_dict(model).items()}
    (folder := tmp_path / "base").mkdir()
    base = way({RENAMED[names](name): each for name, each in plain.items()}, folder)
    said = works(capsys, "check", adapter, "--base", base)
    assert said == f"{base}: the base to the bit, all {len(plain)} parameters\n"
    works(capsys, *merging(adapter, base, out))
    merge_lora(model)
    found, expected = load_file(out), model.state_dict()
    assert found.keys() == {RENAMED[names](name) for name in expected}
    assert all(torch.equal(found[RENAMED[names](name)], each) for name, each in expected.items())
    assert header_of(out).metadata == {"format": "pt"}


def without_prefix(tmp_path: Path, **options: Any) -> tuple[nn.Module, Path, Path]:
    """Save an adapter, and a checkpoint of the inner model alone."""
    model = adapted()
    save_lora(model, adapter := tmp_path / "adapter.safetensors", **options)
    plain = base_state_dict(model["bert"])
    save_file(plain, base := tmp_path / "base.safetensors")
    return model, adapter, base


def test_a_checkpoint_of_the_inner_model_takes_what_is_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, adapter, base = without_prefix(tmp_path, base={})
    works(capsys, *merging(adapter, base, tmp_path / "out.safetensors"))
    merge_lora(model)
    expected = model["bert"].state_dict()
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_what_the_inner_model_lacks_of_the_base_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, adapter, base = without_prefix(tmp_path)
    assert "lacks head.weight" in fails(capsys, *merging(adapter, base, tmp_path / "out"))
    assert "head.weight; head.bias" in fails(capsys, "check", adapter, "--base", base)


def test_a_prefix_that_cannot_be_seen_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = nn.ModuleDict({"bert": nn.Linear(6, 5)})
    register_lora(model, rank=2)
    shake(model)
    save_lora(model, adapter := tmp_path / "lora.safetensors", format="kohya")
    save_file(base_state_dict(model["bert"]), base := tmp_path / "base.safetensors")
    command = merging(adapter, base, tmp_path / "out.safetensors")
    assert "no module for lycoris_bert" in fails(capsys, *command)
    works(capsys, *command, "--prefix", "bert.")
    torch.testing.assert_close(load_file(tmp_path / "out.safetensors")["weight"], model.bert.weight)


def test_two_tensors_of_one_name_are_refused_when_a_prefix_is_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, adapter, base = without_prefix(tmp_path, base={})
    tensors = load_file(base)
    save_file(tensors | {"bert.fc.bias": torch.ones(5)}, base)
    command = merging(adapter, base, tmp_path / "out.safetensors")
    error = fails(capsys, *command, "--prefix", "bert.")
    assert "more than one tensor is fc.bias; keep one of them" in error


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nothing": (lambda folder: None, "has none of *.index.json, *.safetensors"),
    "two": (lambda folder: [save_file({}, folder / f"{n}.safetensors") for n in "ab"], "has several of a.safetensors, b.safetensors; name a file"),
    "no index": (lambda folder: (folder / "a.index.json").write_text("[]"), "a.index.json: can't be read as JSON: no JSON object"),
    "no names": (lambda folder: (folder / "a.index.json").write_text('{"weight_map": {"a": 1}}'), "no index of shards"),
    "no JSON": (lambda folder: (folder / "a.index.json").write_text("{"), "a.index.json: can't be read"),
    "elsewhere": (lambda folder: (folder / "a.index.json").write_text('{"weight_map": {"a": "../b"}}'), "'../b' is no file beside it"),
    "a shard that is gone": (lambda folder: (folder / "a.index.json").write_text('{"weight_map": {"a": "b"}}'), "b: can't be read: No such file"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_folder_without_one_checkpoint_is_refused(
    case: str, files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    make, message = BAD[case]
    (folder := files[2].with_name("folder")).mkdir()
    make(folder)
    assert message in fails(capsys, "check", files[0], "--base", folder)


def test_a_merged_file_is_not_written_over_a_shard_that_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = adapted()
    save_lora(model, adapter := tmp_path / "adapter.safetensors")
    (folder := tmp_path / "base").mkdir()
    for base in (sharded, index_of_shards):
        path = base({n: t.clone() for n, t in base_state_dict(model).items()}, folder)
        out = folder / "model-1.safetensors"
        assert "would be read and written" in fails(capsys, *merging(adapter, path, out))


def test_info_shows_metadata_and_kinds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_lora(adapted(), tmp_path / "a.safetensors", metadata={"license": "MIT"})
    lines = works(capsys, "info", tmp_path / "a.safetensors").splitlines()
    assert lines[1] == "license: MIT"
    assert lines[-1] == "6 weights, 43 parameters"
