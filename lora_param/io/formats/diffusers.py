"""The layouts of diffusers' `pytorch_lora_weights.safetensors`, new and old: read.

Some models are kept in another layout too: where one has a fused layer, the other has a layer for
each part.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch

from ...errors import FileError
from ...weight import Weight
from ..outline import Outline
from ..tensors import About, Config, OpenFile, Tensors, explained, strict_json
from . import factors as shared
from . import peft
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

FLUX, FLUX_SINGLE, SD3 = "double_blocks.{}.", "single_blocks.{}.", "joint_blocks.{}."
BLOCK, SINGLE = "transformer_blocks.{}.", "single_transformer_blocks.{}."
QKV, ADDED = ("attn.to_q", "attn.to_k", "attn.to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")

LAYOUTS: tuple[tuple[tuple[str, ...], str, tuple[str, ...]], ...] = (
    ((FLUX + "img_attn.qkv", SD3 + "x_block.attn.qkv"), BLOCK, QKV),
    ((FLUX + "txt_attn.qkv", SD3 + "context_block.attn.qkv"), BLOCK + "attn.", ADDED),
    ((FLUX + "img_attn.proj", SD3 + "x_block.attn.proj"), BLOCK, ("attn.to_out.0",)),
    ((FLUX + "txt_attn.proj", SD3 + "context_block.attn.proj"), BLOCK, ("attn.to_add_out",)),
    ((FLUX + "img_mlp.0", SD3 + "x_block.mlp.fc1"), BLOCK, ("ff.net.0.proj",)),
    ((FLUX + "img_mlp.2", SD3 + "x_block.mlp.fc2"), BLOCK, ("ff.net.2",)),
    ((FLUX + "txt_mlp.0", SD3 + "context_block.mlp.fc1"), BLOCK, ("ff_context.net.0.proj",)),
    ((FLUX + "txt_mlp.2", SD3 + "context_block.mlp.fc2"), BLOCK, ("ff_context.net.2",)),
    ((FLUX + "img_mod.lin", SD3 + "x_block.adaLN_modulation.1"), BLOCK, ("norm1.linear",)),
    ((FLUX + "txt_mod.lin",), BLOCK, ("norm1_context.linear",)),
    ((FLUX_SINGLE + "linear1",), SINGLE, (*QKV, "proj_mlp")),
    ((FLUX_SINGLE + "linear2",), SINGLE, ("proj_out",)),
    ((FLUX_SINGLE + "modulation.lin",), SINGLE, ("norm.linear",)),
    ((SD3 + "x_block.attn2.qkv",), BLOCK, ("attn2.to_q", "attn2.to_k", "attn2.to_v")),
    ((SD3 + "x_block.attn2.proj",), BLOCK, ("attn2.to_out.0",)),
)
"""Layers as their authors have them and as diffusers has them, the blocks' numbers left out.

Source: diffusers' `loaders/single_file_utils.py`. Modulations whose halves it swaps aren't here.
"""


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
    factors, found = placed(factors, weights, elsewhere(weights), _paths)

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


def elsewhere(weights: Outline) -> dict[str, list[Weight]]:
    """Say which layers or blocks those of the other layout are, by their paths in that one."""
    found: dict[str, list[Weight]] = {}
    rows = [(whole, stem, parts) for wholes, stem, parts in LAYOUTS for whole in wholes]
    for whole, stem, parts in rows:
        names = [stem + part for part in parts]
        for outer, number in _numbered(whole, weights):
            blocks = _blocks(weights, outer + whole.format(number), len(names))
            pairs = zip(names, blocks, strict=False)
            found |= {outer + name.format(number): [block] for name, block in pairs}
        for outer, number in _numbered(names[0], weights):
            own = [weights.layer_weight(outer + name.format(number)) for name in names]
            layers = [each for each in own if each is not None and each.shape]
            if len(layers) == len(names):
                found[outer + whole.format(number)] = layers
    return found


def _numbered(path: str, weights: Outline) -> Iterator[tuple[str, str]]:
    """Yield what is in front of the layers of such a path, and the number in it."""
    pattern = re.compile(r"(|.*\.)" + re.escape(path).replace(r"\{\}", r"(\d+)"))
    for match in filter(None, map(pattern.fullmatch, weights.modules)):
        yield match[1], match[2]


def _blocks(weights: Outline, path: str, parts: int) -> list[Weight]:
    """List the parts of a fused layer: each as large as its input, but for a fourth, the rest."""
    weight = weights.layer_weight(path)
    if weight is None or not weight.shape or parts == 1:
        return [weight] if weight else []
    size = weight.shape[0] // 3 if parts == 3 else weight.shape[1]
    ends = ["", *(index * size for index in range(1, parts)), ""]
    blocks = (weights.weight(f"{weight.name}[{a}:{b}]") for a, b in pairwise(ends))
    return [block for block in blocks if block]


def placed(
    factors: shared.Factors,
    weights: Outline,
    elsewhere: Mapping[str, list[Weight]],
    paths: Callable[[str], Iterable[str]],
) -> tuple[shared.Factors, dict[str, Weight]]:
    """Find the weight of each name, by the paths that it can mean.

    What finds no layer here is placed part by part where the other layout has one. A part's name is
    that of the whole with `#` and its number.
    """
    own, places = dict(factors), dict[str, Weight | None]()
    for name, tensors in factors.items():
        places[name] = weights.layer_weight(*paths(name))
        parts = next((elsewhere[path] for path in paths(name) if path in elsewhere), None)
        if places[name] or not parts:
            continue
        sizes = [(part.shape or (0,))[0] for part in parts]
        if tensors.keys() - {"A", "B", "alpha"} or "B" not in tensors:
            what = "in this model's layout only a plain LoRA can be put"
            raise FileError(f"{name} has {', '.join(sorted(tensors))}, and {what}")
        if len(tensors["B"]) != sum(sizes):
            raise FileError(f"{name} has {len(tensors['B'])} outputs, and its parts here {sizes}")
        del own[name], places[name]
        blocks = torch.split(tensors["B"], sizes)
        for index, (part, B) in enumerate(zip(parts, blocks, strict=True)):
            own[f"{name}#{index}"], places[f"{name}#{index}"] = {**tensors, "B": B}, part
    return own, shared.all_found(places, weights)
