"""LoRA files of Kohya's scripts and LyCORIS, for Stable Diffusion and kin: read and written.

LyCORIS's other kinds are read as plain factors, or dense where that is smaller.
"""

import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import cast

import torch
from torch import Tensor

from ...deltas import Delta, DenseDelta, DoRA, Pair
from ...errors import FileError
from ...layers import Shape
from ...weight import Weight, join, tensor_names
from ..outline import Outline, class_name, is_plain
from ..tensors import About, Config, Content, OpenFile, Tensors
from . import diffusers
from . import factors as shared

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
    r"(?P<name>[^.]+)\.(?P<role>lora_down|lora_up|lora_mid)\.weight",
    r"(?P<name>[^.]+)\.(?P<role>alpha|dora_scale)",
    r"(?P<name>[^.]+)\.(?P<role>diff|diff_b|w_norm|b_norm)",
    r"(?P<name>[^.]+)\.(?P<role>(?:hada|lokr)_[wt][12](?:_[ab])?)",
)
DENSE, NORM = {"weight": "diff", "bias": "diff_b"}, {"weight": "w_norm", "bias": "b_norm"}
WHOLE = {role: tensor for roles in (DENSE, NORM) for tensor, role in roles.items()}
"""What the differences of a layer's and a norm's tensors are called."""

OTHERS = r".+\.oft_\w+"

KINDS = {"hada_": "loha", "lokr_": "lokr", "lora_": "tucker"}
LAYOUTS = {
    "loha": ({"w1_a", "w1_b", "w2_a", "w2_b"}, {"w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"}),
    "lokr": tuple(
        one | two
        for one in ({"w1"}, {"w1_a", "w1_b"})
        for two in ({"w2"}, {"w2_a", "w2_b"}, {"w2_a", "w2_b", "t2"})
    ),
    "tucker": ({"A", "B", "mid"},),
}
"""Which tensors a kind has, in each of its layouts, without what they begin with."""

PRODUCTS = {
    "loha": ("oi,oi->oi", "oa,ob->oab", "ai,bi->abi"),
    "lokr": ("oi,pj->opij", "oa,pb->opab", "ai,bj->abij"),
}
"""A kind's product of two matrices, and of their factors B and A."""

LARGEST = 2**31  # elements: a file of a few bytes may mean any number

Product = tuple[Tensor, Tensor]
"""A matrix as `B (out, rank) @ A (rank, in * kernel)`."""


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
    others = diffusers.elsewhere(weights)
    theirs = flat_names(weights, prefix, others)

    def paths(name: str) -> list[str]:
        return [*flat.get(name, []), *theirs.get(name, [])[:1]]

    factors, found = diffusers.placed(factors, weights, others, paths)

    def read(name: str) -> Iterator[shared.Named]:
        weight, own = found[name], factors[name]
        if own.keys() - WHOLE.keys():
            yield weight.name, _read_layer(weight, own)
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


def _kind_of(roles: Tensors) -> str | None:
    """Name the kind whose tensors these are; `None` for a plain LoRA's."""
    own = {role for role in roles if role in ("A", "B") or role[:5] in KINDS}
    if not (kinds := {KINDS[role[:5]] for role in own - {"A", "B"}}):
        return None
    if len(kinds) > 1 or {role[5:] or role for role in own} not in LAYOUTS[min(kinds)]:
        raise ValueError(f"has {', '.join(sorted(own))}, which are no {min(kinds)}'s")
    return min(kinds)


def _plain_or_dense(kind: str, tensors: Tensors, weight: Weight) -> Delta:
    """Return the plain LoRA, or where that is smaller the dense delta, that a kind amounts to.

    Products are computed in float64 and kept in float32 at least, which holds those of half
    precision exactly.

    Source:
        LoHa: Hyeon-Woo et al., "FedPara", arXiv:2108.06098, proposition 1. LoKr: Yeh et al.,
        "Navigating Text-To-Image Customization", arXiv:2309.14859, section 3.
    """
    dtype = torch.promote_types(next(iter(tensors.values())).dtype, torch.float32)
    wide, shape = {role: tensor.double() for role, tensor in tensors.items()}, weight.shape
    kept = {role: tensors[role] for role in ("alpha", "dora_scale") if role in tensors}
    if kind == "tucker":
        A = _through_core(wide["lora_mid"], wide["A"].flatten(1))
        kept |= {"A": _with_kernel(A.to(dtype), shape), "B": wide["B"].to(dtype)}
        return shared.plain(weight, kept)
    (B1, A1), (B2, A2), dim = _factors(kind, wide)
    rank, fan_out, fan_in = len(A1) * len(A2), len(B1), A1.shape[1]
    if kind == "lokr":
        fan_out, fan_in = fan_out * len(B2), fan_in * A2.shape[1]
    if shape is not None and (fan_out, fan_in) != (shape[0], math.prod(shape[1:])):
        raise ValueError(f"is a {kind} of {fan_out}x{fan_in} for a weight of {shape}")
    size = rank * (fan_out + fan_in)
    if min(size, fan_out * fan_in) > LARGEST:
        raise ValueError(f"is a {kind} of {fan_out}x{fan_in}, which is too large to be a weight's")
    if not dim:
        kept.pop("alpha", None)
    of_matrix, of_B, of_A = PRODUCTS[kind]
    if size < fan_out * fan_in or "dora_scale" in kept:  # which scales a sum, so its two parts
        if "alpha" in kept:
            kept["alpha"] = wide["alpha"] * (rank / dim)
        A = torch.einsum(of_A, A1, A2).reshape(rank, fan_in).to(dtype)
        B = torch.einsum(of_B, B1, B2).reshape(fan_out, -1).to(dtype)
        return shared.plain(weight, kept | {"A": _with_kernel(A, shape), "B": B})
    scale = wide["alpha"].item() / dim or 1.0 if "alpha" in kept else 1.0
    matrix = torch.einsum(of_matrix, B1 @ A1, B2 @ A2) * scale
    return shared.dense(matrix.to(dtype).reshape(shape or (fan_out, fan_in)))


def _through_core(core: Tensor, down: Tensor) -> Tensor:
    """Return the inner factor of a Tucker decomposition, `[rank, in * kernel]`."""
    return torch.einsum("rs...,si->ri...", core, down).flatten(1)


def _with_kernel(A: Tensor, shape: Shape | None) -> Tensor:
    fits = shape is not None and math.prod(shape[1:]) == A.shape[1]
    return A.view(len(A), *shape[1:]) if fits and shape else A


def _factors(kind: str, tensors: Tensors) -> tuple[Product, Product, int]:
    """Return the two matrices, and what alpha is divided by; 0 where the scale is one all the same.

    A matrix that is whole is the product of itself and of one.
    """
    begin, pairs, dims = "hada" if kind == "loha" else "lokr", list[Product](), [0]
    for name, core in ((f"{begin}_w{n}", f"{begin}_t{n}") for n in (1, 2)):
        if name in tensors:
            whole = tensors[name].flatten(1)
            eye = torch.eye(min(whole.shape), dtype=whole.dtype)
            pairs.append((whole, eye) if len(eye) == whole.shape[1] else (eye, whole))
            continue
        B, A = tensors[f"{name}_a"], tensors[f"{name}_b"].flatten(1)
        pairs.append((B.T, _through_core(tensors[core], A)) if core in tensors else (B, A))
        dims.append(len(pairs[-1][1]))
    one, two = pairs
    return one, two, (dims[1:] or dims)[0]


def _read_layer(weight: Weight, tensors: Tensors) -> Delta:
    """Return the update of a layer, of one of LyCORIS's kinds or a plain one."""
    shared.check_plain(weight)
    if (kind := _kind_of(tensors)) is None:
        return shared.plain(weight, tensors)
    delta = _plain_or_dense(kind, tensors, weight)
    delta.origin = kind
    return delta
