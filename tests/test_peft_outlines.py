"""PEFT's files without the model: an outline of it, or nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lora_param import FileError, load_lora
from lora_param.formats import About, peft
from lora_param.formats.skeleton import described, skeleton

from .peft_cases import (
    CASES,
    Case,
    edit_config,
    trained_in_peft,
)

OUTLINED = [
    each
    for each in CASES
    if each.id
    in ("linear", "conv2d", "attention", "embedding", "GPT-2", "Llama", "transposed experts")
]


@pytest.mark.parametrize("case", OUTLINED, ids=lambda case: case.id)
def test_an_outline_gets_the_same_pairs_as_the_model(case: Case, tmp_path: Path) -> None:
    base, _ = trained_in_peft(case, tmp_path)
    facts = {f"{path}.weight": described(each) for path, each in base.named_modules()}
    outline = skeleton(dict(base.named_parameters()), facts)
    for ours, theirs in zip(
        peft.read(tmp_path, outline, mha_out_proj="once"),
        peft.read(tmp_path, base, mha_out_proj="once"),
        strict=True,
    ):
        assert (ours.weight, ours.alpha) == (theirs.weight, theirs.alpha)
        assert torch.equal(ours.lora_A, theirs.lora_A)
        assert torch.equal(ours.lora_B, theirs.lora_B)


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
    [plain] = peft.read(tmp_path, base)
    edit_config(tmp_path, peft_version=version)
    base[0].is_transposed = is_transposed
    [pair] = peft.read(tmp_path, base)
    update, expected = pair.lora_B @ pair.lora_A, plain.lora_B @ plain.lora_A
    torch.testing.assert_close(update.mT if turned[is_transposed] else update, expected)


def test_a_square_stack_of_unknown_origin_is_refused(tmp_path: Path) -> None:
    base, _ = trained_in_peft(SQUARE, tmp_path)
    outline = skeleton({name: tuple(each.shape) for name, each in base.named_parameters()}, {})
    with pytest.raises(FileError, match=r"0\.up: which side of a square matrix is which"):
        peft.read(tmp_path, outline)
    edit_config(tmp_path, peft_version=None)
    with pytest.raises(FileError, match=r"0\.up: which side of a square matrix is which"):
        load_lora(base, tmp_path)


def test_a_stack_of_an_outline_is_not_written(tmp_path: Path) -> None:
    base, _ = trained_in_peft(SQUARE, tmp_path)
    outline = skeleton({name: tuple(each.shape) for name, each in base.named_parameters()}, {})
    with pytest.raises(FileError, match=r"0\.up: PEFT's layout of a stack depends on the module"):
        peft.write(tmp_path / "out", peft.read(tmp_path, base), outline, About())


PLAIN = [each for each in CASES if not (each.parameters and "rank_pattern" in each.options)]


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.id)
def test_without_a_model_the_updates_have_the_same_norms(case: Case, tmp_path: Path) -> None:
    base, _ = trained_in_peft(case, tmp_path)

    def norms(model: nn.Module | None) -> list[float]:
        return sorted(
            float((pair.lora_B @ pair.lora_A).norm() * pair.alpha / pair.rank)
            for pair in peft.read(tmp_path, model, mha_out_proj="once")
        )

    assert norms(None) == pytest.approx(norms(base), rel=1e-5)


def test_without_a_model_a_target_parameters_rank_cannot_be_said(tmp_path: Path) -> None:
    trained_in_peft(next(each for each in CASES if each.id == "three of one module"), tmp_path)
    with pytest.raises(FileError, match="which rank a target parameter has can't be said"):
        peft.read(tmp_path, None)
