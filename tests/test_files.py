"""Our own file: what comes back, what is proved of the base, what is refused, what survives."""

from __future__ import annotations

import copy
import errno
import functools
import json
import os
import pickle
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_param import (
    AdapterError,
    FileError,
    LoRAError,
    TargetError,
    base_state_dict,
    disable_lora,
    fingerprint,
    load_lora,
    lora_parameters,
    lora_state_dict,
    register_lora,
    remove_lora,
    save_lora,
)
from lora_param.formats import native
from lora_param.formats.pair import Pair
from lora_param.formats.tensors import header, load_tensors, save_tensors

from .cases import CASES, Case, outputs, shake


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))


def net(*adapters: str, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    model = plain().to(dtype)
    for adapter in adapters or ("default",):
        register_lora(model, rank={"0": 2, "*": 1}, alpha=3.0, adapter=adapter)
    shake(model)
    return model


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "adapter.safetensors"


@pytest.fixture
def saved(path: Path) -> Path:
    save_lora(net(), path)
    return path


def state(model: nn.Module) -> dict[str, Any]:
    tensors = {name: (id(t), t.requires_grad, t.clone()) for name, t in model.named_parameters()}
    return {"modules": str(model), "tensors": tensors}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return (
        a["modules"] == b["modules"]
        and a["tensors"].keys() == b["tensors"].keys()
        and all(
            x[:2] == y[:2] and torch.equal(x[2], y[2])
            for x, y in zip(a["tensors"].values(), b["tensors"].values(), strict=True)
        )
    )


def refused(model: nn.Module, path: Path, match: str = "", **options: Any) -> None:
    """Load what can't be loaded: one of our errors, and the model as it was."""
    before = state(model)
    with pytest.raises(LoRAError, match=match):
        load_lora(model, path, **options)
    assert same(before, state(model))


# What comes back


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
    assert [name.split(".")[2] for name in lora_state_dict(fresh)][::2] == ["french", "german"] * 2


def test_one_of_several_adapters_is_saved(path: Path) -> None:
    model, fresh = net("a", "b"), plain()
    save_lora(model, path, "b")
    load_lora(fresh, path)
    assert same_tensors(lora_state_dict(fresh), lora_state_dict(model, "b"))


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


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
        ({"rank": 1}, r'adapter "default" is another: .* 0\.weight\.default\.lora_A is \(2, 6\)'),
        ({"rank": {"0": 2}, "target": "0"}, r"is another: .* unexpected: 2\.weight"),
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
    save_lora(net(), path, metadata={"license": "MIT", "naïve": "ü"})
    assert header(path).metadata.items() >= {"license": "MIT", "naïve": "ü"}.items()


def test_others_can_read_the_tensors(saved: Path) -> None:
    from safetensors.torch import load_file

    expected = {
        name.replace(".default", ""): tensor for name, tensor in lora_state_dict(net()).items()
    }
    assert same_tensors(dict(sorted(load_file(saved).items())), dict(sorted(expected.items())))


@pytest.mark.parametrize("view", [lambda t: t.mT, lambda t: t[::2], lambda t: t.expand(3, 4, 6)])
def test_tensors_in_any_memory_layout_are_written_in_order(
    view: Callable[[Tensor], Tensor], path: Path
) -> None:
    tensor = view(torch.randn(4, 6))
    save_tensors(path, {"half": torch.ones(3).half(), "full": tensor}, {"odd": "x"})
    assert header(path).tensors["full"].begin % tensor.element_size() == 0  # readers view in place
    assert torch.equal(load_tensors(path)["full"], tensor)


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


# The base


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
    load_lora(model, saved, base="ignore")
    assert all(factor.is_meta for factor in lora_parameters(model))


def test_a_model_that_lacks_the_weights_is_told_the_base_and_the_names(saved: Path) -> None:
    model = nn.ModuleDict({"0": nn.Linear(6, 5), "head": nn.Linear(5, 4)})
    refused(
        model,
        saved,
        r"holds only changes to its base, the weights of .*Sequential, and this model lacks 1 of "
        r'2: 2\.weight; the nearest to the first are "0\.weight"',
    )


# What is refused

BAD_SAVES: dict[str, tuple[Callable[[nn.Sequential], Any], dict[str, Any], str]] = {
    "nan": (
        lambda model: model[0].parametrizations.weight[0].lora_A.data.fill_(torch.nan),
        {},
        r"0\.weight: alpha and factors must be finite",
    ),
    "meta": (lambda model: model.to("meta"), {}, r"0\.weight: the factors have no values"),
    "no adapter": (remove_lora, {}, "the model has none"),
    "own key": (lambda model: None, {"metadata": {"lora_param": "x"}}, 'other than "lora_param"'),
    "number": (lambda model: None, {"metadata": {"x": 1}}, "must map strings to strings"),
    "format": (
        lambda model: None,
        {"format": "zip"},
        "format must be one of \\['kohya', 'native', 'peft'\\], got 'zip'",
    ),
    "option": (lambda model: None, {"colour": 1}, "native takes .*got colour"),
    "missing": (lambda model: None, {"adapter": "x"}, "no weight with an adapter 'x'"),
}


@pytest.mark.parametrize("case", BAD_SAVES)
def test_what_can_not_be_saved_leaves_the_old_file(case: str, saved: Path) -> None:
    harm, options, match = BAD_SAVES[case]
    before, model = saved.read_bytes(), net()
    harm(model)
    with pytest.raises(LoRAError, match=match):
        save_lora(model, saved, **options)
    assert saved.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"base": "maybe"}, 'base must be "require", "warn" or "ignore", got \'maybe\''),
        ({"adapter": "a.b"}, "must be a non-empty string without dots"),
        ({"alpha": 16}, "the format native takes .*got alpha"),
    ],
)
def test_bad_arguments_of_loading_are_refused(
    options: dict[str, Any], match: str, saved: Path
) -> None:
    refused(plain(), saved, match, **options)


def test_a_tied_weight_is_refused(saved: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Linear(6, 5))
    model[3].weight = model[0].weight
    before = state(model)
    with pytest.raises(TargetError, match=r"0\.weight: 3\.weight is the same Parameter"):
        load_lora(model, saved, base="ignore")
    assert same(before, state(model))


def test_an_interruption_half_way_leaves_the_model(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, calls = Pair.parametrization, []

    def failing(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return build(*arguments)

    monkeypatch.setattr(Pair, "parametrization", failing)
    model = plain()
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        load_lora(model, saved)
    assert same(before, state(model))


# Writing, whole or not at all


def full_disk(*arguments: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupt(*arguments: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("moment", ["fsync", "replace", "blob"])
@pytest.mark.parametrize(
    ("fault", "error"), [(full_disk, FileError), (interrupt, KeyboardInterrupt)]
)
def test_a_failure_while_writing_leaves_the_old_file_and_no_other(
    moment: str,
    fault: Callable[..., None],
    error: type[BaseException],
    saved: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = saved.read_bytes()
    if moment == "blob":
        monkeypatch.setattr("lora_param.formats.tensors.bytes_of", fault)
    else:
        monkeypatch.setattr(os, moment, fault)
    with pytest.raises(error):
        save_lora(net("other"), saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_link_stays_a_link_and_permissions_stay(saved: Path, tmp_path: Path) -> None:
    saved.chmod(0o600)
    link = tmp_path / "latest"
    link.symlink_to(saved.name)
    save_lora(net("other"), link)
    assert link.is_symlink()
    assert saved.stat().st_mode & 0o777 == 0o600
    assert native.about(saved).adapter == "other"


@pytest.mark.parametrize("where", ["", "missing/adapter.safetensors"])
def test_where_no_file_can_be_is_said(where: str, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="can't be written: "):
        save_lora(net(), tmp_path / where)
    assert list(tmp_path.iterdir()) == []


# Damaged files


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], Any]) -> None:
    """Change a file's record and tensors, and seal it again as a forger would."""
    metadata, tensors = dict(header(path).metadata), load_tensors(path)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    record = json.loads(metadata[native.KEY])
    change(record, tensors)
    record["sha256"] = native._seal(metadata, record, tensors)
    save_tensors(path, tensors, metadata | {native.KEY: json.dumps(record)})


A, B = "0.weight.lora_A", "0.weight.lora_B"
Forgery = Callable[[dict[str, Any], dict[str, Tensor]], Any]

FORGERIES: dict[str, tuple[Forgery, str]] = {
    "newer": (lambda r, t: r.update(version=2), "written in version 2 .* up to 1; update it"),
    "version text": (lambda r, t: r.update(version="1"), "damaged metadata: version or scale"),
    "scale rule": (lambda r, t: r.update(scale="alpha"), "damaged metadata: version or scale"),
    "no weights": (lambda r, t: (r["weights"].clear(), t.clear()), "there is no adapter in it"),
    "field gone": (lambda r, t: r.pop("base"), "damaged metadata: KeyError 'base'"),
    "weights a list": (lambda r, t: r.update(weights=[]), "damaged metadata: AttributeError"),
    "base of numbers": (lambda r, t: r["base"].update({"0.bias": 1}), r"metadata: 0\.bias"),
    "alpha text": (lambda r, t: r["weights"]["0.weight"].update(alpha="3"), "alpha of 0.weight"),
    "alpha true": (lambda r, t: r["weights"]["0.weight"].update(alpha=True), "alpha of 0.weight"),
    "alpha huge": (lambda r, t: r["weights"]["0.weight"].update(alpha=10**400), "alpha of 0.weight"),
    "rank": (lambda r, t: r["weights"]["0.weight"].update(rank=3), "aren't of the rank and shape"),
    "shape": (lambda r, t: r["weights"]["0.weight"].update(shape=[5, 7]), "of the rank and shape"),
    "shape text": (lambda r, t: r["weights"]["0.weight"].update(shape=["5"]), "shape of 0.weight"),
    "adapter": (lambda r, t: r.update(adapter="a.b"), "string without dots, got 'a.b'"),
    "missing": (lambda r, t: t.pop(A), "missing: 0.weight.lora_A"),
    "extra": (lambda r, t: t.update(x=torch.ones(1)), "unexpected: x"),
    "nan": (lambda r, t: t[A][0].fill_(torch.nan), "alpha and factors must be finite"),
    "infinity": (lambda r, t: t[B][0].fill_(torch.inf), "alpha and factors must be finite"),
    "ranks": (lambda r, t: t.update({A: t[A][:1].clone()}), r"\(1, 6\) and \(5, 2\) are no pair"),
    "vector": (lambda r, t: t.update({A: torch.ones(2)}), "0.weight: "),
    "scalar": (lambda r, t: t.update({B: torch.tensor(1.0)}), "0.weight: "),
    "two dtypes": (lambda r, t: t.update({A: t[A].half()}), "must share one of"),
    "fan_in": (
        lambda r, t: (t.update({A: torch.ones(2, 5)}), r["weights"]["0.weight"].update(shape=[5, 5])),
        r"don't fit the model's: 0\.weight: its factors are \(\(2, 5\), \(5, 2\)\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_file_is_refused(forgery: str, saved: Path) -> None:
    change, match = FORGERIES[forgery]
    rewritten(saved, change)
    refused(plain(), saved, match, base="ignore")


def framed(head: bytes, length: int | None = None) -> bytes:
    return (len(head) if length is None else length).to_bytes(8, "little") + head


DAMAGES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "damaged one: its header would be longer"),
    "text": (b"this is no safetensors file", "its header would be longer"),
    "absurd header": (framed(b"{}", 2**63), "its header would be longer"),
    "largest header": (framed(b"{}", 2**64 - 1), "its header would be longer"),
    "no JSON": (framed(b"\x80\x81"), "can't decode byte"),
    "list": (framed(b"[]"), "damaged one"),
    "deep": (framed(b"[" * 100_000), "damaged one"),
    "deep objects": (framed(b'{"a":' * 100_000), "damaged one"),
    "key twice": (framed(b'{"a":1,"a":2}'), "a key is there twice"),
    "NaN": (framed(b'{"a":NaN}'), "NaN is no JSON"),
    "number": (framed(b'{"a":' + b"9" * 10_000 + b"}"), "damaged one"),
    "metadata of numbers": (framed(b'{"__metadata__":{"a":1}}'), "its metadata are no strings"),
    "offsets": (
        framed(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'),
        "a has no place in it",
    ),
    "huge offsets": (
        framed(b'{"a":{"dtype":"F32","shape":[99999999999],"data_offsets":[0,399999999996]}}'),
        "a has no place in it",
    ),
    "negative": (
        framed(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,0]}}'),
        "a has no place in it",
    ),
    "float": (
        framed(b'{"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,0]}}'),
        "a has no place in it",
    ),
    "no tensors": (framed(b"{}"), "of no known format"),
    "of others": (
        framed(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}') + b"\0" * 4,
        "of no known format",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_safetensors_file_is_refused(damage: str, path: Path) -> None:
    content, match = DAMAGES[damage]
    path.write_bytes(content)
    refused(plain(), path, match)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin", ""])
def test_a_pickle_runs_no_code(suffix: str, tmp_path: Path) -> None:
    file, touched = tmp_path / f"adapter{suffix}", tmp_path / "touched"
    for save in (lambda o, f: f.write_bytes(pickle.dumps(o)), torch.save):
        save({"0.weight.lora_A": Bomb(touched)}, file)
        options = {"alpha": 4.0} if suffix in (".pt", ".bin") else {}  # which is what it asks first
        with pytest.raises(FileError, match=r"read safely|a damaged one|no known format"):
            load_lora(plain(), file, **options)
    assert not touched.exists()


def test_a_folder_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    refused(plain(), tmp_path, "of no known format")
    refused(plain(), tmp_path / "nothing", "can't be read: No such file")


def test_a_file_cut_short_anywhere_is_refused(saved: Path) -> None:
    content, model = saved.read_bytes(), plain()
    before = state(model)
    for length in range(len(content)):
        saved.write_bytes(content[:length])
        with pytest.raises(FileError):
            load_lora(model, saved)
    assert same(before, state(model))


def test_a_flipped_bit_of_any_byte_is_noticed(saved: Path) -> None:
    content = saved.read_bytes()
    expected, model = lora_state_dict(net()), plain()
    before = state(model)
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        saved.write_bytes(flipped)
        try:
            load_lora(model, saved, base="require")
        except FileError:
            continue
        # Only what says the same in other bytes may pass: a letter of an escape, say.
        assert same_tensors(lora_state_dict(model), expected)
        remove_lora(model)
    assert same(before, state(model))


@functools.cache
def valid() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        save_lora(net(), f"{folder}/adapter")
        return Path(folder, "adapter").read_bytes()


FUZZ = settings(
    max_examples=1000,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def loads_whole_or_not_at_all(path: Path, expected: dict[str, Tensor] | None = None) -> None:
    model = plain()
    before = state(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load_lora(model, path, base="ignore")
    except LoRAError:
        assert same(before, state(model))
        return
    if expected is not None:
        assert same_tensors(lora_state_dict(model), expected)
    assert all(factor.isfinite().all() for factor in lora_parameters(model))


@FUZZ
@given(
    edits=st.lists(
        st.tuples(st.sampled_from(["flip", "cut", "insert", "repeat"]), st.floats(0, 1), st.binary(min_size=1, max_size=9)),
        min_size=1,
        max_size=3,
    )
)  # fmt: skip
def test_mutated_bytes_load_whole_or_not_at_all(
    edits: list[tuple[str, float, bytes]], tmp_path: Path
) -> None:
    file = tmp_path / "adapter.safetensors"
    file.write_bytes(valid())
    content = file.read_bytes()
    for kind, where, value in edits:
        place, size = int(where * (len(content) - 1)), len(value)
        head, tail = content[:place], content[place:]
        content = {
            "flip": head + value + tail[size:],
            "cut": head + tail[size * 7 :],
            "insert": head + value + tail,
            "repeat": head + tail[: size * 7] + tail,
        }[kind]
    file.write_bytes(content)
    loads_whole_or_not_at_all(file, lora_state_dict(net()))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip


@FUZZ
@given(steps=st.lists(st.integers(0, 9), max_size=4), value=JSON, drop=st.booleans())
def test_forged_metadata_load_whole_or_not_at_all(
    steps: list[int], value: Any, drop: bool, tmp_path: Path
) -> None:
    file = tmp_path / "adapter.safetensors"
    file.write_bytes(valid())

    def change(record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        place: Any = record
        for step in steps:
            keys = list(place) if isinstance(place, dict) else range(len(place))
            if not keys:
                return
            key = keys[step % len(keys)]
            if isinstance(place[key], (dict, list)) and step is not steps[-1]:
                place = place[key]
            elif drop:
                del place[key]
                return
            else:
                place[key] = value
                return

    rewritten(file, change)
    loads_whole_or_not_at_all(file)


SHAPES = st.lists(st.integers(0, 6), max_size=3)


@FUZZ
@given(
    shapes=st.tuples(SHAPES, SHAPES),
    dtypes=st.tuples(*[st.sampled_from([torch.float32, torch.float16, torch.float64])] * 2),
)
def test_forged_tensors_load_whole_or_not_at_all(
    shapes: tuple[list[int], ...], dtypes: tuple[torch.dtype, ...], tmp_path: Path
) -> None:
    file = tmp_path / "adapter.safetensors"
    file.write_bytes(valid())
    pair = (torch.ones(s, dtype=d) for s, d in zip(shapes, dtypes, strict=True))
    rewritten(file, lambda record, tensors: tensors.update(zip((A, B), pair, strict=True)))
    loads_whole_or_not_at_all(file)


# A rank above the weight's smaller side


def test_a_rank_above_the_smaller_side_is_lowered_with_a_warning() -> None:
    for rows, columns in ((3, 5), (5, 3)):
        torch.manual_seed(0)
        pair = Pair("w", torch.randn(2, 4, columns), torch.randn(2, rows, 4), 6.0)
        lower = pair.within(3)
        assert lower.rank == 3
        update, expected = (p.lora_B @ p.lora_A * p.alpha / p.rank for p in (lower, pair))
        assert torch.allclose(update, expected, rtol=1e-5, atol=1e-5)
        assert pair.within(4).lora_A is pair.lora_A


def test_the_base_under_a_loaded_adapter_is_the_plain_one(saved: Path) -> None:
    fresh = plain()
    load_lora(fresh, saved)
    assert same_tensors(base_state_dict(fresh), plain().state_dict())


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt", ".pth", ""])
def test_our_own_file_may_be_called_anything(suffix: str, saved: Path, tmp_path: Path) -> None:
    file = tmp_path / f"renamed{suffix}"
    file.write_bytes(saved.read_bytes())
    load_lora(plain(), file, base="ignore")


MISFITS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "layer norm": (lambda: nn.LayerNorm(5), "0.weight has fewer than two dimensions"),
    "lazy": (lambda: nn.LazyLinear(5), "it is lazy and has no shape yet"),
    "old weight norm": (lambda: nn.utils.weight_norm(nn.Linear(6, 5)), "sets this tensor before"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("layer", MISFITS)
def test_a_model_whose_layer_is_another_is_refused(layer: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    register_lora(model, rank=2)
    save_lora(model, tmp_path / "adapter.safetensors")
    make, message = MISFITS[layer]
    with pytest.raises(LoRAError, match=message):
        load_lora(nn.Sequential(make()), tmp_path / "adapter.safetensors", base="ignore")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in the file system here")
def test_a_pipe_is_neither_waited_for_nor_replaced(saved: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    refused(plain(), pipe, "no regular file")
    with pytest.raises(FileError, match="can't be written: no regular file is there"):
        save_lora(net(), pipe)
    assert pipe.is_fifo()


def test_an_alpha_that_is_no_real_number_is_refused(tmp_path: Path) -> None:
    model, file = nn.ModuleDict({"a": nn.Linear(6, 5)}), tmp_path / "kohya.safetensors"
    tensors = {"lora_unet_a.lora_down.weight": torch.ones(2, 6)}
    tensors |= {"lora_unet_a.lora_up.weight": torch.ones(5, 2)}
    save_file(tensors | {"lora_unet_a.alpha": torch.tensor(1 + 2j)}, file)
    register_lora(model, rank=2)
    with pytest.raises(FileError, match="alpha"):
        load_lora(model, file)
    assert model["a"].parametrizations.weight[0].scale == 1.0


def test_a_fingerprint_with_buffers_fits_its_own_base(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    base = copy.deepcopy(model)
    register_lora(model, rank=2)
    save_lora(model, tmp_path / "a.safetensors", base=fingerprint(model, buffers=True))
    load_lora(base, tmp_path / "a.safetensors", base="require")


@pytest.mark.parametrize("alpha", [1e-50, 1e60, 0.0])
def test_kohya_refuses_an_alpha_that_it_can_not_hold(alpha: float, tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(6, 5)})
    register_lora(model, rank=2, alpha=alpha)
    with pytest.raises(FileError, match=r"has an alpha of .*, in float32"):
        save_lora(model, tmp_path / "kohya.safetensors", format="kohya")


def test_a_file_where_the_folder_should_be_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    register_lora(model, rank=2)
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(FileError, match="no folder can be made"):
        save_lora(model, tmp_path / "taken", format="peft")


def test_saving_in_inference_mode_is_as_good(tmp_path: Path) -> None:
    model = net()
    with torch.inference_mode():
        save_lora(model, tmp_path / "adapter.safetensors")
