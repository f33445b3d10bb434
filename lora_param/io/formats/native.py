"""Our own file: safetensors whose metadata say what each delta is, and of which base."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...deltas import KINDS, Delta
from ...errors import FileError
from ...frozen import digest_of
from ...state import NUMBERS
from ..content import About, Config, Content, OpenFile, check_strings
from ..outline import Outline
from ..progress import progress
from ..tensors import LONGEST_NAME, strict_json

KEY, VERSION = "lora_param", 1
FIELDS = dict.fromkeys(("library", "adapter", "model", "class", "sha256"), str) | dict.fromkeys(
    ("weights", "shapes", "base"), dict
)
SPEC = {"kind": str, "numbers": dict, "layer": dict}
"""What our metadata hold, and what they hold of each weight; `rows` too, of a block of its rows."""
STRINGS = "metadata"
"""Under what a record that was read has the strings of whoever saved it."""


def recognises(file: OpenFile) -> bool:
    """Say whether a file is one of ours, whatever its version."""
    return KEY in file.header.metadata


def read_config(file: OpenFile) -> Config:
    """Return the record in our metadata, checked, and beside it the other strings.

    Raises:
        FileError: It is damaged, or of a version that this release doesn't know.
    """
    strings = dict(file.header.metadata)
    try:
        record = strict_json(strings.pop(KEY))
        version = record["version"]
        if type(version) is int and version > VERSION:
            raise FileError(
                f"{file.path}: written in version {version} of the format, and this release of "
                f"lora_param knows versions up to {VERSION}; update it"
            )
        faults = _record_faults(record)
    except FileError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        faults = [f"{type(error).__name__} {error!s:.200}"]
    if faults:
        raise FileError(f"{file.path}: damaged metadata: {', '.join(faults[:10])}")
    return {**record, STRINGS: strings}


def _record_faults(record: Mapping[str, Any]) -> list[str]:
    faults = [] if record["version"] == VERSION else ["version"]
    faults += [key for key, kind in FIELDS.items() if type(record[key]) is not kind]
    names = [*record["weights"], *record["shapes"]]
    faults += [f"the name {name:.80}" for name in names if len(name) > LONGEST_NAME]
    for name, spec in record["weights"].items():
        faults += [
            f"{key} of {name:.80}" for key, kind in SPEC.items() if type(spec[key]) is not kind
        ]
        if "rows" in spec and not (_are_sizes(spec["rows"]) and len(spec["rows"]) == 2):
            faults.append(f"rows of {name:.80}")
    for name, shape in record["shapes"].items():
        faults += [] if _are_sizes(shape) else [f"shape of {name:.80}"]
    return faults + [name for name, text in record["base"].items() if type(text) is not str]


def _are_sizes(value: Any) -> bool:
    return type(value) is list and len(value) <= 64 and not {*map(type, value)} - {int}


def describe(file: OpenFile, config: Config) -> About:
    """Return what our own file says besides its deltas."""
    return About(
        config["adapter"],
        config["model"],
        config["class"],
        config["base"],
        {name: tuple(shape) for name, shape in config["shapes"].items()},
        {_whole_name(name, spec): spec["layer"] for name, spec in config["weights"].items()},
        config[STRINGS],
    )


def _whole_name(name: str, spec: Mapping[str, Any]) -> str:
    return name.removesuffix("[{}:{}]".format(*spec["rows"])) if "rows" in spec else name


def parse(
    tensors: Mapping[str, Tensor], config: Config, weights: Outline
) -> list[tuple[str, Delta]]:
    """Read our own file, which has the weights' own names, and check every bit against its seal.

    Raises:
        FileError: The file is damaged, or has a delta of a kind that this release doesn't know.
    """
    specs: dict[str, dict[str, Any]] = config["weights"]
    if unknown := {name: s["kind"] for name, s in specs.items() if s["kind"] not in KINDS}:
        name, kind = next(iter(unknown.items()))
        raise FileError(f"{name}: this release of lora_param knows no kind {kind!r:.40}; update it")
    own: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        weight, _, part = name.rpartition(".")
        own[weight][part] = tensor
    complaints = [f"unexpected: {name}" for name in tensors if name.rpartition(".")[0] not in specs]
    if not complaints and config["sha256"] != _seal(config, tensors):
        complaints.append("its bytes aren't those that were saved")
    deltas = []
    for name, spec in {} if complaints else specs.items():
        try:
            deltas.append((name, _restore(own[name], spec)))
        except KeyError as error:
            complaints.append(f"missing: {name}.{error.args[0]}")
        except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
            complaints.append(f"{name}: {error}")
    if complaints:
        raise FileError(f"a damaged adapter file: {'; '.join(complaints[:10])}")
    return deltas


def _restore(tensors: Mapping[str, Tensor], spec: Mapping[str, Any]) -> Delta:
    """Build one weight's delta; what its kind doesn't know must not go unheard."""
    delta = KINDS[spec["kind"]].restore(tensors, spec["numbers"])
    for own, said in ((tensors_of(delta), tensors), (delta.numbers, spec["numbers"])):
        if unknown := sorted(said.keys() - own.keys()):
            raise FileError(f"unexpected: {unknown[0]:.80}")
    delta.rows = slice(*spec["rows"]) if "rows" in spec else None
    return delta


def tensors_of(delta: Delta) -> dict[str, Tensor]:
    """Return a delta's tensors by the names that it has for them."""
    return {name: tensor for name, tensor in delta.state_dict().items() if name != NUMBERS}


def render(
    deltas: Mapping[str, Delta],
    weights: Outline,
    about: About,
    *,
    base: Mapping[str, str] | None = None,
) -> Content:
    """Lay out our own file.

    Args:
        deltas: Deltas of any kind by their weights' names.
        weights: Those of the model.
        about: Has what the record says besides.
        base: What `fingerprint(model)` returned; `None` for what is known, or else to take it now.

    Returns:
        The tensors, and the metadata with the record.

    Raises:
        LoRAError: The base isn't strings, or has no values to digest.
    """
    from ... import __version__  # the package imports this module

    if base is None:
        base = about.base or {name: digest_of(name, t) for name, t in weights.parameters.items()}
    specs, shapes = {}, {name: list(shape) for name, shape in weights.shapes.items()}
    for name, delta in deltas.items():
        spec: dict[str, Any] = {"kind": delta.kind, "numbers": delta.numbers}
        if delta.rows is not None:
            spec["rows"] = [delta.rows.start, delta.rows.stop]
        # What others parametrize in front has no original of that name.
        weight = weights.weights[_whole_name(name, spec)]
        shapes[weight.name] = list(weight.shape or ())
        specs[name] = spec | {"layer": weight.module.facts}
    record: dict[str, Any] = {
        "version": VERSION,
        "library": __version__,
        "adapter": about.adapter,
        "model": about.model,
        "class": about.cls,
        "weights": specs,
        "shapes": shapes,
        "base": check_strings("base", base),
    }
    tensors = {
        f"{name}.{part}": tensor
        for name, delta in deltas.items()
        for part, tensor in tensors_of(delta).items()
    }
    record["sha256"] = _seal({**record, STRINGS: about.metadata}, tensors)
    return Content(tensors, {**about.metadata, KEY: json.dumps(record)})


def _seal(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Digest all that a file says, so that no bit of it changes unnoticed."""
    digests = {
        name: digest_of(name, tensors[name]) for name in progress(sorted(tensors), "digesting")
    }
    said = {key: value for key, value in record.items() if key != "sha256"}
    content = json.dumps([said, digests], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
