"""LoRA files of Kohya's scripts and LyCORIS, for Stable Diffusion and kin: read and written."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import FileError
from ..surgery import original_of
from . import layout
from .pair import About, Pair
from .tensors import load_tensors, peek, save_tensors


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


def recognises(path: Path) -> bool:
    """Say whether a file's keys are the family's, be they plain LoRA's or not."""
    return layout.knows((KEYS[0], OTHERS), peek(path).tensors)


def read(path: Path, model: nn.Module | None, *, prefix: str = "") -> list[Pair]:
    """Read a LoRA; its names are resolved forward from the model's own modules.

    Args:
        path: The file.
        model: A UNet, a text encoder, any other model, or a module with children called `unet`,
            `text_encoder` and `text_encoder_2`; `None` for the names in the file.
        prefix: Read only the keys that begin so: `"lora_unet_"`, where the model is only a UNet.

    Returns:
        A pair per weight.

    Raises:
        FileError: Lists the keys that are no plain LoRA's, find no module or could be several, and
            misshapen factors.
    """
    tensors = {key: each for key, each in load_tensors(path).items() if key.startswith(prefix)}
    factors, rest = layout.grouped(tensors, *KEYS)
    flat = flat_names(model, prefix) if model is not None else {name: [name] for name in factors}
    complaints = [f"{key} is no plain LoRA's, which is all that is supported" for key in rest]
    for name in factors:
        if len(paths := flat.get(name, [])) > 1:
            complaints.append(f"{name} could be {' or '.join(paths)}")
    layout.refuse(path, complaints)
    places = {name: flat[name][0] if name in flat else None for name in factors}
    return layout.paired(path, factors, places, model)


def write(
    path: Path, pairs: Sequence[Pair], model: nn.Module, about: About, *, prefix: str = ""
) -> None:
    """Write a LoRA.

    Args:
        path: The file.
        pairs: The updates to write.
        model: The model that they belong to.
        about: Has the metadata.
        prefix: What the keys begin with; by default what a child of the model is called, or the
            model's class, decides: `lora_unet_` for `unet` or a UNet, `lora_te_` for `text_encoder`
            or a CLIP; and `lycoris_`, the prefix for any model, for all else.

    Raises:
        FileError: Lists the weights that the format has no place for, or the prefix has a dot.
    """
    if "." in prefix:
        raise FileError(f"{path}: no name in the file can have a dot, so no prefix, got {prefix!r}")
    modules, flat, complaints = layout.modules_of(model), flat_names(model, prefix), []
    tensors: dict[str, Tensor] = {}
    for pair in pairs:
        module_path, _, tensor = pair.weight.rpartition(".")
        module = modules[module_path]
        name = _flat_name(module_path, model, about.cls.rpartition(".")[2], prefix)
        if not isinstance(module, layout.LAYERS) or tensor != "weight" or not module_path:
            complaints.append(f"no place for {pair.weight} of a {type(module).__name__}")
            continue
        if flat.get(name) != [module_path]:
            complaints.append(f"{name} could be {' or '.join(flat.get(name, ['another part']))}")
        alpha = torch.tensor(pair.alpha, dtype=torch.float32)
        if not alpha or not alpha.isfinite():
            complaints.append(f"{pair.weight} has an alpha of {pair.alpha:g}, in float32 {alpha:g}")
        down, up = layout.unflattened(pair.lora_A, pair.lora_B, original_of(module, tensor))
        tensors |= {
            f"{name}.lora_down.weight": down,
            f"{name}.lora_up.weight": up,
            f"{name}.alpha": alpha,
        }
    layout.refuse(path, complaints, "written")
    save_tensors(path, tensors, {"format": "pt", **about.metadata})


def flat_names(model: nn.Module, prefix: str = "") -> dict[str, list[str]]:
    """Return the layers' paths by each name that they can have in a file."""
    flat: defaultdict[str, list[str]] = defaultdict(list)
    known = any(part.prefix == prefix for part in PARTS)
    parts = PARTS if known or not prefix else (*PARTS, Part(prefix, "", ""))
    for path, module in layout.modules_of(model).items():
        for part in parts if isinstance(module, layout.LAYERS) else ():
            inside = path.removeprefix(f"{part.child}.")
            if inside != path or part.child not in model._modules:
                flat[part.prefix + inside.replace(".", "_")].append(path)
    return dict(flat)


def _flat_name(path: str, model: nn.Module, cls: str, prefix: str) -> str:
    """Return the name that a module gets: its part's, its model's, or the one that is asked for."""
    child, _, inside = path.partition(".")
    several = "text_encoder_2" in model._modules
    for part in () if prefix else PARTS:
        if part.child == child and not (several and part.prefix == "lora_te_"):
            return part.prefix + inside.replace(".", "_")
    prefix = prefix or next(part.prefix for part in PARTS if part.cls in cls)
    return prefix + path.replace(".", "_")
