"""Our own file: what comes back, and what is proved of the base."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_param import (
    AdapterError,
    FileError,
    LoRAError,
    base_state_dict,
    disable_lora,
    fingerprint,
    load_lora,
    lora_parameters,
    lora_state_dict,
    named_lora_parameters,
    register_lora,
    remove_lora,
    save_lora,
)
from lora_param.io.formats import open_adapter
from lora_param.io.tensors import save_tensors

from .cases import CASES, Case, outputs, shake
from .file_cases import header_of, net, plain, refused, same, same_tensors, state, tensors_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_layer_comes_back_to_the_bit(case: Case, dtype: torch.dtype, path: Path) -> None:
    layer, inputs = case.build(dtype)
    fresh = copy.deepcopy(layer)
    names = case.adapt(layer)
    shake(layer)
    save_lora(layer, path)
    assert load_lora(fresh, path, base="require") == names
    for a, b in zip(outputs(layer.eval(), inputs), outputs(fresh.eval(), inputs), strict=True):
        assert torch.equal(a, b)
    assert str(fresh) == str(layer)


def test_ranks_alphas_and_a_scale_set_by_hand_come_back(path: Path) -> None:
    model, fresh = net(), plain()
    model[0].parametrizations.weight[0].scale = 0.1234567890123456
    save_lora(model, path)
    load_lora(fresh, path)
    for index in (0, 2):
        ours, theirs = (m[index].parametrizations.weight[0] for m in (fresh, model))
        assert (ours.rank, ours.scale) == (theirs.rank, theirs.scale)


def test_factors_keep_the_files_dtype(path: Path) -> None:
    save_lora(net(dtype=torch.float64), path)
    fresh = plain()
    load_lora(fresh, path, base="ignore")
    assert {factor.dtype for factor in lora_parameters(fresh)} == {torch.float64}


def test_the_adapters_name_is_the_files_unless_one_is_given(path: Path) -> None:
    save_lora(net("french"), path)
    fresh = plain()
    load_lora(fresh, path)
    load_lora(fresh, path, "german")
    assert [name.split(".")[2] for name in lora_state_dict(fresh)][::3] == ["french", "german"] * 2


def test_one_of_several_adapters_is_saved(path: Path) -> None:
    model, fresh = net("a", "b"), plain()
    save_lora(model, path, "b")
    load_lora(fresh, path)
    assert same_tensors(lora_state_dict(fresh), lora_state_dict(model, "b"))


def test_several_adapters_need_a_name(path: Path) -> None:
    with pytest.raises(AdapterError, match=r"the model has \['a', 'b'\]; name one"):
        save_lora(net("a", "b"), path)
    assert not path.exists()


def test_a_disabled_adapter_is_saved_and_comes_back_enabled(path: Path) -> None:
    model, fresh, x = net(), plain(), torch.randn(3, 6)
    expected = model(x)
    disable_lora(model)
    save_lora(model, path)
    load_lora(fresh, path)
    assert torch.equal(fresh(x), expected)


def test_loading_into_the_adapter_that_is_there_keeps_its_parameters(saved: Path) -> None:
    model, source = net(), net()
    shake(model)
    model[0].parametrizations.weight[0].scale = 7.0
    before = list(lora_parameters(model))
    load_lora(model, saved)
    assert all(a is b for a, b in zip(before, lora_parameters(model), strict=True))
    assert torch.equal(model[0].weight, source[0].weight)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": 1}, r'into the adapter "default": .* 0\.weight\.default\.lora_A is \(2, 6\)'),
        ({"rank": {"0": 2}, "target": "0"}, r"into the adapter .* unexpected: 2\.weight"),
    ],
)
def test_another_adapter_of_that_name_is_refused(
    options: dict[str, Any], match: str, saved: Path
) -> None:
    model = plain()
    register_lora(model, **options)
    refused(model, saved, match)


def test_a_file_of_fewer_weights_is_refused_by_an_adapter_of_more(path: Path) -> None:
    model = plain()
    register_lora(model, rank=1, target="0")
    save_lora(model, path)
    refused(net(), path, r"missing: 2\.weight\.default\.lora_A")


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("freeze", [True, False])
def test_base_and_factors_are_frozen_as_asked(trainable: bool, freeze: bool, saved: Path) -> None:
    fresh = plain()
    load_lora(fresh, saved, freeze=freeze, trainable=trainable)
    assert {factor.requires_grad for factor in lora_parameters(fresh)} == {trainable}
    assert fresh[0].parametrizations.weight.original.requires_grad is not freeze
    load_lora(fresh, saved, trainable=not trainable)
    assert {factor.requires_grad for factor in lora_parameters(fresh)} == {not trainable}


def test_removing_a_loaded_adapter_gives_the_model_back(saved: Path) -> None:
    fresh = plain()
    before = state(fresh)
    load_lora(fresh, saved)
    remove_lora(fresh)
    assert same(before, state(fresh))


def test_loading_draws_no_random_numbers(saved: Path) -> None:
    fresh, before = plain(), torch.get_rng_state()
    load_lora(fresh, saved)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_file_can_go_once_it_is_loaded(saved: Path) -> None:
    model, fresh = net(), plain()
    load_lora(fresh, saved)
    saved.write_bytes(b"")
    assert same_tensors(lora_state_dict(fresh), lora_state_dict(model))


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_lora(net(), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_metadata_of_the_callers_are_kept(path: Path) -> None:
    save_lora(net(), path, metadata={"license": "MIT", "naïve": "ü", "format": "pt"})
    assert header_of(path).metadata.items() >= {"license": "MIT", "naïve": "ü"}.items()


@pytest.mark.parametrize("format", ["peft", "kohya"])
def test_metadata_of_the_callers_are_kept_in_every_format(format: str, tmp_path: Path) -> None:
    model = nn.Sequential(plain())
    register_lora(model, rank=1)
    save_lora(model, tmp_path / "adapter", metadata={"license": "MIT"}, format=format)
    with open_adapter(tmp_path / "adapter") as file:
        assert (file.format.name, file.about.metadata) == (format, {"license": "MIT"})


def test_loading_into_the_adapter_that_is_there_copies_each_factor_and_what_it_was(
    saved: Path,
) -> None:
    model = net()
    count = len(list(lora_parameters(model)))
    with Copies() as copies:
        load_lora(model, saved)
    assert copies.made == 2 * count
    for entry in (model[0].parametrizations.weight[0], model[2].parametrizations.weight[0]):
        entry.bfloat16()
    with Copies() as copies:
        load_lora(model, saved)
    assert copies.made == 3 * count  # one more of each to look for overflow


class Copies(TorchDispatchMode):
    """Counts the copies that are made of tensors."""

    made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.made += func.overloadpacket in (torch.ops.aten.clone, torch.ops.aten._to_copy)
        return func(*args, **(kwargs or {}))


def test_others_can_read_the_tensors(saved: Path) -> None:
    from safetensors.torch import load_file

    expected = {
        name.replace(".default", ""): tensor.detach()
        for name, tensor in named_lora_parameters(net())
    }
    assert same_tensors(dict(sorted(load_file(saved).items())), dict(sorted(expected.items())))


@pytest.mark.parametrize("view", [lambda t: t.mT, lambda t: t[::2], lambda t: t.expand(3, 4, 6)])
def test_tensors_in_any_memory_layout_are_written_in_order(
    view: Callable[[Tensor], Tensor], path: Path
) -> None:
    tensor = view(torch.randn(4, 6))
    save_tensors(path, {"a half": torch.ones(3).half(), "full": tensor}, {"odd": "x"})
    assert (
        header_of(path).entries["full"].begin % tensor.element_size() == 0
    )  # readers view in place
    assert torch.equal(tensors_of(path)["full"], tensor)


def test_two_thousand_weights_come_back(path: Path) -> None:
    def stack() -> nn.Sequential:
        return nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(2_000)))

    model, fresh = stack(), stack()
    register_lora(model, rank=1)
    save_lora(model, path, base={})
    assert len(load_lora(fresh, path)) == 2_000


def test_progress_shows_on_everything_that_can_be_long(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []

    def bar(items: Any, label: str, *rest: Any, **options: Any) -> Any:
        shown.append(label)
        return items

    monkeypatch.setattr("tqdm.tqdm", bar)
    save_lora(net(), path)
    assert shown == ["checking the factors", "digesting"]
    load_lora(plain(), path)
    assert shown[2:] == ["digesting", "checking the factors", "loading"]


def test_nothing_shows_where_tqdm_is_not_installed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    save_lora(net(), path)
    assert load_lora(plain(), path) == ["0.weight", "2.weight"]


def other() -> nn.Sequential:
    model = plain()
    with torch.no_grad():
        model[2].bias[0] += 1
    return model


def test_another_base_is_refused_warned_of_or_ignored(saved: Path) -> None:
    text = r"another base, .*Sequential: 1 of 4 parameters differ from the model's: 2\.bias"
    refused(other(), saved, text, base="require")
    with pytest.warns(UserWarning, match=text):
        load_lora(other(), saved)
    load_lora(other(), saved, base="ignore")


def test_another_dtype_is_another_base(saved: Path) -> None:
    refused(plain().double(), saved, "4 of 4 parameters differ", base="require")


def test_the_base_is_told_beneath_other_adapters(saved: Path) -> None:
    load_lora(net("other"), saved, base="require")


def test_the_fingerprint_taken_before_training_serves(path: Path) -> None:
    before = fingerprint(plain())
    save_lora(net(), path, base=before)
    load_lora(plain(), path, base="require")


def test_a_file_without_a_fingerprint_can_not_be_required_to_have_one(path: Path) -> None:
    save_lora(net(), path, base={})
    load_lora(plain(), path)
    refused(plain(), path, "there is no fingerprint of its base in it", base="require")


def test_a_base_without_values_can_not_be_compared(saved: Path) -> None:
    model = plain().to("meta")
    with pytest.raises(FileError, match='can\'t be compared, pass base="ignore"'):
        load_lora(model, saved, base="require")
    with pytest.raises(LoRAError, match=r"0\.weight is on the meta device"):
        load_lora(model, saved, base="ignore")


def test_a_model_that_lacks_the_weights_is_told_the_base_and_the_names(saved: Path) -> None:
    model = nn.ModuleDict({"0": nn.Linear(6, 5), "head": nn.Linear(5, 4)})
    refused(
        model,
        saved,
        r"holds only changes to its base, the weights of .*Sequential, and this model lacks 1 of "
        r'2: 2\.weight; the nearest to the first are "0\.weight"',
    )


def test_the_base_under_a_loaded_adapter_is_the_plain_one(saved: Path) -> None:
    fresh = plain()
    load_lora(fresh, saved)
    assert same_tensors(base_state_dict(fresh), plain().state_dict())


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt", ".pth", ""])
def test_our_own_file_may_be_called_anything(suffix: str, saved: Path, tmp_path: Path) -> None:
    file = tmp_path / f"renamed{suffix}"
    file.write_bytes(saved.read_bytes())
    load_lora(plain(), file, base="ignore")


def test_a_fingerprint_with_buffers_fits_its_own_base(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    base = copy.deepcopy(model)
    register_lora(model, rank=2)
    save_lora(model, tmp_path / "a.safetensors", base=fingerprint(model, buffers=True))
    load_lora(base, tmp_path / "a.safetensors", base="require")


def test_saving_in_inference_mode_is_as_good(tmp_path: Path) -> None:
    model = net()
    with torch.inference_mode():
        save_lora(model, tmp_path / "adapter.safetensors")
