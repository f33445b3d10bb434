"""The table of formats: each file is recognised by one row, and damage is refused by it."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from lora_param import (
    FileError,
    LoRAError,
    LoRAParametrization,
    load_lora,
    lora_summary,
    register_lora,
    save_lora,
)
from lora_param.io.formats import FORMATS
from lora_param.io.tensors import open_file

from .cases import shake


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Conv2d(5, 4, 3))


def adapted() -> nn.Sequential:
    model = plain()
    register_lora(model, rank=2, alpha=3)
    shake(model)
    return model


def native(folder: Path) -> Path:
    save_lora(adapted(), folder / "adapter.safetensors")
    return folder / "adapter.safetensors"


def peft(folder: Path) -> Path:
    save_lora(adapted(), folder / "adapter", format="peft")
    return folder / "adapter"


def peft_file(folder: Path) -> Path:
    return peft(folder) / "adapter_model.safetensors"


def peft_pickle(folder: Path) -> Path:
    path = peft(folder) / "adapter_model.bin"
    torch.save({}, path)
    return path


def kohya(folder: Path) -> Path:
    save_lora(adapted(), folder / "lora.safetensors", format="kohya")
    return folder / "lora.safetensors"


def tensors(*names: str, **metadata: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        content = {name: torch.ones(5, 2) if "B" in name else torch.ones(2, 6) for name in names}
        save_file(content, folder / "file.safetensors", metadata)
        return folder / "file.safetensors"

    return write


def loralib(folder: Path) -> Path:
    torch.save({"0.lora_A": torch.ones(2, 6), "0.lora_B": torch.ones(5, 2)}, folder / "lora.pt")
    return folder / "lora.pt"


def content(name: str, data: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return write


def wrapped(folder: Path) -> Path:
    """Save our own file of a model whose names begin as PEFT's keys do."""
    model = nn.ModuleDict({"base_model": nn.ModuleDict({"model": adapted()})})
    save_lora(model, folder / "adapter.safetensors")
    return folder / "adapter.safetensors"


FILES: list[tuple[str, Callable[[Path], Path], str | None]] = [
    ("our own", native, "native"),
    ("our own, of a model with PEFT's names", wrapped, "native"),
    ("PEFT's folder", peft, "peft"),
    ("PEFT's file", peft_file, "peft"),
    ("PEFT's pickle", peft_pickle, "peft"),
    ("Kohya's", kohya, "kohya"),
    ("LoHa", tensors("lora_unet_a.hada_w1_a", "lora_unet_a.alpha"), "kohya"),
    ("diffusers'", tensors("unet.0.lora_A.weight", "unet.0.lora_B.weight", format="pt"), "diffusers"),
    ("diffusers', old", tensors("unet.a.processor.to_q_lora.down.weight"), "diffusers"),
    ("loralib's", loralib, "loralib"),
    ("two formats in one", tensors("a.lora_down.weight", "b.lora_A.weight"), None),
    ("a checkpoint", tensors("0.weight", "0.bias"), None),
    ("no tensors", tensors(), None),
    ("a pickle renamed", content("a.safetensors", b"\x80\x02}q\x00."), None),
    ("text", content("a.txt", b"text"), None),
    ("nothing", lambda folder: folder / "nothing.safetensors", None),
    ("an empty folder", lambda folder: folder, None),
]  # fmt: skip


@pytest.mark.parametrize(("write", "name"), [f[1:] for f in FILES], ids=[f[0] for f in FILES])
def test_a_file_is_recognised_by_one_row_or_refused(
    write: Callable[[Path], Path], name: str | None, tmp_path: Path
) -> None:
    path = write(tmp_path)
    if name is None:
        with pytest.raises(FileError, match=path.name):
            load_lora(plain(), path)
        return
    with open_file(path) as file:
        assert [row.name for row in FORMATS if row.module.recognises(file)] == [name]


def test_formats_turn_into_each_other_without_loss(tmp_path: Path) -> None:
    model = adapted()
    for index, format in enumerate(["peft", "kohya", "native", "kohya", "peft", "native"]):
        path = tmp_path / f"{index}{'' if format == 'peft' else '.safetensors'}"
        save_lora(model, path, format=format)
        model = plain()
        load_lora(model, path)
    for ours, first in zip(model, adapted(), strict=True):
        assert torch.equal(ours.weight, first.weight)


NAMES = [("native", "a.pt"), ("kohya", "a.ckpt"), ("peft", "a.safetensors"), ("peft", "a.bin")]


@pytest.mark.parametrize(("format", "name"), NAMES)
def test_a_name_that_denies_what_is_written_is_refused(
    format: str, name: str, tmp_path: Path
) -> None:
    what = "a folder" if format == "peft" else "a safetensors file"
    with pytest.raises(FileError, match=rf"{what} is written, which \.\w+ denies; "):
        save_lora(adapted(), tmp_path / name, format=format)
    assert list(tmp_path.iterdir()) == []


DAMAGED: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "adapter_model.safetensors": (peft, {}),
    "adapter_config.json": (peft, {}),
    "lora.safetensors": (kohya, {}),
    "file.safetensors": (FILES[7][1], {}),
    "lora.pt": (loralib, {"alpha": 3}),
}


@pytest.mark.parametrize("name", DAMAGED)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damage_is_refused_or_harmless(name: str, data: st.DataObject) -> None:
    write, options = DAMAGED[name]
    folder = Path(tempfile.mkdtemp())
    try:
        path = write(folder)
        victim = path / name if path.is_dir() else path
        raw = bytearray(victim.read_bytes())
        head = min(len(raw), 900)
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, head - 1))
            raw[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
        victim.write_bytes(raw)
        model = plain()
        names = [name for name, _ in model.named_parameters()]
        with contextlib.suppress(LoRAError):
            load_lora(model, path, **options)
            assert all(
                len(weight.adapters) == 1
                for weight in lora_summary(model).weights
                if weight.adapters
            )
            return
        assert [name for name, _ in model.named_parameters()] == names
    finally:
        shutil.rmtree(folder)


def test_a_lowered_rank_leaves_an_update_that_is_rounded_once() -> None:
    A, B = torch.randn(40, 30), torch.randn(20, 40)
    numbers = {"rank": 40, "alpha": 40.0, "dropout": 0.0}
    delta = LoRAParametrization.restore({"lora_A": A, "lora_B": B}, numbers).lowered(20)
    assert torch.equal(delta.lora_B @ delta.lora_A, (B.double() @ A.double()).float())
