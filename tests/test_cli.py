"""The command line: what it shows, checks and refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_param import base_state_dict, lora_parameters, register_lora, save_lora
from lora_param.io import file_summary
from lora_param.io.cli import COMMANDS, main

from .cases import shake
from .cli_cases import Net, adapted, change, fails, merging, spoil, works
from .file_cases import FUZZ
from .peft_cases import PREFIX


def test_info_lists_weights_and_totals(
    files: tuple[Path, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = works(capsys, "info", files[0]).splitlines()
    assert lines[0] == "format native, base tests.cli_cases.Net"
    assert [line.split()[0] for line in lines[3:-2]] == [
        "linear.weight",
        "conv.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "tokens.weight",
        "experts.up",
    ]
    [_, update, *_] = file_summary(files[0]).weights
    norms = [f"{update.norm:.4g}", f"{update.effective_rank:.2f}"]
    assert lines[4].split()[1:] == ["lora", "6x2x3x3", "2", "3", *norms]
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


@pytest.mark.parametrize("option", ["alpha=abc", "alpha=[1]", "alpha={}", f"alpha={'9' * 400}"])
def test_an_option_of_any_kind_ends_in_one_line(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "lora.pt"
    torch.save({"0.lora_A": torch.ones(2, 6), "0.lora_B": torch.ones(5, 2)}, file)
    fails(capsys, "info", str(file), "--option", option)


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
    spoil(files[1], harm)
    assert message in fails(capsys, "check", files[0], "--base", files[1])


def test_a_file_without_a_fingerprint_can_not_be_checked_to_the_bit(
    files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    save_lora(adapted(), files[0], base={})
    assert "it holds no fingerprint" in fails(capsys, "check", files[0], "--base", files[1])


def test_a_warning_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, base, out = (
        tmp_path / name for name in ("a.safetensors", "b.safetensors", "c.safetensors")
    )
    down, up, plain = torch.randn(4, 6), torch.randn(2, 4), torch.randn(2, 6)
    save_file({"lora_unet_0.lora_down.weight": down, "lora_unet_0.lora_up.weight": up}, file)
    save_file({"0.weight": plain}, base)
    assert main([str(each) for each in merging(file, base, out)]) == 0
    error = capsys.readouterr().err
    assert (
        "rank lowered to the weight's smaller side, the same update within rounding: 0.weight"
        in error
    )
    assert error.count("\n") == 1
    assert torch.allclose(load_file(out)["0.weight"], plain + up @ down, atol=1e-5)


FAILURES = [
    (["info", "nowhere.safetensors"], "nowhere.safetensors: can't be read: No such file"),
    (["info", __file__], "is of no known format"),
    (["info", "{adapter}", "--option", "alpha"], "an option is written NAME=VALUE, got alpha"),
    (["info", "{adapter}", "--option", "alpha=3"], "the format native takes [], got alpha"),
    (["info", "{adapter}", "--option", "row=3"], "the format native takes [], got row"),
    (["convert", "{adapter}", "x", "--to", "native", "--write-option", "base=5"], "base must map"),
    (["convert", "{adapter}", "x", "--to", "native", "--write-option", "about=5"], "got about"),
    (["check", "{adapter}", "--base", __file__], "test_cli.py: no state dict"),
    (["merge", "{adapter}", "--base", __file__, "--out", "x"], "test_cli.py: no state dict"),
    (["info", "{base}"], "is of no known format: native, peft, kohya, diffusers, loralib; it holds"),
    (["info", "{pickled}"], "no adapter's file: it holds a, and no lora_A"),
    (["info", "{loralib}"], "hold its lora_alpha; pass it as --option alpha="),
    (["check", "nowhere", "--base", "{base}"], "nowhere: can't be read: No such file"),
    (["check", "{adapter}", "--base", "nowhere"], "nowhere: can't be read: No such file"),
    (["merge", "nowhere", "--base", "{base}", "--out", "x"], "nowhere: can't be read: No such file"),
    (["merge", "{adapter}", "--base", "nowhere", "--out", "x"], "nowhere: can't be read: No such f"),
    (["convert", "nowhere", "x", "--to", "native"], "nowhere: can't be read: No such file"),
    (["merge", "{adapter}", "--base", "{base}", "--out", "x.pt"], "a safetensors file is written, which .pt denies"),
    (["convert", "{adapter}", "x.bin", "--to", "native"], "a safetensors file is written, which .bin"),
    (["combine", "{adapter}:1", "--out", "{adapter}"], "would be read and written; name another"),
    (["resize", "{adapter}", "--rank", "1", "--out", "{adapter}"], "would be read and written"),
    (["extract", "--base", "{base}", "--tuned", "{pickled}", "--rank", "1", "--out", "{base}"], "would be read and written"),
    (["extract", "--base", "{pickled}", "--tuned", "{base}", "--rank", "1", "--out", "{base}"], "would be read and written"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), FAILURES)
def test_a_failure_is_one_line(
    arguments: list[str],
    message: str,
    files: tuple[Path, Path, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter, base, out = files
    pickled, loralib = out.with_name("a.pt"), out.with_name("b.pt")
    torch.save({"a": torch.ones(2)}, pickled)
    torch.save({"linear.lora_A": torch.ones(1, 6), "linear.lora_B": torch.ones(5, 1)}, loralib)
    paths = {"adapter": adapter, "base": base, "pickled": pickled, "loralib": loralib}
    error = fails(capsys, *(each.format(**paths) for each in arguments))
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


@FUZZ
@given(
    command=st.sampled_from([
        ["info", "{adapter}"],
        ["check", "{adapter}", "--base", "{base}"],
        ["merge", "{adapter}", "--base", "{base}", "--out", "{out}"],
        ["convert", "{adapter}", "{out}", "--to", "native", "--base", "{base}"],
    ]),
    harmed=st.sampled_from(["adapter", "base"]),
    place=st.floats(0, 1),
    value=st.binary(max_size=9),
    cut=st.integers(0, 9),
)  # fmt: skip
def test_damaged_files_end_in_one_line_or_do_no_harm(
    command: list[str],
    harmed: str,
    place: float,
    value: bytes,
    cut: int,
    files: tuple[Path, Path, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = dict(zip(("adapter", "base", "out"), files, strict=True))
    whole = paths[harmed].read_bytes()
    begin = int(place * len(whole))
    paths[harmed].write_bytes(whole[:begin] + value + whole[begin + cut :])
    try:
        status = main([each.format(**paths) for each in command])
        captured = capsys.readouterr()
        assert captured.err.count("\n") == status
        assert status == 0 or not files[2].exists()
    finally:
        paths[harmed].write_bytes(whole)
        files[2].unlink(missing_ok=True)


def test_what_a_file_says_moves_no_cursor(
    files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    name = "a\x1b[2Jb"
    factors = {"lora_A": torch.ones(1, 6), "lora_B": torch.ones(5, 1)}
    save_file({f"{PREFIX}{name}.{f}.weight": each for f, each in factors.items()}, files[2])
    files[2].with_name("adapter_config.json").write_text('{"peft_type": "LORA", "r": 1}')
    assert "a\\x1b[2Jb.weight" in works(capsys, "info", files[2])


def test_a_negative_alpha_has_the_norm_of_its_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for alpha in (3.0, -3.0):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        register_lora(model, rank=2, alpha=alpha)
        shake(model)
        save_lora(model, tmp_path / "a.safetensors")
        said = json.loads(works(capsys, "info", tmp_path / "a.safetensors", "--json"))
        found.append([said["weights"][0][key] for key in ("norm", "effective_rank")])
    assert found[0] == found[1]
    assert found[0][0] > 0


def test_an_update_beyond_any_number_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = nn.Linear(4, 3)
    register_lora(model, rank=2, alpha=1e308)
    for factor in lora_parameters(model):
        nn.init.constant_(factor, 1e10)
    save_lora(model, tmp_path / "a.safetensors")
    error = fails(capsys, "info", tmp_path / "a.safetensors", "--json")
    assert "weight: its update isn't finite" in error
