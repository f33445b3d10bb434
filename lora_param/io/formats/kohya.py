"""LoRA files of Kohya's scripts and LyCORIS, for Stable Diffusion and kin: read and written."""

import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import cast

import torch
from torch import Tensor

from ...deltas import Delta, DenseDelta, DoRA, Pair
from ...errors import FileError
from ...weight import Weight, join, tensor_names
from ..outline import Outline, class_name, is_plain
from ..tensors import About, Config, Content, OpenFile, Tensors
from . import factors as shared
from . import fused, lycoris

PARTS = (
    ("lora_unet_", "unet", "UNet"),
    ("lora_te_", "text_encoder", "CLIPText"),
    ("lora_te1_", "text_encoder", "CLIPText"),
    ("lora_te2_", "text_encoder_2", "CLIPText"),
    ("lora_te3_", "text_encoder_3", "T5Encoder"),
    ("lycoris_", "", ""),
)
"""The models of a pipeline: each one's prefix of keys, name, and what is in its class's name.

A part's modules are looked up below the model's child of that name, or else in the model.
"""

KEYS = (
    r"(?P<name>[^.]+)\.(?P<role>lora_down|lora_up)\.weight",
    r"(?P<name>[^.]+)\.(?P<role>alpha|dora_scale)",
    r"(?P<name>[^.]+)\.(?P<role>diff|diff_b|w_norm|b_norm)",
    *lycoris.KEYS,
)
DENSE, NORM = {"weight": "diff", "bias": "diff_b"}, {"weight": "w_norm", "bias": "b_norm"}
WHOLE = {role: tensor for roles in (DENSE, NORM) for tensor, role in roles.items()}
"""What the differences of a layer's and a norm's tensors are called."""

OTHERS = r".+\.oft_\w+"


def recognises(file: OpenFile) -> bool:
    """Say whether a file's keys are the family's, be they plain LoRA's or not."""
    return shared.matches_any((KEYS[0], *KEYS[2:], OTHERS), file.entries)


def parse(
    tensors: Tensors, config: Config, weights: Outline, *, prefix: str = ""
) -> list[shared.Named]:
    """Read a LoRA, another kind of LyCORIS's, and whole differences.

    Names are resolved forward from the model's own modules.

    The model is a UNet, a text encoder, any other, or one with children called `unet`,
    `text_encoder` and `text_encoder_2`. Only keys that begin with `prefix` are read.
    """
    factors, rest = shared.group_factors(tensors, *KEYS, prefix=prefix)
    flat = {name: [name] for name in factors} if weights.unknown else flat_names(weights, prefix)
    complaints = [f"{key} is of no kind that is supported" for key in rest]
    for name in factors:
        if len(several := flat.get(name, [])) > 1:
            complaints.append(f"{name} could be {' or '.join(several)}")
    shared.refuse(complaints)
    others = fused.elsewhere(weights)
    theirs = flat_names(weights, prefix, others)

    def paths(name: str) -> list[str]:
        return [*flat.get(name, []), *theirs.get(name, [])[:1]]

    factors, found = fused.placed(factors, weights, others, paths)

    def read(name: str) -> Iterator[shared.Named]:
        weight, own = found[name], factors[name]
        if own.keys() - WHOLE.keys():
            yield weight.name, lycoris.read_layer(weight, own)
        for role in own.keys() & WHOLE.keys():
            yield join(weight.path, WHOLE[role]), shared.dense(own[role])

    return shared.collect(read, factors)


def render(
    deltas: Mapping[Weight, Delta], weights: Outline, about: About, *, prefix: str = ""
) -> Content:
    """Lay a LoRA out, and what is trained whole.

    Its keys begin with `prefix`; by default what a child of the model is called, or the model's
    class, decides: `lora_unet_` for `unet` or a UNet, `lora_te_` for `text_encoder` or a CLIP; and
    `lycoris_`, the prefix for any model, for all else.
    """
    if "." in prefix:
        raise FileError(f"no name in the file can have a dot, so no prefix, got {prefix!r}")
    flat, cls = flat_names(weights, prefix), about.cls.rpartition(".")[2]

    def lay_out(weight: Weight) -> Iterator[tuple[str, Tensor]]:
        delta = deltas[weight]
        path, tensor, dense = weight.path, weight.tensor, isinstance(delta, DenseDelta)
        name, own = _flat_name(path, weights, cls, prefix), weights.layer_weight(path)
        norm = dense and own is not None and len(own.shape or ()) == 1
        able = tensor == "weight" or (dense and tensor == "bias")
        if not (path and able and (norm or is_plain(weight))):
            raise FileError(f"no place for {weight.name} of a {class_name(weight.module)}")
        if flat.get(name) != [path]:
            others = " or ".join(flat.get(name, ["another part"]))
            raise FileError(f"{name} could be {others}")
        if isinstance(delta, DenseDelta):
            yield f"{name}.{NORM[tensor] if norm else DENSE[tensor]}", delta.D.detach()
        else:
            yield from _pair(name, weight, cast("Pair", delta).plain("lora"))

    tensors = dict(shared.collect(lay_out, deltas, "written"))
    if dropped := [w.name for w, each in deltas.items() if each.numbers.get("dropout")]:
        warnings.warn(f"Kohya's files hold no dropout: {', '.join(dropped)}", stacklevel=5)
    return Content(tensors, {"format": "pt", **about.metadata})


def _pair(name: str, weight: Weight, delta: Pair) -> Iterator[tuple[str, Tensor]]:
    """Lay out the update of one layer."""
    alpha = torch.tensor(delta.alpha, dtype=torch.float32)
    if not alpha or not alpha.isfinite():
        raise FileError(f"{weight.name} has an alpha of {delta.alpha:g}, in float32 {alpha:g}")
    factors = delta.lora_A.detach(), delta.lora_B.detach()
    down, up = shared.factors_with_kernel(*factors, weight.shape)
    yield from {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}.items()
    yield f"{name}.alpha", alpha
    if isinstance(delta, DoRA):
        yield f"{name}.dora_scale", delta.magnitude.detach()


def flat_names(
    weights: Outline, prefix: str = "", paths: Iterable[str] | None = None
) -> dict[str, list[str]]:
    """Return the layers' paths, or these, by each name that they can have in a file."""
    flat: defaultdict[str, list[str]] = defaultdict(list)
    known = any(part[0] == prefix for part in PARTS)
    parts = PARTS if known or not prefix else (*PARTS, (prefix, "", ""))
    if paths is None:
        paths = [
            path for path, module in weights.modules.items() if "weight" in tensor_names(module)
        ]
    for path in paths:
        for begin, child, _ in parts:
            inside = path.removeprefix(f"{child}.")
            if inside != path or not child or child not in weights.modules:
                flat[begin + inside.replace(".", "_")].append(path)
    return dict(flat)


def _flat_name(path: str, weights: Outline, cls: str, prefix: str) -> str:
    """Return the name that a module gets: its part's, its model's, or the one that is asked for."""
    first, _, inside = path.partition(".")
    several = "text_encoder_2" in weights.modules
    for begin, child, _ in () if prefix else PARTS:
        if child == first and not (several and begin == "lora_te_"):
            return begin + inside.replace(".", "_")
    prefix = prefix or next(begin for begin, _, name in PARTS if name in cls)
    return prefix + path.replace(".", "_")
