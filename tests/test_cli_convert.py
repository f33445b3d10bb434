"""Converting files: nothing is lost, nothing is guessed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

from lora_param import (
    base_state_dict,
    load_lora,
    lora_parameters,
    register_lora,
    remove_lora,
    save_lora,
)
from lora_param.io.cli import main

from .cli_cases import fails, linears, works, written
from .peft_cases import CASES, Case, chain, floats, output, trained_in_peft


def test_converting_beside_another_base_keeps_the_bases_fingerprint(
    files: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, base, out = files
    other = tmp_path / "other.safetensors"
    save_file({name: each + 1 for name, each in load_file(base).items()}, other)
    works(capsys, "convert", str(adapter), str(out), "--to", "native", "--base", str(other))
    works(capsys, "check", str(out), "--base", str(base))
    fails(capsys, "check", str(out), "--base", str(other))


def test_a_module_by_two_names_in_the_checkpoint_is_the_base_nonetheless(
    files: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    model.add_module("again", model[1])
    register_lora(model, rank=1, target="0")
    save_lora(model, tmp_path / "kohya", format="kohya")
    remove_lora(model)
    save_file({name: each.clone() for name, each in model.state_dict().items()}, files[1])
    native = tmp_path / "native"
    works(capsys, "convert", tmp_path / "kohya", native, "--to", "native", "--base", files[1])
    assert load_lora(model, native, base="require") == ["0.weight"]


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


MIXED = [
    Case(
        "square Linear, then Conv1D", chain(nn.Linear(6, 6), Conv1D(6, 6)), floats(3, 6), ["0", "1"]
    ),
    Case(
        "Conv1D, then square Linear", chain(Conv1D(5, 6), nn.Linear(5, 5)), floats(3, 6), ["0", "1"]
    ),
]


@pytest.mark.filterwarnings("ignore")  # what PEFT does otherwise
@pytest.mark.parametrize("case", CASES + MIXED, ids=[case.id for case in CASES + MIXED])
def test_what_comes_through_two_conversions_is_pefts_own_or_nothing(
    case: Case, tmp_path: Path
) -> None:
    base, theirs = trained_in_peft(case, tmp_path / "peft")
    checkpoint, x = tmp_path / "base.safetensors", case.make_input()
    save_file({name: each.contiguous() for name, each in base.named_parameters()}, checkpoint)
    for kind, source, out in (("native", "peft", "ours"), ("peft", "ours", "back")):
        command = ["convert", tmp_path / source, tmp_path / out, "--to", kind, "--base", checkpoint]
        if main([*map(str, command)]):
            assert case.id in REFUSED
            return
    back = PeftModel.from_pretrained(base, tmp_path / "back").eval()
    torch.testing.assert_close(output(back, x), output(theirs, x), rtol=1e-4, atol=1e-5)
    assert case.id not in REFUSED


REFUSED = {
    *("conv1d", "conv2d", "conv2d 1x1", "conv3d", "ViT"),  # of a guess's groups nothing is known
    *(
        "three of one module",
        "experts",
        "square experts",
        "transposed experts",
        "Mixtral",
    ),  # nor which side is which
    *("GPT-2", "square Linear, then Conv1D", "Conv1D, then square Linear"),  # nor of a matrix
}
"""What PEFT's own files don't say enough about for the command line."""


def test_a_conversion_knows_what_is_beside_the_adapted_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = nn.ModuleDict({"fc": nn.Linear(8, 8), "sub": nn.ModuleDict({"fc": nn.Linear(8, 8)})})
    model["attention"] = nn.MultiheadAttention(8, 2)
    register_lora(model, rank=2, target=["fc.weight", "attention.out_proj"], exclude="sub.*")
    save_lora(model, tmp_path / "adapter.safetensors")
    assert (
        main(
            [
                "convert",
                str(tmp_path / "adapter.safetensors"),
                str(tmp_path / "there"),
                "--to",
                "peft",
            ]
        )
        == 0
    )
    assert "twice, and the file holds half of it" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="twice, and the file holds half of it"):
        save_lora(model, tmp_path / "saved", format="peft")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()


class UNet(nn.Sequential):
    pass


def test_kohyas_prefix_is_the_same_by_hand_and_by_conversion(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = torch.compile(UNet(nn.Linear(4, 4)), backend="eager")
    register_lora(model, rank=1)
    save_lora(model, tmp_path / "ours")
    save_lora(model, tmp_path / "saved", format="kohya")
    works(capsys, "convert", tmp_path / "ours", tmp_path / "converted", "--to", "kohya")
    found = load_file(tmp_path / "converted")
    assert found.keys() == load_file(tmp_path / "saved").keys() == {
        f"lora_unet_0.{name}" for name in ("lora_down.weight", "lora_up.weight", "alpha")
    }  # fmt: skip


def test_a_grouped_convolution_is_no_fact_after_two_conversions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))
    _, adapter, base = written(model, tmp_path)
    kohya, native = tmp_path / "kohya.safetensors", tmp_path / "native.safetensors"
    works(capsys, "convert", adapter, kohya, "--to", "kohya")
    works(capsys, "convert", kohya, native, "--to", "native", "--base", base)
    error = fails(capsys, "convert", native, tmp_path / "folder", "--to", "peft")
    assert "no checkpoint says how a convolution is grouped" in error


def test_what_is_written_into_the_files_own_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, base = written(linears(), tmp_path)
    works(capsys, "convert", tmp_path / "adapter.safetensors", tmp_path / "peft", "--to", "peft")
    monkeypatch.chdir(tmp_path / "peft")
    works(capsys, "convert", ".", "../out.safetensors", "--to", "native", "--base", str(base))


@pytest.mark.parametrize("target", ["0", "1"])
def test_a_parametrized_module_is_no_obstacle(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = nn.Sequential(nn.Linear(6, 5), parametrizations.weight_norm(nn.Linear(5, 4)))
    register_lora(model, rank=2, target=target)
    save_lora(model, tmp_path / "ours")
    works(capsys, "convert", tmp_path / "ours", tmp_path / "kohya", "--to", "kohya")
    works(capsys, "convert", tmp_path / "ours", tmp_path / "peft", "--to", "peft")


class Packed(nn.Module):
    """Attention with a Parameter called as torch's own is, and computed by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.randn(24, 8))
        self.out_proj = nn.Linear(8, 8)


def test_anothers_attention_is_not_taken_for_torchs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = nn.Sequential(Packed())
    register_lora(model, rank=2, target="out_proj")
    save_lora(model, tmp_path / "ours")
    save_lora(model, tmp_path / "saved", format="peft")
    works(capsys, "convert", tmp_path / "ours", tmp_path / "there", "--to", "peft")
    file = "adapter_model.safetensors"
    assert (tmp_path / "there" / file).read_bytes() == (tmp_path / "saved" / file).read_bytes()
