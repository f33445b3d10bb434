"""Damaged files: each is refused, loads nothing, and runs no code."""

from __future__ import annotations

import functools
import json
import pickle
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from lora_param import (
    FileError,
    LoRAError,
    load_lora,
    lora_parameters,
    lora_state_dict,
    remove_lora,
    save_lora,
)
from lora_param.io import tensors
from lora_param.io.formats import native
from lora_param.io.tensors import save_tensors

from .file_cases import FUZZ, header_of, net, plain, refused, same, same_tensors, state, tensors_of


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], Any]) -> None:
    """Change a file's record and tensors, and seal it again as a forger would."""
    metadata = dict(header_of(path).metadata)
    tensors = {name: tensor.clone() for name, tensor in tensors_of(path).items()}
    record = json.loads(metadata.pop(native.KEY))
    change(record, tensors)
    record["sha256"] = native._seal({**record, native.STRINGS: metadata}, tensors)
    save_tensors(path, tensors, metadata | {native.KEY: json.dumps(record)})


A, B = "0.weight.lora_A", "0.weight.lora_B"


Forgery = Callable[[dict[str, Any], dict[str, Tensor]], Any]


FORGERIES: dict[str, tuple[Forgery, str]] = {
    "newer": (lambda r, t: r.update(version=2), "written in version 2 .* up to 1; update it"),
    "version text": (lambda r, t: r.update(version="1"), "damaged metadata: version"),
    "kind": (lambda r, t: r["weights"]["0.weight"].update(kind="new"), "0.weight: .* knows no kind 'new'; update"),
    "no kind": (lambda r, t: r["weights"]["0.weight"].pop("kind"), "damaged metadata: KeyError 'kind'"),
    "number": (lambda r, t: r["weights"]["0.weight"]["numbers"].update(tau=1), "0.weight: .*tau"),
    "dropout": (lambda r, t: r["weights"]["0.weight"]["numbers"].update(dropout=1.0), "0.weight: dropout must satisfy"),
    "rows": (lambda r, t: r["weights"]["0.weight"].update(rows=[0]), "damaged metadata: weights of 0.weight"),
    "no weights": (lambda r, t: (r["weights"].clear(), t.clear()), "there is no adapter in it"),
    "field gone": (lambda r, t: r.pop("base"), "damaged metadata: KeyError 'base'"),
    "weights a list": (lambda r, t: r.update(weights=[]), "damaged metadata: AttributeError"),
    "base of numbers": (lambda r, t: r["base"].update({"0.bias": 1}), r"metadata: base of 0\.bias"),
    "alpha text": (lambda r, t: r["weights"]["0.weight"]["numbers"].update(alpha="3"), "0.weight: alpha must be a finite"),
    "alpha true": (lambda r, t: r["weights"]["0.weight"]["numbers"].update(alpha=True), "0.weight: alpha must be a finite"),
    "alpha huge": (lambda r, t: r["weights"]["0.weight"]["numbers"].update(alpha=10**400), "0.weight: alpha must be a finite"),
    "rank": (lambda r, t: r["weights"]["0.weight"]["numbers"].update(rank=3), "0.weight: its rank must be 2"),
    "shape": (lambda r, t: r["shapes"].update({"0.weight": [5, 7]}), "aren't of the shape said"),
    "shape text": (lambda r, t: r["shapes"].update({"0.weight": ["5"]}), "shapes of 0.weight"),
    "adapter": (lambda r, t: r.update(adapter="a.b"), "string without dots, got 'a.b'"),
    "a name of rows that aren't said": (lambda r, t: (r["weights"].update({"0.weight[0:2]": r["weights"].pop("0.weight")}), t.update({k.replace("0.weight", "0.weight[0:2]"): t.pop(k) for k in [*t] if k.startswith("0.weight.")})), r"its rows are \[:\], by its name \[0:2\]"),
    "rows by another name": (lambda r, t: r["weights"]["0.weight"].update(rows="0:2"), r"its rows are \[0:2\], by its name \[:\]"),
    "missing": (lambda r, t: t.pop(A), "missing: 0.weight.lora_A"),
    "extra": (lambda r, t: t.update(x=torch.ones(1)), "unexpected: x"),
    "nan": (lambda r, t: t[A][0].fill_(torch.nan), "its tensors must be finite"),
    "infinity": (lambda r, t: t[B][0].fill_(torch.inf), "its tensors must be finite"),
    "ranks": (lambda r, t: t.update({A: t[A][:1].clone()}), r"\(1, 6\) and lora_B \(5, 2\) are no pair"),
    "vector": (lambda r, t: t.update({A: torch.ones(2)}), "0.weight: "),
    "scalar": (lambda r, t: t.update({B: torch.tensor(1.0)}), "0.weight: "),
    "two dtypes": (lambda r, t: t.update({A: t[A].half()}), "must share one of"),
    "fan_in": (
        lambda r, t: (t.update({A: torch.ones(2, 5)}), r["shapes"].update({"0.weight": [5, 5]})),
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
    "empty": (b"", "damaged one"),
    "text": (b"this is no safetensors file", "damaged one"),
    "absurd header": (framed(b"{}", 2**63), "damaged one"),
    "largest header": (framed(b"{}", 2**64 - 1), "damaged one"),
    "no JSON": (framed(b"\x80\x81"), "damaged one"),
    "list": (framed(b"[]"), "damaged one"),
    "deep": (framed(b"[" * 100_000), "damaged one"),
    "deep objects": (framed(b'{"a":' * 100_000), "damaged one"),
    "key twice": (
        framed(
            b"{" + b",".join([b'"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'] * 2) + b"}"
        ),
        "a key is there twice",
    ),
    "NaN": (framed(b'{"a":NaN}'), "damaged one"),
    "number": (framed(b'{"a":' + b"9" * 10_000 + b"}"), "damaged one"),
    "metadata of numbers": (framed(b'{"__metadata__":{"a":1}}'), "damaged one"),
    "offsets": (framed(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'), "damaged one"),
    "huge offsets": (
        framed(b'{"a":{"dtype":"F32","shape":[99999999999],"data_offsets":[0,399999999996]}}'),
        "damaged one",
    ),
    "negative": (framed(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,0]}}'), "damaged one"),
    "overlap": (
        framed(
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
            b'"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
        )
        + b"\0" * 4,
        "damaged one",
    ),
    "bytes of nobody": (
        framed(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}') + b"\0" * 8,
        "damaged one",
    ),
    "dimensions": (
        framed(b'{"a":{"dtype":"F32","shape":[' + b"9," * 800_000 + b'9],"data_offsets":[0,0]}}'),
        "damaged one",
    ),
    "long name": (
        framed(b'{"' + b"a." * 501 + b'":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'),
        "a name has more than 1000 characters",
    ),
    "float": (
        framed(b'{"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,0]}}'),
        "damaged one",
    ),
    "no tensors": (framed(b"{}"), "of no known format"),
    "of others": (
        framed(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}') + b"\0" * 4,
        "of no known format",
    ),
}


def test_metadata_may_be_null(path: Path) -> None:
    path.write_bytes(framed(b'{"__metadata__":null}'))
    with safe_open(path, "pt") as file:
        assert file.metadata() is None
    assert header_of(path).metadata == {}


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


def test_a_header_is_parsed_once(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed, parse = [], tensors.strict_json

    def counting(text: str) -> Any:
        parsed.append(text)
        return parse(text)

    monkeypatch.setattr(tensors, "strict_json", counting)
    monkeypatch.setattr(native, "strict_json", counting)
    for content, times in (
        (framed(b"[" + b" " * 1000), 0),
        (saved.read_bytes().replace(b"0.weight", b"1.weight"), 2),  # and the record in it
    ):
        parsed.clear()
        saved.write_bytes(content)
        with pytest.raises(FileError):
            load_lora(plain(), saved)
        assert len(parsed) == times


def test_a_changed_string_of_the_callers_is_noticed(path: Path) -> None:
    save_lora(net(), path, metadata={"license": "MIT"})
    path.write_bytes(path.read_bytes().replace(b'"MIT"', b'"BSD"'))
    refused(plain(), path, "its bytes aren't those that were saved")
