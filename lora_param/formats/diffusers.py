"""The layouts of diffusers' `pytorch_lora_weights.safetensors`, new and old: read."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import FileError
from . import layout, peft
from .pair import Pair
from .peft_config import costly, rank_and_alpha, unsupported
from .tensors import header, load_tensors, peek, strict_json

KEYS = (
    r"(?P<name>.+)\.lora_(?P<role>[AB])\.weight",
    r"(?P<name>.+?)\.lora(?:_linear_layer)?\.(?P<role>down|up)\.weight",
    r"(?P<name>.+_lora)\.(?P<role>down|up)\.weight",
    r"(?P<name>.+)\.(?P<role>alpha)",
)
OLD = (
    (r"to_out$", "to_out.0"),
    (r"to_out$", "out_proj"),
    (r"to_([qkv])$", r"\1_proj"),
)
"""What the modules behind a processor's `to_q_lora` can be called but `to_q`."""

PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


def recognises(path: Path) -> bool:
    """Say whether a file's keys are diffusers', and not PEFT's own."""
    names = peek(path).tensors
    return layout.knows(KEYS[:3], names) and not layout.knows(peft.KEYS, names)


def read(path: Path, model: nn.Module | None, *, prefix: str = "") -> list[Pair]:
    """Read a LoRA.

    Args:
        path: The file.
        model: A UNet, transformer or text encoder, or a module with children called so, as in a
            pipeline; `None` for the names in the file.
        prefix: Read only the keys that begin so: `"unet."`, where the model is only a UNet.

    Returns:
        A pair per weight.

    Raises:
        FileError: Lists the keys that are no plain LoRA's or find no module, misshapen factors,
            and fields of the file's config that can't be honoured.
    """
    tensors = {key: each for key, each in load_tensors(path).items() if key.startswith(prefix)}
    factors, rest = layout.grouped(tensors, *KEYS)
    layout.refuse(path, (f"{key} is no plain LoRA's" for key in rest))
    modules = layout.modules_of(model)
    weights = {path for path, each in modules.items() if layout.weight_of(each) is not None}
    places = {
        name: next((each for each in _paths(name) if model is None or each in weights), None)
        for name in factors
    }
    pairs = layout.paired(path, factors, places, model)
    said = _said(path, factors)
    layout.refuse(
        path,
        (
            f"{name} has rank {pair.rank}, by its config {said[name][0]}"
            for name, pair in zip(factors, pairs, strict=True)
            if name in said and said[name][0] != pair.rank
        ),
    )
    return [
        replace(pair, alpha=said[name][1]) if name in said else pair
        for name, pair in zip(factors, pairs, strict=True)
    ]


def _said(path: Path, names: Collection[str]) -> dict[str, tuple[int, float]]:
    """Return each rank and alpha by PEFT's config, if the file carries one; older ones don't."""
    try:
        fields = strict_json(header(path).metadata.get(layout.CONFIG, "{}"))
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: {layout.CONFIG} is no JSON: {error}") from None
    if not isinstance(fields, dict):
        raise FileError(f"{path}: {layout.CONFIG} is no JSON object")
    configs: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    for field, value in fields.items():
        configs[_part(field)][field.removeprefix(f"{_part(field)}.")] = value
    checks = [each for config in configs.values() for each in unsupported(config)]
    layout.refuse(path, checks or (e for config in configs.values() for e in costly(config, names)))
    return {
        name: rank_and_alpha(configs[_part(name)], name.removeprefix(f"{_part(name)}."))
        for name in names
        if _part(name) in configs
    }


def _part(name: str) -> str:
    """Return which part of a pipeline a name begins with; none if it has one model's names."""
    first = name.partition(".")[0]
    return first if first in PARTS else ""


def _paths(name: str) -> Iterator[str]:
    """Yield the paths that a name can mean, in a pipeline or in one model of it."""
    name = name.replace(".processor.", ".").removesuffix("_lora")
    for each in (name, *(re.sub(*old, name) for old in OLD)):
        yield each
        if part := _part(each):
            yield each.removeprefix(f"{part}.")
