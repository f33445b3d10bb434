"""Merging files: bit for bit, in little memory, over nothing that is read."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lora_param import FileError, base_state_dict, merge_lora, register_lora, save_lora
from lora_param.io.cli import main
from lora_param.io.tensors import open_file

from .cases import CASES, Case, shake
from .cli_cases import adapted, change, fails, merging, spoil, works
from .file_cases import header_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_files_is_merging_the_model_to_the_bit(
    dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = adapted(dtype), tmp_path / "out.safetensors"
    save_lora(model, tmp_path / "adapter.safetensors")
    plain = base_state_dict(model) | {"steps": torch.tensor([3, 4]), "empty": torch.zeros(0, 2)}
    save_file(plain, tmp_path / "base.safetensors", {"format": "pt"})
    said = works(
        capsys, *merging(tmp_path / "adapter.safetensors", tmp_path / "base.safetensors", out)
    )
    merge_lora(model)
    expected = model.state_dict() | {"steps": plain["steps"], "empty": plain["empty"]}
    found = load_file(out)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert header_of(out).metadata == {"format": "pt"}
    assert said == f"{out}: 6 of {len(expected)} tensors changed\n"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_layer_merges_without_its_module(case: Case, tmp_path: Path) -> None:
    layer, _ = case.build()
    case.adapt(layer)
    shake(layer)
    adapter, base, out = (
        tmp_path / name for name in ("a.safetensors", "b.safetensors", "c.safetensors")
    )
    save_lora(layer, adapter)
    save_file({name: t.contiguous() for name, t in base_state_dict(layer).items()}, base)
    assert main([str(each) for each in merging(adapter, base, out)]) == 0
    merge_lora(layer)
    expected = layer.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_file(out).items())


@pytest.mark.parametrize("name", ["linear.weight", "linear.bias"])
def test_another_base_is_merged_only_when_told_to(
    name: str, files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(files[1], change(name))
    assert f"{name} has other bits" in fails(capsys, *merging(*files))
    assert not files[2].exists()
    works(capsys, *merging(*files), "--any-base")


def test_merging_never_writes_over_what_it_reads(
    files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, base, link = files
    link.symlink_to(base)
    before = adapter.read_bytes(), base.read_bytes()
    for out in (adapter, base, link):
        assert "would be read and written" in fails(capsys, *merging(adapter, base, out))
    assert (adapter.read_bytes(), base.read_bytes()) == before


@pytest.mark.filterwarnings("ignore")  # what PEFT does otherwise
def test_what_is_in_a_folder_that_is_read_is_not_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, folder, base = nn.Sequential(nn.Linear(6, 5)), tmp_path / "peft", tmp_path / "b"
    save_file(model.state_dict(), base, {"format": "pt"})
    register_lora(model, rank=2)
    save_lora(model, folder, format="peft")
    tensors, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    before = tensors.read_bytes(), config.read_bytes()
    for adapter, out in ((folder, tensors), (folder, config), (tensors, config)):
        assert "would be read and written" in fails(capsys, *merging(adapter, base, out))
    assert (tensors.read_bytes(), config.read_bytes()) == before


def test_the_outputs_of_a_checkpoint_with_bytes_of_another_shape_are_refused(
    files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, base, out = files
    base.write_bytes(base.read_bytes().replace(b"[5,6]", b"[6,6]"))
    assert "damaged one" in fails(capsys, *merging(adapter, base, out))


def test_a_merged_weight_that_overflows_is_not_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, base, out = (
        tmp_path / name for name in ("a.safetensors", "b.safetensors", "c.safetensors")
    )
    model = nn.Linear(4, 3)
    register_lora(model, rank=1, alpha=1e30, dtype=torch.float64)
    shake(model)
    save_lora(model, adapter, base={})
    save_file({name: tensor.half() for name, tensor in base_state_dict(model).items()}, base)
    assert "weight would not be finite in torch.float16" in fails(
        capsys, *merging(adapter, base, out)
    )
    assert sorted(tmp_path.iterdir()) == [adapter, base]


BAD_BASES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "a bias is gone": (lambda tensors: tensors.pop("linear.bias"), "lacks linear.bias; give the base"),
    "integers": (
        lambda tensors: tensors.update({"linear.weight": torch.ones(5, 6, dtype=torch.int8)}),
        "linear.weight: its dtype must be one of",
    ),
    "integers in place of a bias": (
        lambda tensors: tensors.update({"linear.bias": torch.ones(5, dtype=torch.int32)}),
        "linear.bias has other bits",
    ),
    "a weight by its compiled name too": (
        lambda tensors: tensors.update({"_orig_mod.linear.weight": torch.ones(5, 6)}),
        "more than one tensor is linear.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_BASES)
def test_what_is_not_the_base_is_not_merged(
    case: str, files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    harm, message = BAD_BASES[case]
    spoil(files[1], harm)
    assert message in fails(capsys, *merging(*files))
    assert not files[2].exists()


def test_a_checkpoint_that_holds_tied_weights_once_is_merged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 3)})
    model["b"].weight = model["a"].weight
    register_lora(model, rank=1, target="c")
    adapter, base = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_lora(model, adapter)
    tensors = base_state_dict(model)
    del tensors["b.weight"]
    save_file(tensors, base)
    works(capsys, *merging(adapter, base, tmp_path / "c.safetensors"))


@pytest.mark.parametrize("shape", [(40, 30), (40, 3, 5), (4, 40, 30)], ids=str)
@pytest.mark.parametrize("block", [1, 1000, 2**22])
def test_merging_in_blocks_is_merging_whole(
    shape: tuple[int, ...], block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_param.io.checkpoint.BLOCK", block)
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(shape))
    register_lora(model, rank=3, target="weight")
    shake(model)
    adapter, base, out = (tmp_path / f"{name}.safetensors" for name in "abc")
    save_lora(model, adapter)
    save_file(base_state_dict(model), base)
    assert main([str(each) for each in merging(adapter, base, out)]) == 0
    torch.testing.assert_close(load_file(out)["weight"], model.weight, rtol=0, atol=1e-6)


MEMORY = """
import sys
from pathlib import Path
from lora_param.io.cli import main
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10
before = peak()
assert main(sys.argv[1:]) == 0
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no peak of memory is told here")
def test_merging_takes_less_memory_than_one_tensor(files: tuple[Path, Path, Path]) -> None:
    model = nn.Sequential(*(nn.Linear(4096, 8192, bias=False) for _ in range(2)))
    register_lora(model, rank=2)
    shake(model)
    save_lora(model, files[0])
    save_file(base_state_dict(model), files[1])  # two tensors of 128 MiB
    command = [sys.executable, "-c", MEMORY, *map(str, merging(*files))]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    mebibytes = float(result.stdout.splitlines()[-1])
    assert mebibytes < 128


def test_a_tensor_that_is_there_by_two_names_is_not_changed_by_one(
    files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4)})
    register_lora(model, rank=1)
    save_lora(model, files[0], format="kohya")
    tensors = base_state_dict(model)
    save_file(tensors | {"b.weight": tensors["a.weight"].clone()}, files[1])
    assert "b.weight may be adapted weights by other" in fails(capsys, *merging(*files))
    assert not files[2].exists()
    works(capsys, *merging(*files), "--any-base")


def test_tensors_that_only_begin_alike_are_two(
    files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model = nn.ModuleDict({"a": nn.Linear(9, 9, bias=False)})
    register_lora(model, rank=1)
    save_lora(model, files[0], format="kohya")
    tensors = base_state_dict(model)
    other = tensors["a.weight"].clone()
    other[-1, -1] += 1
    save_file(tensors | {"b.weight": other}, files[1])
    works(capsys, *merging(*files))


def test_a_conversion_makes_no_second_name_the_models_own(
    files: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, native = nn.ModuleDict({"a": nn.Linear(4, 4)}), tmp_path / "native"
    register_lora(model, rank=1)
    save_lora(model, files[0], format="kohya")
    tensors = base_state_dict(model)
    save_file(tensors | {"b.weight": tensors["a.weight"].clone()}, files[1])
    works(capsys, "convert", files[0], native, "--to", "native", "--base", files[1])
    error = fails(capsys, *merging(native, files[1], files[2]))
    assert "b.weight may be adapted weights by other" in error


def test_tensors_of_the_model_may_have_the_same_bits(
    files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    for each in model.parameters():
        nn.init.zeros_(each)
    register_lora(model, rank=1, target="0")
    save_lora(model, files[0])
    save_file(base_state_dict(model), files[1])
    works(capsys, *merging(*files))


@pytest.mark.parametrize("command", ["check", "merge"])
@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_of_a_wrapped_or_parametrized_model_has_the_plain_names(
    command: str, files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    inner = nn.Sequential(nn.Linear(4, 4), parametrizations.spectral_norm(nn.Linear(4, 4)))
    model = torch.compile(inner, backend="eager")
    save_file({key: each.clone() for key, each in model.state_dict().items()}, files[1])
    register_lora(inner, rank=1, target="0")
    shake(inner)
    save_lora(inner, files[0])
    out = ["--out", files[2]] if command == "merge" else []
    works(capsys, command, files[0], "--base", files[1], *out)
    if out:
        found = load_file(files[2])
        assert found.keys() == load_file(files[1]).keys()
        torch.testing.assert_close(found["_orig_mod.0.weight"], inner[0].weight.detach())


def test_a_weight_beneath_a_parametrization_is_not_merged_in_a_file(
    files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model = nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4), use_trivialization=False))
    save_file({key: each.clone() for key, each in model.state_dict().items()}, files[1])
    register_lora(model, rank=1)
    save_lora(model, files[0])
    assert "parametrized: 0.weight; load both" in fails(capsys, *merging(*files))


def test_a_base_that_is_infinite_already_is_merged(
    files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight[1, 2] = -torch.inf
    register_lora(model, rank=1)
    save_lora(model, files[0])
    save_file(base_state_dict(model), files[1])
    works(capsys, *merging(*files))


def test_a_base_that_becomes_shorter_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1000, 90)}, path := tmp_path / "base.safetensors")
    with open_file(path) as file:
        os.truncate(path, path.stat().st_size - 4)
        with pytest.raises(FileError, match="has become shorter"):
            list(file.blocks("a", 100))


def test_a_base_with_complex_numbers_is_merged(
    files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    if "C64" not in str(safetensors.torch._TYPES):
        pytest.skip("this release of safetensors writes no complex numbers")
    model = nn.Sequential(nn.Linear(4, 4))
    model.phase = nn.Parameter(torch.randn(3, dtype=torch.complex64))
    register_lora(model, rank=1)
    save_lora(model, files[0])
    save_file(base_state_dict(model), files[1])
    works(capsys, *merging(*files))


def test_a_combination_is_of_the_base_that_all_its_files_name(
    files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model, (first, second, out) = adapted(), files
    for other in ("lab/base", "lab/other"):
        for path, model.name_or_path in ((first, "lab/base"), (second, other)):  # type: ignore[assignment]
            save_lora(model, path)
        works(capsys, "combine", f"{first}:1", f"{second}:1", "--out", out)
        assert ("base lab/base\n" in works(capsys, "info", out)) == (other == "lab/base")
