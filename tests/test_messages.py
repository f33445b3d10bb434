"""What a call is told that goes wrong the way first calls do: where, the rule, the fix."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import nn

from lora_param import (
    AdapterError,
    LoRAError,
    TargetError,
    lora_state_dict,
    merge_lora,
    named_lora_parameters,
    register_lora,
    save_lora,
)

from .file_cases import net, plain, refused
from .test_register import ABSENT

VERBS: dict[str, Callable[..., Any]] = ABSENT | {
    "merge": merge_lora,
    "named parameters": lambda *args: list(named_lora_parameters(*args)),
    "save": lambda model, *args: save_lora(model, "never written", *args),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_on_a_model_without_adapters_says_what_to_call(verb: str) -> None:
    with pytest.raises(AdapterError, match=r"the model has none; call register_lora\(model\)"):
        VERBS[verb](plain())


@pytest.mark.parametrize("verb", VERBS)
def test_a_list_of_adapters_where_one_is_wanted_is_refused(verb: str) -> None:
    rule = re.escape("adapter must be one name, or None for all, got ['a', 'b']; make a call for")
    with pytest.raises(AdapterError, match=rule):
        VERBS[verb](net("a", "b"), ["a", "b"])


ELSEWHERE: list[tuple[dict[str, Any], str]] = [
    ({"r": 8}, "for r=8 write rank=8"),
    ({"lora_alpha": 16}, "for lora_alpha=16 write alpha=16"),
    ({"lora_dropout": 0.1}, "write dropout=0.1"),
    ({"target_modules": ["q"]}, "write target=['q']"),
    ({"target_parameters": ["q"]}, "write target=['q']"),
    ({"target_modules": "all-linear"}, "leave it out: by default every such layer"),
    ({"exclude_modules": "q"}, "write exclude='q'"),
    ({"adapter_name": "a"}, "write adapter='a'"),
    ({"rank_pattern": {"q": 4}}, "give rank a mapping"),
    ({"alpha_pattern": {"q": 4}}, "give alpha a mapping"),
    ({"modules_to_save": ["head"]}, "write train=['head']"),
    ({"bias": "lora_only"}, 'write train="*.bias"'),
    ({"layers_to_transform": [0]}, "name the layers in target"),
    ({"init_lora_weights": True}, 'write init="kaiming"'),
    ({"use_rslora": True}, 'write scaling="rslora"'),
    ({"use_dora": True}, 'write kind="dora"'),
    ({"peft_config": 1}, "write rank=, alpha="),
    ({"rnak": 4}, "for rnak=4 write rank=4"),
    ({"adaptor": "a"}, "write adapter='a'"),
    ({"zzz": 1}, "for zzz=1 choose one of rank, alpha, target"),
    ({"r": 8, "rank": 4, "rnak": 2}, "for r=8 write rank=8; for rnak=2 write rank=2"),
]


@pytest.mark.parametrize(("options", "fix"), ELSEWHERE, ids=[str(each) for each, _ in ELSEWHERE])
def test_an_option_of_another_name_is_told_ours(options: dict[str, Any], fix: str) -> None:
    model = plain()
    with pytest.raises(LoRAError, match="register_lora takes a model, .*" + re.escape(fix)):
        register_lora(model, **options)
    assert list(model.state_dict()) == list(plain().state_dict())


def test_a_target_in_pefts_words_is_told_to_leave_it_out() -> None:
    with pytest.raises(TargetError, match='"all-linear" matches no weight; leave it out'):
        register_lora(plain(), target="all-linear")


POSITIONAL: list[tuple[Any, str]] = [
    (8, "for 8 write perhaps rank=8"),
    ("q_proj", "for 'q_proj' write perhaps target='q_proj'"),
    (["q_proj"], "write perhaps target=['q_proj']"),
    (LoraConfig(r=4), "write rank=, alpha=, dropout= and target= as it has them"),
]


@pytest.mark.parametrize(("value", "fix"), POSITIONAL, ids=[str(v)[:10] for v, _ in POSITIONAL])
def test_an_option_by_position_is_told_to_be_named(value: Any, fix: str) -> None:
    with pytest.raises(LoRAError, match=f"its options by name; .*{re.escape(fix)}"):
        register_lora(plain(), value)


def test_the_signature_stays_what_a_reader_needs() -> None:
    parameters = inspect.signature(register_lora).parameters
    assert list(parameters)[:3] == ["model", "rank", "alpha"]
    assert parameters["rank"].kind is inspect.Parameter.KEYWORD_ONLY
    assert (register_lora.__doc__ or "").startswith("Adapt a model in place")


def test_a_warning_points_at_the_line_of_the_call() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9), nn.Linear(9, 9))
    model[1].weight = model[0].weight
    with pytest.warns(UserWarning, match="tied to an embedding") as warned:
        register_lora(model, rank=1)
    assert warned[0].filename == __file__


@pytest.mark.parametrize("option", ["target", "exclude"])
def test_the_beginning_of_a_name_is_told_to_end_with_a_star(option: str) -> None:
    fix = re.escape('a name is matched whole; write "weight_hh*"')
    with pytest.raises(TargetError, match=fix):
        register_lora(nn.LSTM(4, 5), rank=1, **{option: "weight_hh"})


KINDS_OF_STATE: dict[str, tuple[Callable[[nn.Module], dict[str, torch.Tensor]], str]] = {
    "the adapters'": (lora_state_dict, r"use load_lora_state_dict\(model, {}\(path\)\)"),
    "the whole model's": (lambda model: model.state_dict(), r"use model.load_state_dict\({}\(path\)\)"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS_OF_STATE)
@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors"])
def test_a_state_dict_in_a_file_is_told_from_an_adapter_file(
    kind: str, suffix: str, tmp_path: Path
) -> None:
    (state, fix), path = KINDS_OF_STATE[kind], tmp_path / f"adapter{suffix}"
    save, read = (
        (torch.save, "torch.load") if suffix != ".safetensors" else (save_file, "load_file")
    )
    save(state(net()), path)
    refused(plain(), path, "no adapter file, but the state dict .*" + fix.format(read))
