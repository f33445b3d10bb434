"""The layouts of diffusers' `pytorch_lora_weights.safetensors`, new and old: read."""

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from ...errors import FileError
from ..outline import Outline
from ..tensors import About, Config, OpenFile, Tensors, explained, strict_json
from . import factors as shared
from . import fused, peft
from .peft_config import costly_patterns, rank_and_alpha, scaling, unsupported_fields

CONFIG = "lora_adapter_metadata"
"""The key of the metadata under which PEFT's config is kept."""

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


def recognises(file: OpenFile) -> bool:
    """Say whether a file's keys are diffusers', and not PEFT's own."""
    names = file.entries
    return shared.matches_any(KEYS[:3], names) and not shared.matches_any(peft.KEYS, names)


def describe(file: OpenFile) -> tuple[Config, About]:
    """Return PEFT's config of each part, if the file carries one; older ones don't."""
    with explained(f"{file.path}: {CONFIG} can't be read as JSON"):
        fields = strict_json(file.metadata.get(CONFIG, "{}"))
    configs: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    for field, value in fields.items():
        configs[_part(field)][field.removeprefix(f"{_part(field)}.")] = value
    if complaints := [each for config in configs.values() for each in unsupported_fields(config)]:
        raise FileError(f"{file.path}: not supported: {', '.join(complaints)}")
    return configs, About(metadata={k: t for k, t in file.strings.items() if k != CONFIG})


def parse(
    tensors: Tensors, config: Config, weights: Outline, *, prefix: str = ""
) -> list[shared.Named]:
    """Read a LoRA, with PEFT's configs by the parts of a pipeline.

    The model is a UNet, transformer or text encoder, or one with children called so, as in a
    pipeline. Only keys that begin with `prefix` are read: `"unet."`, where it is only a UNet.
    """
    factors, rest = shared.group_factors(tensors, *KEYS, prefix=prefix)
    shared.refuse(f"{key} is no plain LoRA's" for key in rest)
    shared.refuse(each for part in config.values() for each in costly_patterns(part, factors))
    factors, found = fused.placed(factors, weights, fused.elsewhere(weights), _paths)

    def read(part_name: str) -> Iterator[shared.Named]:
        shared.check_plain(weight := found[part_name])
        name, pair = part_name.partition("#")[0], shared.plain(weight, factors[part_name])
        if (part := _part(name)) in config:
            rank, pair.alpha = rank_and_alpha(config[part], name.removeprefix(f"{part}."))
            pair.scaling = scaling(config[part])
            if rank != pair.rank:
                raise ValueError(f"has rank {pair.rank}, by its config {rank}")
        yield weight.name, pair

    return shared.collect(read, factors)


def _part(name: str) -> str:
    """Return which part of a pipeline a name begins with; none if it has one model's names."""
    first = name.partition(".")[0]
    return first if first in PARTS else ""


def _paths(name: str) -> Iterator[str]:
    """Yield the paths that a name can mean, in a pipeline or in one model of it."""
    name = name.replace(".processor.", ".").removesuffix("_lora")
    for path in (name, *(re.sub(*old, name) for old in OLD)):
        yield path
        if part := _part(path):
            yield path.removeprefix(f"{part}.")
