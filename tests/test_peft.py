"""Adapters of the real PEFT, both ways."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_param import (
    FileError,
    load_lora,
    lora_parameters,
    lora_state_dict,
    lora_summary,
    register_lora,
    remove_lora,
    save_lora,
)
from lora_param.io.formats.peft_config import numbers_of

from .cases import shake
from .peft_cases import (
    CASES,
    LINEAR,
    PREFIX,
    Attention,
    Case,
    config_of,
    edit_tensors,
    floats,
    output,
    quiet,
    trained_in_peft,
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_what_peft_trained_gives_the_same_outputs_here(case: Case, tmp_path: Path) -> None:
    base, theirs = trained_in_peft(case, tmp_path)
    x = case.make_input()
    before = output(base, x)
    with quiet():
        load_lora(base, tmp_path)
    torch.testing.assert_close(output(base, x), output(theirs, x))
    assert not torch.allclose(output(base, x), before, atol=1e-3)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_what_is_trained_here_gives_the_same_outputs_in_peft(case: Case, tmp_path: Path) -> None:
    base = case.base()
    model = copy.deepcopy(base)
    register_lora(model, target=[*case.target, *case.parameters], rank=2, alpha=3)
    shake(model)
    x = case.make_input()
    with quiet():
        save_lora(model, tmp_path / "out", format="peft")
        theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out").eval()
    torch.testing.assert_close(output(theirs, x), output(model, x))
    assert not torch.allclose(output(base, x), output(model, x), atol=1e-3)
    fresh = copy.deepcopy(base)
    with quiet():
        load_lora(fresh, tmp_path / "out")
    torch.testing.assert_close(output(fresh, x), output(model, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_factors_keep_their_dtype_both_ways(dtype: torch.dtype, tmp_path: Path) -> None:
    base = LINEAR.base()
    model = copy.deepcopy(base).to(dtype)
    register_lora(model, rank=2)
    shake(model)
    save_lora(model, tmp_path, format="peft")
    assert {each.dtype for each in load_file(tmp_path / "adapter_model.safetensors").values()} == {
        dtype
    }
    load_lora(base, tmp_path)
    pairs = zip(lora_parameters(base), lora_parameters(model), strict=True)
    assert all(a.dtype == dtype and torch.equal(a, b) for a, b in pairs)


def test_ranks_and_alphas_come_from_the_config_as_peft_reads_it(tmp_path: Path) -> None:
    base, _ = trained_in_peft(CASES[1], tmp_path)
    load_lora(base, tmp_path)
    adapters = [weight.adapters[0] for weight in lora_summary(base).weights]
    assert [(each.rank, each.alpha) for each in adapters] == [(1, 3), (3, 3), (1, 0.5)]


def test_an_adapter_of_many_ranks_and_alphas_comes_back(tmp_path: Path) -> None:
    base = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)))
    model = copy.deepcopy(base)
    ranks, alphas = {"0": 1, "1": 2, "*": 3}, {"2": 0.5, "3": -7.25, "*": 3.0}
    register_lora(model, rank=ranks, alpha=alphas)
    shake(model)
    save_lora(model, tmp_path, format="peft")
    with quiet():
        theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    x = torch.randn(3, 6)
    torch.testing.assert_close(output(theirs, x), output(model, x))


def test_only_the_named_modules_are_adapted_where_names_end_alike(tmp_path: Path) -> None:
    base = nn.ModuleDict({"fc": nn.Linear(4, 4), "block": nn.ModuleDict({"fc": nn.Linear(4, 4)})})
    model = copy.deepcopy(base)
    register_lora(model, rank=2, exclude="block.fc")
    save_lora(model, tmp_path, format="peft")
    with quiet():
        theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    adapted = [name for name, _ in theirs.named_modules() if name.endswith("lora_A")]
    assert adapted == ["base_model.model.fc.lora_A"]


def test_a_rank_and_an_alpha_are_of_one_name_where_names_end_alike(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    model = copy.deepcopy(base)
    register_lora(model, rank={"1.*": 2, "*": 1}, alpha={"1.*": 4, "*": 3})
    shake(model)
    save_lora(model, tmp_path, format="peft")
    with quiet():
        theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    x = torch.randn(3, 4)
    torch.testing.assert_close(output(theirs, x), output(model, x))


def test_a_safetensors_file_finds_the_config_beside_it(tmp_path: Path) -> None:
    base, theirs = trained_in_peft(LINEAR, tmp_path)
    load_lora(base, tmp_path)
    x = LINEAR.make_input()
    torch.testing.assert_close(output(base, x), output(theirs, x))


def test_an_old_pickle_of_tensors_is_read(tmp_path: Path) -> None:
    base, theirs = trained_in_peft(LINEAR, tmp_path)
    safe = tmp_path / "adapter_model.safetensors"
    torch.save(load_file(safe), tmp_path / "adapter_model.bin")
    safe.unlink()
    load_lora(base, tmp_path)
    x = LINEAR.make_input()
    torch.testing.assert_close(output(base, x), output(theirs, x))


class Trap:
    """What a hostile pickle runs."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("trapped"),)


def test_a_pickle_that_runs_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base, _ = trained_in_peft(LINEAR, tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save({"a": Trap()}, tmp_path / "adapter_model.bin")
    with pytest.raises(FileError, match="no state dict that can be read safely"):
        load_lora(base, tmp_path)
    assert not Path("trapped").exists()


def attention_in_peft(folder: Path) -> tuple[nn.Module, PeftModel, Tensor]:
    case = next(each for each in CASES if each.id == "attention")
    return *trained_in_peft(case, folder), case.make_input()


def test_loading_attention_warns_that_out_proj_acts_twice(tmp_path: Path) -> None:
    base, theirs, x = attention_in_peft(tmp_path)
    with pytest.warns(
        UserWarning, match=r"attention\.out_proj\.weight twice, and so does what was read"
    ):
        load_lora(base, tmp_path)
    torch.testing.assert_close(output(base, x), output(theirs, x))


def test_out_proj_can_act_twice_or_once_as_asked(tmp_path: Path) -> None:
    base, _, _ = attention_in_peft(tmp_path)
    factors = {}
    for choice in ("twice", "once"):
        load_lora(base, tmp_path, mha_out_proj=choice)
        factors[choice] = {name: each.clone() for name, each in lora_state_dict(base).items()}
        remove_lora(base)
    for name, once in factors["once"].items():
        twice = name == "attention.out_proj.weight.default.lora_B"
        assert torch.equal(factors["twice"][name], once * 2 if twice else once)


def test_an_unknown_choice_for_out_proj_is_refused(tmp_path: Path) -> None:
    base, _, _ = attention_in_peft(tmp_path)
    with pytest.raises(FileError, match='must be "twice", "once" or None, got 2'):
        load_lora(base, tmp_path, mha_out_proj=2)


PARTS = [
    ("in_proj alone", {"target": "attention.in_proj_weight", "rank": 2}),
    ("out_proj alone", {"target": "attention.out_proj", "rank": 2}),
]


@pytest.mark.parametrize("options", [each[1] for each in PARTS], ids=[each[0] for each in PARTS])
def test_parts_of_an_attention_give_the_same_outputs_in_peft(
    options: dict[str, Any], tmp_path: Path
) -> None:
    base = Attention().eval()
    model = copy.deepcopy(base)
    register_lora(model, **options)
    shake(model)
    with pytest.warns(UserWarning, match="out_proj.weight twice, and the file holds half of it"):
        save_lora(model, tmp_path, format="peft")
    with quiet():
        theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    x = torch.randn(5, 2, 8)
    torch.testing.assert_close(output(theirs, x), output(model, x))


@pytest.mark.parametrize("option", ["rank", "alpha"])
def test_parts_of_an_attention_that_differ_are_refused(option: str, tmp_path: Path) -> None:
    model = Attention()
    register_lora(model, target="attention", **{option: {"*in_proj_weight": 3, "*": 1}})
    with pytest.raises(FileError, match="attention: PEFT has one rank and one alpha for both"):
        save_lora(model, tmp_path / "out", format="peft")


def test_attention_from_peft_goes_back_to_the_bit(tmp_path: Path) -> None:
    base, _, _ = attention_in_peft(tmp_path)
    load_lora(base, tmp_path, mha_out_proj="twice")
    with quiet():
        save_lora(base, tmp_path / "out", format="peft")
    first, second = (
        load_file(each / "adapter_model.safetensors") for each in (tmp_path, tmp_path / "out")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_an_out_proj_that_peft_never_applied_is_refused(tmp_path: Path) -> None:
    case = Case("out_proj", Attention, floats(5, 2, 8), ["fc1", "out_proj"])
    base, _ = trained_in_peft(case, tmp_path)
    with pytest.raises(FileError, match=r"attention.out_proj.weight: PEFT never applies"):
        load_lora(base, tmp_path)


def test_an_out_proj_that_peft_left_at_zero_is_read(tmp_path: Path) -> None:
    case = Case("out_proj", Attention, floats(5, 2, 8), ["fc1", "out_proj"])
    base, _ = trained_in_peft(case, tmp_path)
    edit_tensors(tmp_path, lambda t: t[f"{PREFIX}attention.out_proj.lora_B.weight"].zero_())
    load_lora(base, tmp_path)


@pytest.mark.parametrize("pattern", ["1", "^1", "a.1", "1|0", "0|1", r"a\.\d", "b.*", "", "x"])
@pytest.mark.parametrize("key", ["1", "10", "a.1", "ba.1", "a.10", "a.11", "b.0", "a.b.1", "ab"])
def test_a_pattern_decides_where_peft_says(pattern: str, key: str) -> None:
    config = {"rank_pattern": {pattern: 3}, "alpha_pattern": {pattern: 5}}
    matched = get_pattern_key([pattern, ".*"], key) == pattern
    said = numbers_of(config, key)
    assert (said["rank"], said["alpha"]) == ((3, 5.0) if matched else (8, 8.0))


def test_what_a_config_leaves_out_is_pefts_default() -> None:
    theirs = LoraConfig()
    said = numbers_of({})
    assert (said["rank"], said["alpha"]) == (theirs.r, float(theirs.lora_alpha))


@pytest.mark.parametrize("layer", [Conv1D(5, 6), nn.Linear(6, 5)])
def test_the_config_says_which_way_the_weights_lie(layer: nn.Module, tmp_path: Path) -> None:
    model = nn.Sequential(layer)
    register_lora(model, rank=2)
    save_lora(model, tmp_path, format="peft")
    assert config_of(tmp_path)["fan_in_fan_out"] is isinstance(layer, Conv1D)
