"""What of PEFT's folders is refused, or read with a warning."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_param import FileError, load_lora, register_lora, save_lora
from lora_param.io.formats.peft_config import BESIDE, NEUTRAL, NUMBERS, OFF

from .peft_cases import (
    CASES,
    LINEAR,
    PREFIX,
    Case,
    Experts,
    chain,
    edit_config,
    edit_tensors,
    floats,
    output,
    trained_in_peft,
)

FIELDS: list[tuple[str, Any]] = [
    ("peft_type", "LOHA"),
    ("bias", "vera_only"),
    ("modules_to_save", "classifier"),
    ("target_parameters", [""]),
    ("layer_replication", [[0, 2], [1, 3]]),
    ("megatron_config", {"a": 1}),
    ("alora_invocation_tokens", [1]),
    ("use_qalora", True),
    ("velora_config", {"scale": 1.0}),
    ("monteclora_config", {"a": 1}),
    ("use_bdlora", {"a": 1}),
    ("arrow_config", {"a": 1}),
    ("kasa_config", {"a": 1}),
    ("ensure_weight_tying", True),
    *[("init_lora_weights", init) for init in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga")],
    ("a_field_of_tomorrow", 1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), FIELDS, ids=[f"{n}={v}" for n, v in FIELDS])
def test_a_field_that_changes_the_maths_is_refused_by_name(
    name: str, value: Any, tmp_path: Path
) -> None:
    base, _ = trained_in_peft(LINEAR, tmp_path)
    edit_config(tmp_path, **{name: value})
    with pytest.raises(FileError, match=f"not supported: {name}="):
        load_lora(base, tmp_path)
    assert type(base[0]) is nn.Linear


def test_every_field_of_the_installed_peft_is_decided() -> None:
    refused = {name for name, _ in FIELDS}
    assert set(LoraConfig().to_dict()) <= NUMBERS | BESIDE | NEUTRAL | set(OFF) | refused


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_an_initialisation_that_leaves_the_base_alone_is_read(init: Any, tmp_path: Path) -> None:
    base, _ = trained_in_peft(LINEAR, tmp_path)
    edit_config(tmp_path, init_lora_weights=init, a_field_of_tomorrow=None)
    load_lora(base, tmp_path)


CONFIGS: list[tuple[str, dict[str, Any], str]] = [
    ("rank that is no integer", {"r": "2"}, "a rank of '2'"),
    ("rank that is a truth value", {"r": True}, "a rank of True"),
    ("alpha that is no number", {"lora_alpha": None, "alpha_pattern": {"0": "x"}}, "an alpha of 'x'"),
    ("infinite alpha", {"lora_alpha": 10**400}, "an alpha of 1000"),
    ("pattern that is no expression", {"rank_pattern": {"(": 2}}, r"the pattern '\('"),
    ("pattern that takes for ever", {"rank_pattern": {"(a+)+x": 2}}, "the pattern"),
    ("pattern of many repetitions", {"alpha_pattern": {".*" * 9: 2}}, "the pattern"),
    ("patterns that are no mapping", {"rank_pattern": ["0"]}, "a rank of"),
    ("parameters that are no names", {"target_parameters": [1]}, "target_parameters="),
    ("rows that aren't there", {"trainable_token_indices": [1, 2]}, r"trainable_token_indices=\[1, 2\], of which"),
    ("another rank", {"r": 3}, "0: has rank 2, by its adapter_config.json 3"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "message"), [c[1:] for c in CONFIGS], ids=[c[0] for c in CONFIGS]
)
def test_a_config_that_does_not_fit_is_refused(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    base, _ = trained_in_peft(LINEAR, tmp_path)
    edit_config(tmp_path, **fields)
    with pytest.raises(FileError, match=message):
        load_lora(base, tmp_path)


def test_a_pattern_that_backtracks_for_minutes_in_a_long_name_is_refused(tmp_path: Path) -> None:
    base, _ = trained_in_peft(LINEAR, tmp_path)
    edit_config(tmp_path, rank_pattern={".*a.*a.*x": 2})
    load_lora(base, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    long = {key.replace(".0.", f".{'a.' * 400}a."): each for key, each in tensors.items()}
    save_file(long, tmp_path / "adapter_model.safetensors")
    with pytest.raises(FileError, match=r"the pattern '\.\*a\.\*a\.\*x' has too many"):
        load_lora(base, tmp_path)


def test_a_pattern_of_many_alternatives_is_refused(tmp_path: Path) -> None:
    base, _ = trained_in_peft(LINEAR, tmp_path)
    many = "|".join(map(str, range(40)))
    mixtral = rf".*layers\.({many})\..*\.experts\..*\.(w1|w2|w3)"
    edit_config(
        tmp_path,
        rank_pattern={"(0|1|2|q_proj|v_proj)": 2, "a|b": 2, r"\.(q|k)_proj": 2, mixtral: 4},
    )
    load_lora(base, tmp_path)
    edit_config(tmp_path, rank_pattern={"(|q|qq|qqq)" * 20 + "!": 2})
    with pytest.raises(FileError, match=r"not supported: the pattern '\(\|q\|qq\|qqq\)"):
        load_lora(base, tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"r": 1, "r": 2}', "[" * 10**5, "\x00", '{"r": NaN}']
)
def test_what_is_no_config_is_refused(text: str, tmp_path: Path) -> None:
    base, _ = trained_in_peft(LINEAR, tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(
        FileError, match=r"adapter_config.json: (can't be read as JSON|no config of PEFT's)"
    ):
        load_lora(base, tmp_path)


def test_tensors_without_a_config_are_refused(tmp_path: Path) -> None:
    base, _ = trained_in_peft(LINEAR, tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        with pytest.raises(FileError, match=r"adapter_config\.json isn't there"):
            load_lora(base, path)


A, B = f"{PREFIX}0.lora_A.weight", f"{PREFIX}0.lora_B.weight"
BROKEN: list[tuple[str, Callable[[dict[str, Tensor]], Any], str]] = [
    ("missing factor", lambda t: t.pop(B), "0: has no lora_B"),
    ("no factors", lambda t: t.clear(), "there is no adapter in it|Extra data|a damaged one"),
    ("module that isn't there", lambda t: t.update({A.replace("0", "7"): t.pop(A), B.replace("0", "7"): t.pop(B)}), 'no module for 7; the nearest to the first are "[01].weight"'),
    ("wrapper that isn't there", lambda t: t.update({f"{PREFIX}0.base_layer.lora_A.weight": t.pop(A), f"{PREFIX}0.base_layer.lora_B.weight": t.pop(B)}), "no module for 0.base_layer; the"),
    ("part of what is no attention", lambda t: t.update({f"{PREFIX}0.base_layer.out_proj.lora_A.weight": t.pop(A), f"{PREFIX}0.base_layer.out_proj.lora_B.weight": t.pop(B)}), "no module for 0.base_layer.out_proj; the"),
    ("DoRA's magnitudes", lambda t: t.update({f"{PREFIX}0.lora_magnitude_vector.weight": torch.ones(5)}), "0.lora_magnitude_vector.weight is neither a factor nor equal"),
    ("bias", lambda t: t.update({f"{PREFIX}0.base_layer.bias": torch.ones(5)}), "0.bias is neither a factor nor equal to the model's"),
    ("transposed", lambda t: t.update({A: t[A].T.contiguous()}), "0: has rank 6, by its"),
    ("another shape", lambda t: t.update({A: torch.ones(2, 7)}), r"0: has factors \(2, 7\) and \(5, 2\) for a weight of \(5, 6\)"),
    ("a vector", lambda t: t.update({A: torch.ones(2)}), r"0: has a lora_A of torch.float32 and \(2,\)"),
    ("integers", lambda t: t.update({A: torch.ones(2, 6).int()}), "0: has a lora_A of torch.int32"),
    ("infinity", lambda t: t[A].fill_(math.inf), "0.weight: its tensors must be finite"),
    ("half of each spelling", lambda t: t.update({f"{PREFIX}0.lora_embedding_B": t.pop(B).T.contiguous()}), "0: has factors"),
    ("both spellings", lambda t: t.update({f"{PREFIX}0.lora_embedding_A": torch.ones(2, 6)}), "0.lora_embedding_A is neither"),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "message"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_tensors_that_do_not_fit_are_refused_whole(
    edit: Callable[[dict[str, Tensor]], Any], message: str, tmp_path: Path
) -> None:
    base, _ = trained_in_peft(LINEAR, tmp_path)
    edit_tensors(tmp_path, edit)
    with pytest.raises(FileError, match=message):
        load_lora(base, tmp_path)
    assert type(base[0]) is nn.Linear


def test_base_weights_that_peft_saved_have_to_be_the_models_own(tmp_path: Path) -> None:
    case = next(each for each in CASES if each.id == "Llama with embeddings")
    base, _ = trained_in_peft(case, tmp_path)
    key = f"{PREFIX}model.embed_tokens.base_layer.weight"
    assert key in load_file(tmp_path / "adapter_model.safetensors")
    edit_tensors(tmp_path, lambda t: t[key][0].add_(1))
    with pytest.raises(FileError, match=r"model.embed_tokens.weight is neither a factor nor equal"):
        load_lora(base, tmp_path)


def test_a_grouped_convolution_is_refused_both_ways(tmp_path: Path) -> None:
    case = Case("grouped", chain(nn.Conv2d(4, 6, 3, groups=2)), floats(2, 4, 5, 5), ["0"])
    base, _ = trained_in_peft(case, tmp_path)
    with pytest.raises(FileError, match=r"0\.weight: PEFT's update of a grouped convolution"):
        load_lora(base, tmp_path)
    register_lora(base, rank=2)
    with pytest.raises(FileError, match=r"0\.weight: PEFT's update of a grouped convolution"):
        save_lora(base, tmp_path / "out", format="peft")
    assert not (tmp_path / "out").exists()


OTHER_MATHS: list[tuple[str, nn.Module]] = [
    ("dilated", nn.Conv1d(4, 5, 3, dilation=2, padding="same")),
    ("padded", nn.Conv1d(4, 5, 3, padding=1, padding_mode="circular")),
]


@pytest.mark.parametrize(
    "layer", [each[1] for each in OTHER_MATHS], ids=[o[0] for o in OTHER_MATHS]
)
def test_a_convolution_that_peft_trains_otherwise_warns_both_ways(
    layer: nn.Module, tmp_path: Path
) -> None:
    base, theirs = trained_in_peft(Case("", chain(layer), floats(2, 4, 7), ["0"]), tmp_path)
    with pytest.warns(UserWarning, match="PEFT adapts 0.weight by other maths"):
        load_lora(base, tmp_path)
    x = torch.randn(2, 4, 7)
    assert not torch.allclose(output(base, x), output(theirs, x), atol=1e-3)
    with pytest.warns(UserWarning, match="PEFT adapts 0.weight by other maths"):
        save_lora(base, tmp_path / "out", format="peft")


class Twice(nn.Module):
    """Finds one module at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.a = self.b = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x).exp()


def test_a_module_that_peft_adapts_in_one_of_its_places_warns_both_ways(tmp_path: Path) -> None:
    base, theirs = trained_in_peft(Case("", Twice, floats(2, 4), ["a"]), tmp_path)
    with pytest.warns(UserWarning, match=r"PEFT adapts a\.weight in one of the places"):
        load_lora(base, tmp_path)
    x = torch.randn(2, 4)
    assert not torch.allclose(output(base, x), output(theirs, x), atol=1e-3)
    with pytest.warns(UserWarning, match=r"PEFT adapts a\.weight in one of the places"):
        save_lora(base, tmp_path / "out", format="peft")


class Scaled(nn.Linear):
    """A linear layer with one more matrix, and a forward that PEFT's wrapper doesn't know."""

    def __init__(self, *shape: int) -> None:
        super().__init__(*shape)
        self.gain_weight = nn.Parameter(torch.ones(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) @ self.gain_weight


HOMELESS: list[tuple[str, nn.Module, dict[str, Any], str]] = [
    ("own tensor of a subclass", nn.Sequential(Scaled(4, 4)), {"target": "0.gain_weight"}, "0.gain_weight: PEFT has no place"),
    ("model itself", nn.Linear(6, 5), {}, "weight: PEFT adapts what is inside a model"),
    ("LSTM", nn.Sequential(nn.LSTM(4, 5)), {}, "0.weight_ih_l0: PEFT has no place for this tensor of a"),
    ("transposed convolution", nn.Sequential(nn.ConvTranspose1d(4, 5, 3)), {}, "0.weight: PEFT has no place"),
    ("bilinear", nn.Sequential(nn.Bilinear(4, 3, 5)), {}, "0.weight: PEFT has no place"),
    ("embedding bag", nn.Sequential(nn.EmbeddingBag(7, 5)), {"target": "0"}, "0.weight: PEFT has no place"),
    ("attention of kdim", nn.Sequential(nn.MultiheadAttention(8, 2, kdim=6)), {}, "0.k_proj_weight: PEFT has no place"),
    ("four dimensions", nn.ModuleDict({"a": nn.ParameterDict({"w": torch.ones(2, 2, 3, 3)})}), {"target": "a.w"}, "a.w: PEFT has no place"),
    ("parameter of a list", nn.Sequential(nn.ParameterList([torch.ones(3, 3)])), {"target": "0.0"}, "0.0: PEFT has no place"),
    ("experts beside Conv1D", nn.Sequential(Conv1D(5, 6), Experts()), {"target": ["0", "up"]}, "1.up: PEFT can't adapt it in one file with a Conv1D"),
    ("name that ends another", nn.ModuleDict({"e": Experts(), "x": nn.ModuleDict({"e": Experts()})}), {"target": "e.up", "exclude": "x.*"}, "x.e.up: PEFT would adapt it too"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "options", "message"), [h[1:] for h in HOMELESS], ids=[h[0] for h in HOMELESS]
)
def test_what_peft_cannot_hold_is_refused_by_name_before_writing(
    model: nn.Module, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = copy.deepcopy(model)
    register_lora(model, rank=1, **options)
    with pytest.raises(FileError, match=f"nothing was written: .*{message}"):
        save_lora(model, tmp_path / "out", format="peft")
    assert not (tmp_path / "out").exists()


def test_a_linear_layer_with_a_forward_of_its_own_warns(tmp_path: Path) -> None:
    base, _ = trained_in_peft(
        Case("", lambda: nn.Sequential(Scaled(4, 4)), floats(2, 4), ["0"]), tmp_path
    )
    with pytest.warns(UserWarning, match=r"PEFT adapts 0\.weight by other maths"):
        load_lora(base, tmp_path)
