"""What a file is to the library: opened once, any kind of delta, any rows, and no core's concern."""

from __future__ import annotations

import ast
import copy
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lora_param
from lora_param import (
    FileError,
    base_state_dict,
    load_lora,
    lora_parameters,
    register_lora,
    save_lora,
)
from lora_param.checks import walk
from lora_param.deltas import KINDS, Delta
from lora_param.errors import StateDictError
from lora_param.io import convert_file, file_summary, merge_checkpoint
from lora_param.io.outline import facts_of, outline_of_tensors
from lora_param.register import install
from lora_param.weight import Weight

from .cases import shake
from .file_cases import header_of, plain

opened: list[str] | None = None


def listen(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and opened is not None and isinstance(arguments[0], (str, Path)):
        opened.append(Path(arguments[0]).name)


sys.addaudithook(listen)


def count(call: Callable[[], Any]) -> Counter[str]:
    global opened
    opened = []
    call()
    names, opened = opened, None
    return Counter(names)


def adapted() -> nn.Sequential:
    model = nn.Sequential(plain())
    register_lora(model, rank=2, target=["0.0", "0.2"])
    shake(model)
    return model


def native(folder: Path) -> tuple[Path, dict[str, Any], set[str]]:
    save_lora(adapted(), folder / "ours.safetensors")
    return folder / "ours.safetensors", {}, {"ours.safetensors"}


def kohya(folder: Path) -> tuple[Path, dict[str, Any], set[str]]:
    save_lora(adapted(), folder / "kohya.safetensors", format="kohya")
    return folder / "kohya.safetensors", {}, {"kohya.safetensors"}


def peft(folder: Path) -> tuple[Path, dict[str, Any], set[str]]:
    save_lora(adapted(), folder, format="peft")
    return folder, {}, {"adapter_config.json", "adapter_model.safetensors"}


def peft_pickle(folder: Path) -> tuple[Path, dict[str, Any], set[str]]:
    save_lora(adapted(), folder, format="peft")
    tensors = load_file(folder / "adapter_model.safetensors")
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    return folder, {}, {"adapter_config.json", "adapter_model.bin"}


def diffusers(folder: Path) -> tuple[Path, dict[str, Any], set[str]]:
    tensors = {"0.0.lora_A.weight": torch.ones(2, 6), "0.0.lora_B.weight": torch.ones(5, 2)}
    metadata = {"lora_adapter_metadata": json.dumps({"r": 2})}
    save_file(tensors, folder / "diffusers.safetensors", metadata)
    return folder / "diffusers.safetensors", {}, {"diffusers.safetensors"}


def loralib(folder: Path) -> tuple[Path, dict[str, Any], set[str]]:
    torch.save({"0.0.lora_A": torch.ones(2, 6), "0.0.lora_B": torch.ones(5, 2)}, folder / "l.pt")
    return folder / "l.pt", {"alpha": 2}, {"l.pt"}


FORMATS = [native, kohya, peft, peft_pickle, diffusers, loralib]


@pytest.mark.parametrize("make", FORMATS)
@pytest.mark.parametrize("by", ["load", "summary"])
def test_every_file_is_opened_once(make: Callable[[Path], Any], by: str, tmp_path: Path) -> None:
    path, options, names = make(tmp_path)
    model = nn.Sequential(plain())
    calls = {
        "load": lambda: load_lora(model, path, **options),
        "summary": lambda: file_summary(path, **options),
    }
    found = count(calls[by])
    assert {name: found[name] for name in names} == dict.fromkeys(names, 1)


def test_merging_opens_adapter_and_base_once(tmp_path: Path) -> None:
    path, _, _ = native(tmp_path)
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    save_file(base_state_dict(adapted()), base)
    found = count(lambda: merge_checkpoint(path, base, out, any_base=True))
    assert (found["ours.safetensors"], found["base.safetensors"]) == (1, 1)


@pytest.mark.parametrize("format", ["native", "peft"])
def test_a_dropout_comes_back(format: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    fresh = copy.deepcopy(model)
    register_lora(model, rank=2, dropout=0.25)
    save_lora(model, tmp_path / "adapter", format=format)
    load_lora(fresh, tmp_path / "adapter")
    assert [layer.parametrizations.weight[0].dropout for layer in fresh] == [0.25, 0.25]


def test_a_format_without_dropout_says_so_and_leaves_the_models(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    register_lora(model, rank=2, dropout=0.25)
    with pytest.warns(UserWarning, match=r"Kohya's files hold no dropout: 0\.weight"):
        save_lora(model, tmp_path / "kohya", format="kohya")
    load_lora(model, tmp_path / "kohya")
    assert model[0].parametrizations.weight[0].dropout == 0.25


def test_several_dropouts_are_no_config_of_pefts(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    register_lora(model, rank=2, dropout=0.25)
    model[1].parametrizations.weight[0].dropout = 0.0
    with pytest.warns(UserWarning, match=r"one dropout for all; the file holds none: 0\.weight"):
        save_lora(model, tmp_path, format="peft")


def test_a_dropout_where_none_can_act_is_refused(tmp_path: Path) -> None:
    model, fresh = nn.Sequential(nn.Linear(6, 5)), nn.Sequential(nn.Bilinear(2, 3, 5))
    register_lora(model, rank=2, dropout=0.25)
    save_lora(model, tmp_path / "adapter")
    with pytest.raises(lora_param.TargetError, match="dropout needs a layer"):
        load_lora(fresh, tmp_path / "adapter", base="ignore")
    assert type(fresh[0]) is nn.Bilinear


class Shift(Delta):
    """Adds a tensor, times a number: a kind that has no rank."""

    kind = "shift"

    def __init__(self, shift: Tensor, times: float) -> None:
        super().__init__("default", shift.dtype)
        self.shift, self.times = nn.Parameter(shift.detach()), times

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> Shift:
        return cls(tensors["shift"], numbers["times"])

    @property
    def numbers(self) -> dict[str, Any]:
        return {"times": self.times}

    @numbers.setter
    def numbers(self, numbers: Mapping[str, Any]) -> None:
        if type(numbers["times"]) is not float:
            raise StateDictError("times must be a float")
        self.times = numbers["times"]

    def misfit(self, shape: tuple[int, ...], view: tuple[int, ...]) -> str | None:
        own = tuple(self.shift.shape)
        return None if own == tuple(shape) else f"its shift is {own}, should be {shape}"

    def value(self, weight: Tensor) -> Tensor:
        return weight + self.shift * self.times

    def block(self, start: int, stop: int) -> Shift:
        return Shift(self.shift[start:stop], self.times)

    def singular_values(self, shape: tuple[int, ...]) -> Tensor:
        return torch.linalg.svdvals(self.shift.detach().double() * self.times)


def shifted(monkeypatch: pytest.MonkeyPatch) -> nn.Sequential:
    monkeypatch.setitem(KINDS, "shift", Shift)
    model = plain()
    pair = Weight("0", model[0], "weight"), Shift(torch.randn(5, 6), 2.0)
    install(walk(model, "a test"), [pair], "default", True)
    return model


def test_another_kind_of_delta_comes_back_and_merges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, fresh, path = shifted(monkeypatch), plain(), tmp_path / "shift.safetensors"
    save_lora(model, path)
    assert load_lora(fresh, path, base="require") == ["0.weight"]
    assert torch.equal(fresh[0].weight, model[0].weight)
    load_lora(fresh, path)
    [weight] = file_summary(path).weights
    assert (weight.kind, weight.rank, weight.shape, weight.parameters) == (
        "shift",
        None,
        (5, 6),
        30,
    )
    save_file(base_state_dict(model), tmp_path / "base.safetensors")
    assert merge_checkpoint(path, tmp_path / "base.safetensors", tmp_path / "out") == (1, 4)
    assert torch.equal(load_file(tmp_path / "out")["0.weight"], model[0].weight)
    for format in ("peft", "kohya"):
        with pytest.raises(FileError, match=r"0\.weight: the format .* has no place for a shift"):
            convert_file(path, tmp_path / "converted", format)


BLOCKS = {
    "neighbours": (lambda: nn.Linear(6, 9), "0:3", "6:9"),
    "heads": (lambda: nn.Linear(6, 9), "0:9:3+2", "2:9:3"),
    "of the second dimension": (lambda: Conv1D(9, 6), "0:9:3+2", "2:9:3"),
    "kernels": (lambda: nn.Conv2d(4, 9, 3), "0:9:2", "1:2"),
}


@pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("size", [1, 100, 2**22])
def test_blocks_of_rows_come_back_and_merge(
    size: int, blocks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_param.io.checkpoint.BLOCK", size)
    make, *rows = blocks
    model, fresh, path = nn.Sequential(make()), nn.Sequential(make()), tmp_path / "a.safetensors"
    names = [f"0.weight[{each}]" for each in rows]
    assert register_lora(model, rank=2, target=names) == names
    for factor in lora_parameters(model):
        nn.init.normal_(factor)
    save_lora(model, path)
    assert f"{names[1]}.lora_A" in header_of(path).entries
    fresh.load_state_dict(base_state_dict(model))
    save_file(fresh.state_dict(), tmp_path / "base.safetensors")
    assert load_lora(fresh, path, base="require") == names
    assert torch.equal(fresh[0].weight, model[0].weight)
    load_lora(fresh, path)
    assert [each.weight for each in file_summary(path).weights] == names
    assert merge_checkpoint(path, tmp_path / "base.safetensors", tmp_path / "out") == (1, 2)
    torch.testing.assert_close(load_file(tmp_path / "out")["0.weight"], model[0].weight.detach())


def test_the_core_imports_nothing_of_io() -> None:
    root = Path(lora_param.__file__).parent
    for file in (*root.glob("*.py"), *(root / "deltas").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and file.stem not in ("__init__", "__main__"):
                assert (node.module or "").split(".")[0] != "io" or not node.level, file


def test_facts_of_a_wrong_type_are_not_taken() -> None:
    facts = {"0": {"type": [], "groups": "1", "dilation": 3, "forward": 1}}
    outline = outline_of_tensors({"0.weight": (4, 4)}, facts)
    assert facts_of(outline.modules["0"]) == {}
    assert isinstance(outline.modules["0"], nn.Linear)
