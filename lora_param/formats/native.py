"""Our own file: safetensors whose metadata say how to register it, and on which base."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..base import base_parameters, digest_of, fingerprint
from ..errors import FileError
from ..progress import progress
from ..surgery import template_of
from ..targets import catalogue
from .pair import About, Pair, check_strings
from .skeleton import described
from .tensors import header, load_tensors, peek, save_tensors, strict_json

KEY = "lora_param"
VERSION = 1
SCALE = "alpha / rank"

TEXTS = ("library", "scale", "adapter", "model", "class", "sha256")
FIELDS = dict.fromkeys(TEXTS, str) | {"weights": dict, "shapes": dict, "base": dict}
WEIGHT_FIELDS = {"rank": int, "alpha": float, "layer": dict}
"""What our metadata hold, and what they hold of each weight."""


def recognises(path: Path) -> bool:
    """Say whether a file is one of ours, whatever its version."""
    return KEY in peek(path).metadata


def read(path: Path, model: nn.Module | None = None) -> list[Pair]:
    """Read our own file, which has the weights' own names, and check every bit against its seal.

    Raises:
        FileError: The file is damaged, or of a version that this release doesn't know.
    """
    record, tensors = _record(path), load_tensors(path)
    weights: dict[str, dict[str, Any]] = record["weights"]
    wanted = [f"{name}.{factor}" for name in weights for factor in ("lora_A", "lora_B")]
    complaints = [f"missing: {name}" for name in wanted if name not in tensors]
    complaints += [f"unexpected: {name}" for name in tensors.keys() - set(wanted)]
    if not complaints and record["sha256"] != _seal(header(path).metadata, record, tensors):
        complaints.append("its bytes aren't those that were saved")
    if complaints:
        raise FileError(f"{path}: a damaged adapter file: {'; '.join(complaints[:10])}")
    pairs = [
        Pair(name, tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"], each["alpha"])
        for name, each in weights.items()
    ]
    for pair in pairs:
        said, (*rows, rank) = weights[pair.weight], pair.lora_B.shape or (0,)
        size = math.prod((*rows, *pair.lora_A.shape[-1:]))
        shape = record["shapes"].get(pair.weight, ())
        if said["rank"] != rank or math.prod(shape) != size:
            raise FileError(f"{path}: {pair.weight}: its factors aren't of the rank and shape said")
    return pairs


def about(path: Path) -> About:
    """Return what our own file says besides its pairs."""
    record = _record(path)
    return About(
        record["adapter"],
        record["model"],
        record["class"],
        record["base"],
        {name: tuple(shape) for name, shape in record["shapes"].items()},
        {name: each["layer"] for name, each in record["weights"].items()},
        {key: value for key, value in header(path).metadata.items() if key != KEY},
    )


def write(
    path: Path,
    pairs: list[Pair],
    model: nn.Module,
    about: About,
    *,
    base: Mapping[str, str] | None = None,
) -> None:
    """Write our own file; `base` is what `fingerprint(model)` returned, or `None` to take it now.

    Raises:
        LoRAError: The base isn't strings.
    """
    base = fingerprint(model) if base is None else check_strings("base", base)
    from .. import __version__  # the package imports this module

    weights = {weight.name: weight for weight in catalogue(model)}
    record: dict[str, Any] = {
        "version": VERSION,
        "library": __version__,
        "scale": SCALE,
        "adapter": about.adapter,
        "model": about.model,
        "class": about.cls,
        "weights": {
            pair.weight: {
                "rank": pair.rank,
                "alpha": float(pair.alpha),
                "layer": described(owner.module),
            }
            for pair in pairs
            for owner in [weights[pair.weight]]
        },
        "shapes": {
            name: list(tensor.shape)
            for name, _, _, tensor in base_parameters(model)
            if not is_lazy(tensor) and "parametrizations" not in name.split(".")
        },
        "base": base,
    }
    for pair in pairs:  # what others parametrize in front has no original of that name
        owner = weights[pair.weight]
        shape = template_of(owner.module, owner.tensor).shape
        record["shapes"][pair.weight] = list(shape)
    tensors = {
        f"{pair.weight}.{factor}": getattr(pair, factor)
        for pair in pairs
        for factor in ("lora_A", "lora_B")
    }
    record["sha256"] = _seal(about.metadata, record, tensors)
    save_tensors(path, tensors, {**about.metadata, KEY: json.dumps(record)})


def _seal(
    metadata: Mapping[str, str], record: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> str:
    """Digest all that a file says, so that no bit of it changes unnoticed."""
    digests = {
        name: digest_of(name, tensors[name]) for name in progress(sorted(tensors), "digesting")
    }
    others = {key: value for key, value in metadata.items() if key != KEY}
    said = {key: value for key, value in record.items() if key != "sha256"}
    content = json.dumps([others, said, digests], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _record(path: Path) -> dict[str, Any]:
    try:
        record = strict_json(header(path).metadata[KEY])
        version = record["version"]
        if type(version) is int and version > VERSION:
            raise FileError(
                f"{path}: written in version {version} of the format, and this release of "
                f"lora_param knows versions up to {VERSION}; update it"
            )
        faults = [key for key, kind in FIELDS.items() if type(record[key]) is not kind]
        faults += [
            f"{key} of {name:.80}"
            for name, each in record["weights"].items()
            for key, kind in WEIGHT_FIELDS.items()
            if type(each[key]) is not kind
        ]
        faults += [
            f"shape of {name:.80}"
            for name, shape in record["shapes"].items()
            if type(shape) is not list or {*map(type, shape)} - {int} or len(shape) > 64
        ]
        faults += [name for name, found in record["base"].items() if type(found) is not str]
        faults += [] if version == VERSION and record["scale"] == SCALE else ["version or scale"]
    except FileError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        faults = [f"{type(error).__name__} {error!s:.200}"]
    if faults:
        raise FileError(f"{path}: damaged metadata: {', '.join(faults[:10])}")
    checked: dict[str, Any] = record
    return checked
