"""LoRA files of Kohya's scripts and LyCORIS, for Stable Diffusion and kin: read and written."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ...deltas import LoRAParametrization
from ...errors import FileError
from ..content import About, Config, Content, OpenFile
from ..outline import Outline
from . import factors as shared


class Part(NamedTuple):
    """One model of a pipeline: its keys' prefix, its name there, and what its class is called."""

    prefix: str
    child: str
    cls: str


PARTS = (
    Part("lora_unet_", "unet", "UNet"),
    Part("lora_te_", "text_encoder", "CLIPText"),
    Part("lora_te1_", "text_encoder", "CLIPText"),
    Part("lora_te2_", "text_encoder_2", "CLIPText"),
    Part("lora_te3_", "text_encoder_3", "T5Encoder"),
    Part("lycoris_", "", ""),
)
"""A part's modules are looked up below the model's child of that name, or else in the model."""

KEYS = (
    r"(?P<name>[^.]+)\.(?P<role>lora_down|lora_up)\.weight",
    r"(?P<name>[^.]+)\.(?P<role>alpha)",
)
OTHERS = r".+\.(lora_mid\.weight|hada_\w+|lokr_\w+|oft_\w+|dora_scale)"


def recognises(file: OpenFile) -> bool:
    """Say whether a file's keys are the family's, be they plain LoRA's or not."""
    return shared.matches_any((KEYS[0], OTHERS), file.header.tensors)


def parse(
    tensors: Mapping[str, Tensor], config: Config, weights: Outline, *, prefix: str = ""
) -> list[tuple[str, LoRAParametrization]]:
    """Read a LoRA; its names are resolved forward from the model's own modules.

    The model is a UNet, a text encoder, any other, or one with children called `unet`,
    `text_encoder` and `text_encoder_2`. Only keys that begin with `prefix` are read.
    """
    chosen = {key: tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    factors, rest = shared.group_factors(chosen, *KEYS)
    flat = {name: [name] for name in factors} if weights.unknown else flat_names(weights, prefix)
    complaints = [f"{key} is no plain LoRA's, which is all that is supported" for key in rest]
    for name in factors:
        if len(several := flat.get(name, [])) > 1:
            complaints.append(f"{name} could be {' or '.join(several)}")
    shared.refuse(complaints)
    paths = {name: flat[name][0] if name in flat else None for name in factors}
    return shared.read_layers(factors, paths, weights, shared.plain_factors)


def render(
    deltas: shared.LoRADeltas, weights: Outline, about: About, *, prefix: str = ""
) -> Content:
    """Lay a LoRA out.

    Its keys begin with `prefix`; by default what a child of the model is called, or the model's
    class, decides: `lora_unet_` for `unet` or a UNet, `lora_te_` for `text_encoder` or a CLIP; and
    `lycoris_`, the prefix for any model, for all else.
    """
    if "." in prefix:
        raise FileError(f"no name in the file can have a dot, so no prefix, got {prefix!r}")
    flat, complaints, tensors = flat_names(weights, prefix), list[str](), dict[str, Tensor]()
    for weight_name, delta in deltas.items():
        path, _, tensor = weight_name.rpartition(".")
        module, weight = weights.modules[path], weights.weights[weight_name]
        name = _flat_name(path, weights, about.cls.rpartition(".")[2], prefix)
        if not module.is_plain or tensor != "weight" or not path:
            complaints.append(f"no place for {weight_name} of a {module.class_name}")
            continue
        if flat.get(name) != [path]:
            complaints.append(f"{name} could be {' or '.join(flat.get(name, ['another part']))}")
        alpha = torch.tensor(delta.alpha, dtype=torch.float32)
        if not alpha or not alpha.isfinite():
            complaints.append(
                f"{weight_name} has an alpha of {delta.alpha:g}, in float32 {alpha:g}"
            )
        down, up = shared.factors_with_kernel(*shared.factors_of(delta), weight.shape)
        keys = (f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha")
        tensors |= zip(keys, (down, up, alpha), strict=True)
    shared.refuse(complaints, "written")
    if dropped := [name for name, delta in deltas.items() if delta.dropout]:
        warnings.warn(f"Kohya's files hold no dropout: {', '.join(dropped)}", stacklevel=5)
    return tensors, {"format": "pt", **about.metadata}, None


def _children(weights: Outline) -> set[str]:
    return {path.partition(".")[0] for path in weights.modules}


def flat_names(weights: Outline, prefix: str = "") -> dict[str, list[str]]:
    """Return the layers' paths by each name that they can have in a file."""
    flat: defaultdict[str, list[str]] = defaultdict(list)
    children, known = _children(weights), any(part.prefix == prefix for part in PARTS)
    parts = PARTS if known or not prefix else (*PARTS, Part(prefix, "", ""))
    for path, module in weights.modules.items():
        for part in parts if module.is_plain else ():
            inside = path.removeprefix(f"{part.child}.")
            if inside != path or not part.child or part.child not in children:
                flat[part.prefix + inside.replace(".", "_")].append(path)
    return dict(flat)


def _flat_name(path: str, weights: Outline, cls: str, prefix: str) -> str:
    """Return the name that a module gets: its part's, its model's, or the one that is asked for."""
    child, _, inside = path.partition(".")
    several = "text_encoder_2" in _children(weights)
    for part in () if prefix else PARTS:
        if part.child == child and not (several and part.prefix == "lora_te_"):
            return part.prefix + inside.replace(".", "_")
    prefix = prefix or next(part.prefix for part in PARTS if part.cls in cls)
    return prefix + path.replace(".", "_")
