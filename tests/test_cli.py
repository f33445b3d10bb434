"""The command line: what it shows, writes and refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_param import (
    base_state_dict,
    load_lora,
    lora_parameters,
    merge_lora,
    register_lora,
    save_lora,
)
from lora_param.__main__ import COMMANDS, main
from lora_param.formats.tensors import header

from .cases import CASES, Case, Experts, shake


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5)
        self.conv = nn.Conv2d(4, 6, 3, groups=2)
        self.attention = nn.MultiheadAttention(8, 2)
        self.tokens = nn.Embedding(7, 5)
        self.experts = Experts()


TARGETS = ["linear", "conv", "attention", "tokens", "up"]


def adapted(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    model = Net().to(dtype)
    register_lora(model, rank=2, alpha=3.0, target=TARGETS)
    shake(model)
    return model


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    """An adapter, its base, and a path for what is made of them."""
    adapter, base = tmp_path / "adapter.safetensors", tmp_path / "base.safetensors"
    model = adapted()
    save_lora(model, adapter)
    save_file(base_state_dict(model), base, {"format": "pt"})
    return adapter, base, tmp_path / "out.safetensors"


def fails(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """Run what can't be done: one line, and a status that says so."""
    assert main([str(each) for each in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    return captured.err


def works(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    assert main([str(each) for each in arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_info_lists_weights_and_totals(
    files: tuple[Path, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = works(capsys, "info", files[0]).splitlines()
    assert lines[0] == "format native, base tests.test_cli.Net"
    assert [line.split()[0] for line in lines[3:-2]] == [
        "linear.weight",
        "conv.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "tokens.weight",
        "experts.up",
    ]
    assert lines[4].split()[1:4] == ["6x2x3x3", "2", "3"]
    size = sum(factor.numel() for factor in lora_parameters(adapted()))
    assert lines[-1] == f"6 weights, {size} parameters"


def test_infos_figures_are_those_of_the_dense_update(
    files: tuple[Path, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    found = json.loads(works(capsys, "info", files[0], "--json"))
    model = adapted().double()
    plain = base_state_dict(model)
    for each in found["weights"]:
        weight = model
        for part in each["weight"].split("."):
            weight = getattr(weight, part)
        update = (weight - plain[each["weight"]]).detach()
        view = update if update.ndim == 3 else update.flatten(1)
        values = torch.linalg.svdvals(view)
        share = (values / values.sum(-1, keepdim=True)).clamp_min(1e-300)
        effective = (-(share * share.log()).sum(-1)).exp().mean()
        assert each["shape"] == list(update.shape)
        assert each["norm"] == pytest.approx(update.norm().item(), rel=1e-5)
        assert each["effective_rank"] == pytest.approx(effective.item(), rel=1e-5)


def test_an_update_of_zero_has_no_norm_and_no_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = nn.Linear(4, 3)
    register_lora(model, rank=2)
    save_lora(model, tmp_path / "zero.safetensors")
    (found,) = json.loads(works(capsys, "info", tmp_path / "zero.safetensors", "--json"))["weights"]
    assert (found["norm"], found["effective_rank"]) == (0.0, 0.0)


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
    assert header(out).metadata == {"format": "pt"}
    assert said == f"{out}: 6 of {len(expected)} tensors changed\n"


def merging(adapter: Path, base: Path, out: Path) -> tuple[Any, ...]:
    return "merge", adapter, "--base", base, "--out", out


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


def change(name: str) -> Callable[[dict[str, Tensor]], None]:
    def apply(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[0] += 1

    return apply


@pytest.mark.parametrize("name", ["linear.weight", "linear.bias"])
def test_another_base_is_merged_only_when_told_to(
    name: str, files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(files[1])
    change(name)(tensors)
    save_file(tensors, files[1])
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


def test_converting_beside_another_base_keeps_the_bases_fingerprint(
    files: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, base, out = files
    other = tmp_path / "other.safetensors"
    save_file({name: each + 1 for name, each in load_file(base).items()}, other)
    works(capsys, "convert", str(adapter), str(out), "--to", "native", "--base", str(other))
    works(capsys, "check", str(out), "--base", str(base))
    fails(capsys, "check", str(out), "--base", str(other))


@pytest.mark.parametrize("option", ["alpha=abc", "alpha=[1]", "alpha={}", f"alpha={'9' * 400}"])
def test_an_option_of_any_kind_ends_in_one_line(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "lora.pt"
    torch.save({"0.lora_A": torch.ones(2, 6), "0.lora_B": torch.ones(5, 2)}, file)
    fails(capsys, "info", str(file), "--option", option)


def test_the_outputs_of_a_checkpoint_with_bytes_of_another_shape_are_refused(
    files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, base, out = files
    base.write_bytes(base.read_bytes().replace(b"[5,6]", b"[6,6]"))
    assert "bytes of another shape" in fails(capsys, *merging(adapter, base, out))


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


def test_checking_finds_the_base_to_the_bit(
    files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    said = works(capsys, "check", files[0], "--base", files[1])
    count = len(list(Net().parameters()))
    assert said == f"{files[1]}: the base to the bit, all {count} parameters\n"


def test_checking_takes_a_state_dict_and_tied_parameters_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 3)})
    model["b"].weight = model["a"].weight
    model["b"].bias.data.copy_(model["a"].bias)
    register_lora(model, rank=1, target="c")
    save_lora(model, tmp_path / "adapter.safetensors")
    tensors = base_state_dict(model)
    del tensors["b.weight"]
    torch.save(tensors, tmp_path / "base.pt")
    works(capsys, "check", tmp_path / "adapter.safetensors", "--base", tmp_path / "base.pt")
    tensors["a.bias"] = tensors.pop("b.bias")
    torch.save(tensors, tmp_path / "base.pt")
    error = fails(capsys, "check", tmp_path / "adapter.safetensors", "--base", tmp_path / "base.pt")
    assert "1 of 6 parameters of its base aren't those of" in error
    assert error.endswith("b.bias\n")


BAD_BASES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "one bit": (change("linear.bias"), "1 of 11 parameters of its base aren't those"),
    "gone": (lambda tensors: tensors.pop("conv.bias"), "aren't those of"),
    "adapted gone": (lambda tensors: tensors.pop("conv.weight"), "this model lacks 1 of 6: conv.weight"),
    "shape": (lambda tensors: tensors.update({"linear.weight": torch.ones(5, 7)}), "don't fit the model's: linear.weight"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_BASES)
def test_checking_says_what_is_not_the_base(
    case: str, files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    harm, message = BAD_BASES[case]
    tensors = load_file(files[1])
    harm(tensors)
    save_file(tensors, files[1])
    assert message in fails(capsys, "check", files[0], "--base", files[1])


def test_a_file_without_a_fingerprint_can_not_be_checked_to_the_bit(
    files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    save_lora(adapted(), files[0], base={})
    assert "it holds no fingerprint" in fails(capsys, "check", files[0], "--base", files[1])


def linears() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Conv1d(5, 4, 3), nn.Linear(5, 4))


def written(model: nn.Module, tmp_path: Path) -> tuple[nn.Module, Path, Path]:
    """Adapt a model, and save its adapter and its base."""
    register_lora(model, rank=2, alpha=3.0)
    shake(model)
    save_lora(model, tmp_path / "adapter.safetensors")
    save_file(base_state_dict(model), tmp_path / "base.safetensors")
    return model, tmp_path / "adapter.safetensors", tmp_path / "base.safetensors"


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


def test_a_warning_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, base, out = (
        tmp_path / name for name in ("a.safetensors", "b.safetensors", "c.safetensors")
    )
    down, up, plain = torch.randn(4, 6), torch.randn(2, 4), torch.randn(2, 6)
    save_file({"lora_unet_0.lora_down.weight": down, "lora_unet_0.lora_up.weight": up}, file)
    save_file({"0.weight": plain}, base)
    assert main([str(each) for each in merging(file, base, out)]) == 0
    error = capsys.readouterr().err
    assert "rank lowered to the weight's smaller side, the update unchanged: 0.weight" in error
    assert error.count("\n") == 1
    assert torch.allclose(load_file(out)["0.weight"], plain + up @ down, atol=1e-5)


FAILURES = [
    (["info", "nowhere.safetensors"], "nowhere.safetensors: can't be read: No such file"),
    (["info", __file__], "is of no known format"),
    (["info", "{adapter}", "--option", "alpha"], "an option is written NAME=VALUE, got alpha"),
    (["info", "{adapter}", "--option", "alpha=3"], "the format native takes [], got alpha"),
    (["check", "{adapter}", "--base", __file__], "test_cli.py: no state dict"),
    (["merge", "{adapter}", "--base", __file__, "--out", "x"], "test_cli.py: no safetensors file"),
]


@pytest.mark.parametrize(("arguments", "message"), FAILURES)
def test_a_failure_is_one_line(
    arguments: list[str],
    message: str,
    files: tuple[Path, Path, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = fails(capsys, *(each.format(adapter=files[0]) for each in arguments))
    assert error.startswith("lora-param: ")
    assert message in error


@pytest.mark.parametrize(
    "arguments", [[], ["zip"], ["check", "file"], ["convert", "a", "b", "--to", "x"]]
)
def test_a_bad_command_is_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("command", [call.__name__ for call in COMMANDS])
def test_every_commands_help_has_an_example(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert f"example: lora-param {command} " in capsys.readouterr().out


def test_it_runs_as_a_module(files: tuple[Path, Path, Path]) -> None:
    command = [sys.executable, "-m", "lora_param", "info", str(files[0])]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("format native, base ")
    assert result.stderr == ""
