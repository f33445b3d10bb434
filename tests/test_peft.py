"""PEFT's folders, against the real PEFT and small random models."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_param import (
    FileError,
    load_lora,
    lora_state_dict,
    lora_summary,
    register_lora,
    remove_lora,
    save_lora,
)
from lora_param.formats import peft
from lora_param.formats.peft_config import NEUTRAL, NUMBERS, OFF
from lora_param.formats.skeleton import skeleton

from .cases import shake


class Experts(nn.Module):
    """Two stacks in one module, around which PEFT nests its wrappers."""

    is_transposed = False

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 6, 4) / 2)
        self.gate = nn.Parameter(torch.randn(6, 4) / 2)
        self.down = nn.Parameter(torch.randn(3, 4, 6) / 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("eoi,...i->...eo", self.up, x) * (x @ self.gate.T)[..., None, :]
        return torch.einsum("eoi,...ei->...o", self.down, hidden)


class TransposedExperts(nn.Module):
    """A stack stored (in, out), as some of transformers' are."""

    is_transposed = True

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 4, 6) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("eio,...i->...eo", self.up, x)


def chain(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*(copy.deepcopy(layer) for layer in layers))


class Attention(nn.Module):
    """Attention between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 3)
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(self.attention(x, x, x, need_weights=False)[0])


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=17, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=17, n_positions=9, n_embd=8, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
        image_size=8, patch_size=4, num_labels=3,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        vocab_size=17, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=4,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


@dataclass(frozen=True)
class Case:
    """A model, what PEFT adapts of it, and what that is called here."""

    id: str
    make: Callable[[], nn.Module]
    make_input: Callable[[], Tensor]
    target: list[str]
    parameters: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)

    def base(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make().eval()

    def config(self, **options: Any) -> LoraConfig:
        shared = {"r": 2, "lora_alpha": 3, "target_modules": self.target}
        return LoraConfig(
            **shared | {"target_parameters": self.parameters or None} | self.options | options
        )


def floats(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape)


def tokens(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, 9, shape)


CASES = [
    Case("linear", chain(nn.Linear(6, 5), nn.Linear(5, 4)), floats(3, 6), ["0", "1"]),
    Case("rank and alpha patterns", chain(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 6)), floats(3, 6), ["0", "1", "2"], options={"rank_pattern": {"1": 3, r"\d": 1}, "alpha_pattern": {"^2": 0.5}}),
    Case("rslora", chain(nn.Linear(6, 5), nn.Linear(5, 4)), floats(3, 6), ["0", "1"], options={"use_rslora": True, "rank_pattern": {"1": 3}}),
    Case("conv1d", chain(nn.Conv1d(4, 5, 3, stride=2, padding=1)), floats(2, 4, 7), ["0"]),
    Case("conv2d", chain(nn.Conv2d(4, 5, (1, 3), stride=(2, 1))), floats(2, 4, 7, 7), ["0"]),
    Case("conv2d 1x1", chain(nn.Conv2d(4, 5, 1)), floats(2, 4, 3, 3), ["0"]),
    Case("conv3d", chain(nn.Conv3d(3, 4, 2)), floats(2, 3, 4, 4, 4), ["0"]),
    Case("embedding", chain(nn.Embedding(9, 4, padding_idx=2), nn.Linear(4, 3)), tokens(2, 5), ["0", "1"]),
    Case("attention", Attention, floats(5, 2, 8), ["fc1", "attention"]),
    Case("transformers Conv1D", chain(Conv1D(5, 6), Conv1D(4, 5)), floats(3, 6), ["0", "1"]),
    Case("Conv1D and Linear", chain(Conv1D(5, 6), nn.Linear(5, 4)), floats(3, 6), ["0", "1"]),
    Case("experts", chain(nn.Linear(4, 4), Experts()), floats(2, 4), ["0"], ["1.down", "1.up"]),
    Case("three of one module", chain(Experts()), floats(2, 4), [], ["0.up", "0.gate", "0.down"], {"rank_pattern": {"up": 3}}),
    Case("transposed experts", chain(TransposedExperts()), floats(2, 4), [], ["0.up"]),
    Case("Llama", llama, tokens(2, 5), ["q_proj", "v_proj", "down_proj", "lm_head"]),
    Case("Llama with embeddings", llama, tokens(2, 5), ["embed_tokens", "q_proj"]),
    Case("GPT-2", gpt2, tokens(2, 5), ["c_attn", "c_proj", "wpe"]),
    Case("ViT", vit, floats(2, 3, 8, 8), ["projection", "classifier", "fc1"]),
    Case("Mixtral", mixtral, tokens(2, 5), ["q_proj"], ["experts.gate_up_proj", "experts.down_proj"]),
]  # fmt: skip


@contextmanager
def quiet() -> Iterator[None]:
    """Let PEFT warn; what we warn of is tested where it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad(), quiet():
        result = model(x)
    result = getattr(result, "logits", result)
    return result[0] if isinstance(result, tuple) else result


def trained_in_peft(case: Case, folder: Path, **options: Any) -> tuple[nn.Module, PeftModel]:
    """Return a base, and what PEFT made of a copy of it and saved."""
    base = case.base()
    with quiet():
        model = get_peft_model(copy.deepcopy(base), case.config(**options)).eval()
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape).to(parameter) / 3
        model.save_pretrained(folder)
    return base, model


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


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


LINEAR = CASES[0]


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
    for name, factor in lora_state_dict(base).items():
        assert torch.equal(factor, lora_state_dict(model)[name])
        assert factor.dtype == dtype


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


# Attention


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


# What can't be honoured

PREFIX = "base_model.model."


def edit_config(folder: Path, **fields: Any) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(config_of(folder) | fields))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


FIELDS: list[tuple[str, Any]] = [
    ("peft_type", "LOHA"),
    ("use_dora", True),
    ("lora_bias", True),
    ("bias", "all"),
    ("bias", "lora_only"),
    ("modules_to_save", ["classifier"]),
    ("trainable_token_indices", [1, 2]),
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
    assert set(LoraConfig().to_dict()) <= NUMBERS | NEUTRAL | set(OFF) | refused


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_an_initialisation_that_leaves_the_base_alone_is_read(init: Any, tmp_path: Path) -> None:
    base, _ = trained_in_peft(LINEAR, tmp_path)
    edit_config(tmp_path, init_lora_weights=init, a_field_of_tomorrow=None)
    load_lora(base, tmp_path)


CONFIGS: list[tuple[str, dict[str, Any], str]] = [
    ("rank that is no integer", {"r": "2"}, "a rank of '2'"),
    ("alpha that is no number", {"lora_alpha": None, "alpha_pattern": {"0": "x"}}, "an alpha of 'x'"),
    ("infinite alpha", {"lora_alpha": 10**400}, "an alpha of 1000"),
    ("pattern that is no expression", {"rank_pattern": {"(": 2}}, r"the pattern '\('"),
    ("pattern that takes for ever", {"rank_pattern": {"(a+)+x": 2}}, "the pattern"),
    ("pattern of many repetitions", {"alpha_pattern": {".*" * 9: 2}}, "the pattern"),
    ("patterns that are no mapping", {"rank_pattern": ["0"]}, "a rank of"),
    ("parameters that are no names", {"target_parameters": [1]}, "target_parameters="),
    ("another rank", {"r": 3}, "0 has rank 2, by its adapter_config.json 3"),
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


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"r": 1, "r": 2}', "[" * 10**5, "\x00", '{"r": NaN}']
)
def test_what_is_no_config_is_refused(text: str, tmp_path: Path) -> None:
    base, _ = trained_in_peft(LINEAR, tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(FileError, match=r"adapter_config.json: no (JSON|config of PEFT's)"):
        load_lora(base, tmp_path)


def test_tensors_without_a_config_are_refused(tmp_path: Path) -> None:
    base, _ = trained_in_peft(LINEAR, tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        with pytest.raises(FileError, match=r"adapter_config\.json can't be read"):
            load_lora(base, path)


A, B = f"{PREFIX}0.lora_A.weight", f"{PREFIX}0.lora_B.weight"
BROKEN: list[tuple[str, Callable[[dict[str, Tensor]], Any], str]] = [
    ("missing factor", lambda t: t.pop(B), "0 has no lora_B"),
    ("no factors", lambda t: t.clear(), "there is no adapter in it"),
    ("module that isn't there", lambda t: t.update({A.replace("0", "7"): t.pop(A), B.replace("0", "7"): t.pop(B)}), 'no module for 7; the nearest to the first are "[01].weight"'),
    ("wrapper that isn't there", lambda t: t.update({f"{PREFIX}0.base_layer.lora_A.weight": t.pop(A), f"{PREFIX}0.base_layer.lora_B.weight": t.pop(B)}), "no module for 0.base_layer; the"),
    ("part of what is no attention", lambda t: t.update({f"{PREFIX}0.base_layer.out_proj.lora_A.weight": t.pop(A), f"{PREFIX}0.base_layer.out_proj.lora_B.weight": t.pop(B)}), "no module for 0.base_layer.out_proj; the"),
    ("DoRA's magnitudes", lambda t: t.update({f"{PREFIX}0.lora_magnitude_vector.weight": torch.ones(5)}), "0.lora_magnitude_vector.weight is neither a factor nor equal"),
    ("bias", lambda t: t.update({f"{PREFIX}0.base_layer.bias": torch.ones(5)}), "0.bias is neither a factor nor equal to the model's"),
    ("transposed", lambda t: t.update({A: t[A].T.contiguous()}), "0 has rank 6, by its"),
    ("another shape", lambda t: t.update({A: torch.ones(2, 7)}), r"0 has factors \(2, 7\) and \(5, 2\) for a weight of \(5, 6\)"),
    ("a vector", lambda t: t.update({A: torch.ones(2)}), r"lora_A of 0 is torch.float32 of \(2,\)"),
    ("integers", lambda t: t.update({A: torch.ones(2, 6).int()}), "lora_A of 0 is torch.int32"),
    ("infinity", lambda t: t[A].fill_(math.inf), "0.weight: alpha and factors must be finite"),
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


# Outlines: what the command line knows of a base


OUTLINED = [
    each
    for each in CASES
    if each.id in ("linear", "conv2d", "attention", "embedding", "GPT-2", "Llama")
]


@pytest.mark.parametrize("case", OUTLINED, ids=lambda case: case.id)
def test_an_outline_gets_the_same_pairs_as_the_model(case: Case, tmp_path: Path) -> None:
    base, _ = trained_in_peft(case, tmp_path)
    outline = skeleton({name: tuple(each.shape) for name, each in base.named_parameters()})
    for ours, theirs in zip(
        peft.read(tmp_path, outline, mha_out_proj="once"),
        peft.read(tmp_path, base, mha_out_proj="once"),
        strict=True,
    ):
        assert (ours.weight, ours.alpha) == (theirs.weight, theirs.alpha)
        assert torch.equal(ours.lora_A, theirs.lora_A)
        assert torch.equal(ours.lora_B, theirs.lora_B)


def test_an_outline_does_not_say_how_experts_lie(tmp_path: Path) -> None:
    case = next(each for each in CASES if each.id == "transposed experts")
    base, _ = trained_in_peft(case, tmp_path)
    outline = skeleton({name: tuple(each.shape) for name, each in base.named_parameters()})
    with pytest.raises(FileError, match=r"0\.up: PEFT's layout of a stack depends on the module"):
        peft.read(tmp_path, outline)


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
