"""What alpha is divided by: a number of a low-rank update, in its state and in every file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from lora_param import (
    LoRAError,
    LoRAParametrization,
    load_lora,
    load_lora_state_dict,
    lora_state_dict,
    lora_summary,
    register_lora,
    save_lora,
)
from lora_param.io import file_summary

from .cases import adapted, shake
from .peft_cases import CASES, config_of, output, quiet, trained_in_peft


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 8), nn.Linear(8, 9))


def scales(model: nn.Module) -> list[tuple[str, float, float]]:
    """List scaling, alpha and scale of each delta."""
    deltas = [each for each in model.modules() if isinstance(each, LoRAParametrization)]
    return [(each.scaling, each.alpha, each.scale) for each in deltas]


def test_rslora_divides_alpha_by_the_root_of_the_rank() -> None:
    lora = LoRAParametrization(8, 9, 4, 6.0, scaling="rslora")
    assert (lora.scale, lora.alpha) == (3.0, 6.0)
    lora.scale = 1.5
    assert lora.alpha == 3.0
    lora.scaling = "lora"
    assert lora.scale == 0.75


@pytest.mark.parametrize("scaling", ["rsLoRA", None, 1, ["lora"]])
def test_an_unknown_scaling_is_refused(scaling: Any) -> None:
    model = net()
    with pytest.raises(LoRAError, match=r"scaling must be one of \['lora', 'rslora'\], got"):
        register_lora(model, scaling=scaling)
    assert type(model[0]) is nn.Linear


def test_a_rank_that_is_lowered_keeps_the_scale_that_was_asked_for() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 4))
    register_lora(model, rank=16, alpha=8, scaling="rslora")
    assert scales(model) == [("rslora", 8.0, 2.0), ("rslora", 4.0, 2.0)]


def test_a_switch_of_scaling_acts_at_once_in_both_spaces() -> None:
    layer, x = adapted(nn.Linear(9, 8), rank=4).double(), torch.randn(3, 9).double()
    before = layer(x)
    layer.parametrizations.weight[0].scaling = "rslora"
    update = nn.functional.linear(x, layer.weight - layer.parametrizations.weight.original)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    torch.testing.assert_close(layer(x) - before, update / 2)  # 1 became 2


def test_state_and_our_file_keep_it(path: Path) -> None:
    source, model, fresh = (net() for _ in range(3))
    register_lora(source, rank=4, alpha=6, scaling="rslora")
    register_lora(model, rank=4)
    load_lora_state_dict(model, lora_state_dict(source))
    save_lora(source, path)
    load_lora(fresh, path)
    assert scales(source) == scales(model) == scales(fresh) == [("rslora", 6.0, 3.0)] * 2


def test_a_state_of_before_there_was_a_choice_is_a_plain_one() -> None:
    lora = LoRAParametrization(8, 9, 4, scaling="rslora")
    lora.numbers = {"rank": 4, "alpha": 6.0, "dropout": 0.0}
    assert (lora.scaling, lora.scale) == ("lora", 1.5)


def test_pefts_flag_comes_and_goes_with_the_alpha_that_was_given(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.id == "rslora")
    base, theirs = trained_in_peft(case, tmp_path)
    load_lora(base, tmp_path)
    assert [numbers[:2] for numbers in scales(base)] == [("rslora", 3.0)] * 2
    save_lora(base, tmp_path / "back", format="peft")
    config = config_of(tmp_path / "back")
    assert (config["use_rslora"], config["lora_alpha"], config["alpha_pattern"]) == (True, 3, {})
    x = case.make_input()
    again = PeftModel.from_pretrained(case.base(), tmp_path / "back").eval()
    torch.testing.assert_close(output(again, x), output(theirs, x))


def test_pefts_one_flag_is_off_where_scalings_are_mixed(tmp_path: Path) -> None:
    base, x = net().eval(), torch.randn(3, 9)
    model = copy.deepcopy(base)
    register_lora(model, target="0", rank=4, alpha=6, scaling="rslora")
    register_lora(model, target="1", rank=4, alpha=6)
    shake(model)
    save_lora(model, tmp_path, format="peft")
    assert not config_of(tmp_path)["use_rslora"]
    with quiet():
        theirs = PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(output(theirs, x), output(model, x))


def test_kohyas_alpha_is_made_one_that_is_divided_by_the_rank(path: Path) -> None:
    model, x = net(), torch.randn(3, 9)
    adapted(model, rank=4, alpha=6, scaling="rslora")
    save_lora(model, path, format="kohya")
    assert load_file(path)["lycoris_0.alpha"] == 12.0
    fresh = net()
    load_lora(fresh, path)
    torch.testing.assert_close(fresh(x), model(x))


def test_summaries_show_it(path: Path) -> None:
    model = net()
    register_lora(model, target="0", rank=4, alpha=6, scaling="rslora")
    save_lora(model, path)
    assert "4  6 rslora  on" in str(lora_summary(model))
    assert file_summary(path).weights[0].scaling == "rslora"
