"""Our own file: safetensors whose metadata say what each delta is, and of which base."""

import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from ...deltas import KINDS, Delta
from ...deltas.protocol import tensors_of
from ...errors import FileError
from ...frozen import digest_of
from ...progress import progress
from ...rows import split_rows
from ...weight import Weight
from ..outline import Outline, facts_of
from ..tensors import LONGEST_NAME, About, Config, Content, OpenFile, check_strings, strict_json
from .factors import Named

KEY, VERSION = "lora_param", 1
STRING_FIELDS = ("library", "adapter", "model", "class", "sha256")
STRINGS = "metadata"
"""Under what a record that was read has the strings of whoever saved it."""

SPEC = {"kind": str, "numbers": dict, "rows": str}


def _are_sizes(value: Any) -> bool:
    whole = type(value) is list and len(value) <= 64 and not {*map(type, value)} - {int}
    return whole and min(value, default=0) >= 0 and math.prod(value) < 2**60


FIELDS: dict[str, Callable[[Any], bool]] = {
    "weights": lambda spec: {n: type({"rows": "", **spec}[n]) for n in SPEC} == SPEC,
    "layers": lambda facts: type(facts) is dict,
    "shapes": _are_sizes,
    "base": lambda digest: type(digest) is str,
}
"""What our metadata hold by names, and what is sound there; of each weight its kind, its numbers,
if it is a block its rows, and a strength that isn't 1."""


def recognises(file: OpenFile) -> bool:
    """Say whether a file is one of ours, whatever its version."""
    return KEY in file.metadata


def describe(file: OpenFile) -> tuple[Config, About]:
    """Return the record in our metadata, checked, with the other strings; and what it says."""
    strings = dict(file.metadata)
    try:
        record = strict_json(strings.pop(KEY))
        version = record["version"]
        newer = type(version) is int and version > VERSION
        faults = [] if newer else list(_faults(record))
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        newer, faults = False, [f"{type(error).__name__} {error!s:.200}"]
    if newer:
        raise FileError(
            f"{file.path}: written in version {version} of the format, and this release of "
            f"lora_param knows versions up to {VERSION}; update it"
        )
    if faults:
        raise FileError(f"{file.path}: damaged metadata: {', '.join(faults[:10])}")
    names = ("adapter", "model", "class", "base", "shapes", "layers")
    said: Any = [*map(record.get, names), strings]
    return record | {STRINGS: strings}, About(*said)


def _faults(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield which parts of a record aren't of the types that they have to be."""
    if record["version"] != VERSION:
        yield "version"
    yield from (field for field in STRING_FIELDS if type(record[field]) is not str)
    for field, is_sound in FIELDS.items():
        for name, said in record[field].items():
            if len(name) > LONGEST_NAME or not is_sound(said):
                yield f"{field} of {name:.80}"


def parse(tensors: Mapping[str, Tensor], config: Config, weights: Outline) -> list[Named]:
    """Read our own file, which has the weights' own names, and check every bit against its seal."""
    specs: dict[str, dict[str, Any]] = config["weights"]
    if unknown := [name for name, spec in specs.items() if spec["kind"] not in KINDS]:
        kind = specs[unknown[0]]["kind"]
        raise FileError(f"{unknown[0]}: this release knows no kind {kind!r:.40}; update it")
    own: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        owner, _, part = name.rpartition(".")
        own[owner][part] = tensor
    faults = [f"unexpected: {name}" for name in tensors if name.rpartition(".")[0] not in specs]
    if not faults and config["sha256"] != _seal(config, tensors):
        faults.append("its bytes aren't those that were saved")
    deltas = []
    for name, spec in {} if faults else specs.items():
        try:
            deltas.append((_name(name, spec.get("rows")), _restored(own[name], spec)))
        except KeyError as error:
            faults.append(f"missing: {name}.{error.args[0]}")
        except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
            faults.append(f"{name}: {error}")
    if faults:
        raise FileError(f"a damaged adapter file: {'; '.join(faults[:10])}")
    return deltas


def _name(key: str, rows: str | None) -> str:
    """Return a weight's name, in whose key a number can stand for long rows."""
    numbered = re.fullmatch(r"(.*)\[\d+\]", key, re.DOTALL) if rows else None
    name = f"{numbered[1]}[{rows}]" if numbered else key
    if (own := split_rows(name)[1]) != rows:
        raise ValueError(f"its rows are [{rows or ':':.80}], by its name [{own or ':'}]")
    return name


def _restored(tensors: Mapping[str, Tensor], spec: Mapping[str, Any]) -> Delta:
    """Build one weight's delta; what its kind doesn't know must not go unheard."""
    delta = KINDS[spec["kind"]].restore(tensors, spec["numbers"])
    unknown = tensors.keys() - tensors_of(delta).keys()
    if unknown := unknown | spec["numbers"].keys() - delta.numbers.keys():
        raise FileError(f"unexpected: {min(unknown):.80}")
    delta.strength = spec.get("strength", 1.0)
    return delta


def render(
    deltas: Mapping[Weight, Delta], weights: Outline, about: About, *, base: Config | None = None
) -> Content:
    """Lay out our own file.

    `base` is what `fingerprint(model)` returned; `None` for what is known, or else to take it now.
    """
    if base is None:
        base = about.base or {name: digest_of(name, t) for name, t in weights.tensors.items()}
    from ... import __version__  # the package imports this module

    specs, tensors = dict[str, dict[str, Any]](), dict[str, Tensor]()
    for weight, delta in deltas.items():
        name = weight.name
        spec: dict[str, Any] = {"kind": delta.kind, "numbers": delta.numbers}
        if delta.strength != 1:
            spec["strength"] = delta.strength
        if delta.rows is not None:
            spec["rows"] = str(delta.rows)
            if len(name) > LONGEST_NAME / 2:  # of many rows, whose block gets a number
                name = f"{name.removesuffix(f'[{delta.rows}]')}[{len(specs)}]"
        specs[name] = spec
        tensors |= {f"{name}.{part}": tensor for part, tensor in tensors_of(delta).items()}
    layers = {weight.path: facts_of(weight.module) for weight in deltas}
    record = {
        "version": VERSION,
        "library": __version__,
        "adapter": about.adapter,
        "model": about.model,
        "class": about.cls,
        "weights": specs,
        "layers": {path: facts for path, facts in layers.items() if facts},
        "shapes": {n: each.shape for n, each in weights.weights.items() if each.shape is not None},
        "base": check_strings("base", base),
    }
    record["sha256"] = _seal({**record, STRINGS: about.metadata}, tensors)
    return Content(tensors, {**about.metadata, KEY: json.dumps(record)})


def _seal(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Digest all that a file says, so that no bit of it changes unnoticed."""
    names = progress(sorted(tensors), "digesting")
    digests = {name: digest_of(name, tensors[name]) for name in names}
    said = {key: value for key, value in record.items() if key != "sha256"}
    return hashlib.sha256(json.dumps([said, digests], sort_keys=True).encode()).hexdigest()
