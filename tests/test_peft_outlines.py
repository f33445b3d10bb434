"""PEFT's files without the model: an outline of it, or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_param import FileError, load_lora
from lora_param.checks import walk
from lora_param.deltas import LoRAParametrization
from lora_param.io.formats import open_adapter, write_adapter
from lora_param.io.outline import UNKNOWN, Outline, facts_of, outline_of_tensors
from lora_param.io.tensors import About

from .peft_cases import (
    CASES,
    Case,
    edit_config,
    trained_in_peft,
)


def parsed(
    folder: Path, weights: Outline | nn.Module, **options: Any
) -> dict[str, LoRAParametrization]:
    if isinstance(weights, nn.Module):
        weights = Outline(walk(weights, "a test"), live=True)
    with open_adapter(folder) as file:
        return file.parse(weights, **options)


OUTLINED = [
    each
    for each in CASES
    if each.id
    in ("linear", "conv2d", "attention", "embedding", "GPT-2", "Llama", "transposed experts")
]


@pytest.mark.parametrize("case", OUTLINED, ids=lambda case: case.id)
def test_an_outline_gets_the_same_pairs_as_the_model(case: Case, tmp_path: Path) -> None:
    base, _ = trained_in_peft(case, tmp_path)
    modules = Outline(walk(base, "a test"), live=True).modules
    facts = {path: facts_of(module) for path, module in modules.items()}
    ours = parsed(
        tmp_path, outline_of_tensors(dict(base.named_parameters()), facts), mha_out_proj="once"
    )
    theirs = parsed(tmp_path, base, mha_out_proj="once")
    assert ours.keys() == theirs.keys()
    for name, delta in ours.items():
        assert delta.numbers == theirs[name].numbers
        assert torch.equal(delta.lora_A, theirs[name].lora_A)
        assert torch.equal(delta.lora_B, theirs[name].lora_B)


SQUARE = next(each for each in CASES if each.id == "square experts")


@pytest.mark.parametrize(
    ("version", "turned"),
    [("0.18.1", (True, True)), ("0.19.0", (True, False)), ("0.19.1", (False, True))],
)
@pytest.mark.parametrize("is_transposed", [False, True])
def test_a_square_stack_lies_as_it_did_in_the_release_that_wrote_it(
    is_transposed: bool, version: str, turned: tuple[bool, bool], tmp_path: Path
) -> None:
    base, _ = trained_in_peft(SQUARE, tmp_path)
    [plain] = parsed(tmp_path, base).values()
    edit_config(tmp_path, peft_version=version)
    base[0].is_transposed = is_transposed
    [delta] = parsed(tmp_path, base).values()
    update, expected = delta.lora_B @ delta.lora_A, plain.lora_B @ plain.lora_A
    torch.testing.assert_close(update.mT if turned[is_transposed] else update, expected)


def test_a_square_stack_of_unknown_origin_is_refused(tmp_path: Path) -> None:
    base, _ = trained_in_peft(SQUARE, tmp_path)
    shapes = {name: tuple(each.shape) for name, each in base.named_parameters()}
    outline = outline_of_tensors(shapes, {})
    with pytest.raises(FileError, match=r"0\.up: which side of a square matrix is which"):
        parsed(tmp_path, outline)
    edit_config(tmp_path, peft_version=None)
    with pytest.raises(FileError, match=r"0\.up: which side of a square matrix is which"):
        load_lora(base, tmp_path)


def test_a_stack_of_an_outline_is_not_written(tmp_path: Path) -> None:
    base, _ = trained_in_peft(SQUARE, tmp_path)
    shapes = {name: tuple(each.shape) for name, each in base.named_parameters()}
    outline = outline_of_tensors(shapes, {})
    deltas = {outline.weights[name]: each for name, each in parsed(tmp_path, base).items()}
    with pytest.raises(FileError, match=r"0\.up: PEFT's layout of a stack depends on the module"):
        write_adapter("peft", tmp_path / "out", deltas, outline, About())


PLAIN = [each for each in CASES if not (each.parameters and "rank_pattern" in each.options)]


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.id)
def test_without_a_model_the_updates_have_the_same_norms(case: Case, tmp_path: Path) -> None:
    base, _ = trained_in_peft(case, tmp_path)

    def norms(weights: Outline | nn.Module) -> list[float]:
        return sorted(
            (delta.lora_B @ delta.lora_A).norm().item() * delta.scale
            for delta in parsed(tmp_path, weights, mha_out_proj="once").values()
        )

    assert norms(UNKNOWN) == pytest.approx(norms(base), rel=1e-5)


def test_without_a_model_a_target_parameters_rank_cannot_be_said(tmp_path: Path) -> None:
    trained_in_peft(next(each for each in CASES if each.id == "three of one module"), tmp_path)
    with pytest.raises(FileError, match="which rank a target parameter has can't be said"):
        parsed(tmp_path, UNKNOWN)
