"""LyCORIS's other kinds, read: each as plain factors, or dense where that is smaller."""

import math

import torch
from torch import Tensor

from ...deltas import Delta
from ...layers import Shape
from ...weight import Weight
from ..tensors import Tensors
from . import factors as shared

KEYS = (
    r"(?P<name>[^.]+)\.(?P<role>lora_mid)\.weight",
    r"(?P<name>[^.]+)\.(?P<role>(?:hada|lokr)_[wt][12](?:_[ab])?)",
)
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

Pair = tuple[Tensor, Tensor]
"""A matrix as `B (out, rank) @ A (rank, in * kernel)`."""


def kind_of(roles: Tensors) -> str | None:
    """Name the kind whose tensors these are; `None` for a plain LoRA's."""
    own = {role for role in roles if role in ("A", "B") or role[:5] in KINDS}
    if not (kinds := {KINDS[role[:5]] for role in own - {"A", "B"}}):
        return None
    if len(kinds) > 1 or {role[5:] or role for role in own} not in LAYOUTS[min(kinds)]:
        raise ValueError(f"has {', '.join(sorted(own))}, which are no {min(kinds)}'s")
    return min(kinds)


def plain_or_dense(kind: str, tensors: Tensors, shape: Shape | None) -> dict[str, Tensor] | Tensor:
    """Return the tensors `"A"`, `"B"` and `"alpha"` of a plain LoRA, or what is added, if smaller.

    Products are computed in float64 and kept in float32 at least, which holds those of half
    precision exactly.

    Source:
        LoHa: Hyeon-Woo et al., "FedPara", arXiv:2108.06098, proposition 1. LoKr: Yeh et al.,
        "Navigating Text-To-Image Customization", arXiv:2309.14859, section 3.
    """
    dtype = torch.promote_types(next(iter(tensors.values())).dtype, torch.float32)
    wide = {role: tensor.double() for role, tensor in tensors.items()}
    kept = {role: tensors[role] for role in ("alpha", "dora_scale") if role in tensors}
    if kind == "tucker":
        A = _through_core(wide["lora_mid"], wide["A"].flatten(1))
        return kept | {"A": _with_kernel(A.to(dtype), shape), "B": wide["B"].to(dtype)}
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
        return kept | {"A": _with_kernel(A, shape), "B": B}
    scale = wide["alpha"].item() / dim or 1.0 if "alpha" in kept else 1.0
    matrix = torch.einsum(of_matrix, B1 @ A1, B2 @ A2) * scale
    return matrix.to(dtype).reshape(shape or (fan_out, fan_in))


def _through_core(core: Tensor, down: Tensor) -> Tensor:
    """Return the inner factor of a Tucker decomposition, `[rank, in * kernel]`."""
    return torch.einsum("rs...,si->ri...", core, down).flatten(1)


def _with_kernel(A: Tensor, shape: Shape | None) -> Tensor:
    fits = shape is not None and math.prod(shape[1:]) == A.shape[1]
    return A.view(len(A), *shape[1:]) if fits and shape else A


def _factors(kind: str, tensors: Tensors) -> tuple[Pair, Pair, int]:
    """Return the two matrices, and what alpha is divided by; 0 where the scale is one all the same.

    A matrix that is whole is the product of itself and of one.
    """
    begin, pairs, dims = "hada" if kind == "loha" else "lokr", list[Pair](), [0]
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


def read_layer(weight: Weight, tensors: Tensors) -> Delta:
    """Return the update of a layer, of one of LyCORIS's kinds or a plain one."""
    shared.check_plain(weight)
    kind = kind_of(tensors)
    own = tensors if kind is None else plain_or_dense(kind, tensors, weight.shape)
    delta = shared.dense(own) if isinstance(own, Tensor) else shared.plain(weight, own)
    delta.origin = kind or ""
    return delta
