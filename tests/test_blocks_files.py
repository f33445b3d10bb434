"""Blocks of rows in the files of libraries that have none: one pair, exact, of added rank."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from lora_param import FileError, load_lora, lora_parameters, register_lora, save_lora

from .cases import shake
from .peft_cases import Experts, chain, floats, gpt2, output, quiet

MODELS: dict[str, tuple[Callable[[], nn.Module], list[Any], Callable[[], Any]]] = {
    "linear": (chain(nn.Linear(6, 9)), ["0[:3]", "0[6:]"], floats(4, 6)),
    "heads": (chain(nn.Linear(6, 9)), ["0[::3]", "0[1::3]"], floats(4, 6)),
    "gpt2's q and v": (gpt2, ["*.c_attn[0:8]", "*.c_attn[16:24]"], lambda: torch.randint(0, 17, (2, 5))),
    "convolution": (chain(nn.Conv2d(4, 6, 3)), ["0[:2]", "0[3:5]"], floats(2, 4, 5, 5)),
    "tokens": (chain(nn.Embedding(7, 5)), [("0", [1, 4]), "0[2:4]"], lambda: torch.arange(7)),
    "stack": (chain(Experts()), ["0.up[:2]", "0.up[5:]"], floats(2, 4)),
}  # fmt: skip
each_model = pytest.mark.parametrize(("make", "target", "make_input"), MODELS.values(), ids=MODELS)


def with_blocks(make: Callable[[], nn.Module], target: list[Any]) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    base = make().eval()
    model = copy.deepcopy(base)
    register_lora(model, target=target[:1], rank=2, alpha=3.0)
    register_lora(model, target=target[1:], rank=1, alpha=5.0)
    shake(model)
    return base, model


@each_model
def test_blocks_give_the_same_outputs_in_peft(
    make: Any, target: Any, make_input: Any, tmp_path: Path
) -> None:
    base, model = with_blocks(make, target)
    x = make_input()
    expected, before = output(model, x), output(base, x)
    with pytest.warns(UserWarning, match="peft has no blocks of rows: those of .* one pair each"):
        save_lora(model, tmp_path, format="peft")
    twin = copy.deepcopy(base)
    with quiet():
        theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        load_lora(twin, tmp_path)
    torch.testing.assert_close(output(theirs, x), expected)
    torch.testing.assert_close(output(twin, x), expected)
    assert not torch.allclose(expected, before, atol=1e-3)


@pytest.mark.parametrize("name", ["linear", "heads", "convolution"])
def test_blocks_come_back_from_kohyas_files(name: str, tmp_path: Path) -> None:
    make, target, make_input = MODELS[name]
    base, model = with_blocks(make, target)
    path, x = tmp_path / "lora.safetensors", make_input()
    with pytest.warns(UserWarning, match="kohya has no blocks of rows"):
        save_lora(model, path, format="kohya")
    assert load_file(path)["lycoris_0.alpha"] == 3
    load_lora(base, path)
    torch.testing.assert_close(base(x), model(x))


def test_the_warning_says_the_size(tmp_path: Path) -> None:
    _, model = with_blocks(*MODELS["linear"][:2])
    kept = sum(each.numel() for each in lora_parameters(model))
    assert kept == 2 * (6 + 3) + 1 * (6 + 3)
    with pytest.warns(UserWarning, match=rf"with {3 * (6 + 9)} numbers for {kept};"):
        save_lora(model, tmp_path, format="peft")


@pytest.mark.parametrize("format", ["peft", "kohya"])
def test_a_block_that_can_be_no_pair_is_refused(format: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3))
    register_lora(model, target="0[:2]", rank=1)
    shake(model)
    with pytest.raises(FileError, match=f"the format {format} has no place for a block of rows"):
        save_lora(model, tmp_path / "out", format=format)


@pytest.mark.parametrize("format", ["peft", "kohya"])
def test_blocks_whose_dropouts_differ_are_written_with_a_warning(
    tmp_path: Path, format: str
) -> None:
    model = chain(nn.Linear(6, 9))()
    register_lora(model, target="0[:3]", rank=2, dropout=0.25)
    register_lora(model, target="0[6:]", rank=1)
    shake(model)
    added = pytest.warns(UserWarning, match="has no blocks of rows")
    with added, pytest.warns(UserWarning, match=r"0\.weight: its blocks differ in dropout"):
        save_lora(
            model, tmp_path / ("folder" if format == "peft" else "x.safetensors"), format=format
        )
