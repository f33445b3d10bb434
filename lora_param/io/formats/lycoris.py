"""LyCORIS's other kinds, read: each as plain factors, or dense where that is smaller."""

import math
from typing import NamedTuple

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


class Update(NamedTuple):
    """The product of two matrices, elementwise or of Kronecker, times `alpha / dim`."""

    kind: str
    one: Pair
    two: Pair
    dim: int  # 0 where it has a scale of one, whatever alpha says

    @property
    def shape(self) -> Shape:
        """That of the matrix."""
        (B1, A1), (B2, A2) = self.one, self.two
        if self.kind == "lokr":
            return B1.shape[0] * B2.shape[0], A1.shape[1] * A2.shape[1]
        return B1.shape[0], A1.shape[1]

    @property
    def rank(self) -> int:
        """That of the pair that it amounts to."""
        return len(self.one[1]) * len(self.two[1])

    def pair(self) -> Pair:
        """Return plain factors of it, exact but for the rounding of one product an element."""
        (B1, A1), (B2, A2), (_, of_B, of_A) = self.one, self.two, PRODUCTS[self.kind]
        B = torch.einsum(of_B, B1, B2).reshape(self.shape[0], -1)
        return B, torch.einsum(of_A, A1, A2).reshape(self.rank, -1)

    def matrix(self) -> Tensor:
        """Return it as a matrix."""
        one, two = self.one[0] @ self.one[1], self.two[0] @ self.two[1]
        return torch.einsum(PRODUCTS[self.kind][0], one, two).reshape(self.shape)


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
    if kind == "loha":
        one, two = (_side(wide, f"hada_w{n}", f"hada_t{n}") for n in (1, 2))
        update = Update("loha", one, two, len(wide["hada_w1_b"]))
    else:
        update = _lokr(wide)
    (fan_out, fan_in), rank = update.shape, update.rank
    if shape is not None and (fan_out, fan_in) != (shape[0], math.prod(shape[1:])):
        raise ValueError(f"is a {kind} of {fan_out}x{fan_in} for a weight of {shape}")
    size = rank * (fan_out + fan_in)
    if min(size, fan_out * fan_in) > LARGEST:
        raise ValueError(f"is a {kind} of {fan_out}x{fan_in}, which is too large to be a weight's")
    if not update.dim:
        kept.pop("alpha", None)
    if size < fan_out * fan_in or "dora_scale" in kept:  # which scales a sum, so its two parts
        if "alpha" in kept:
            kept["alpha"] = wide["alpha"] * (rank / update.dim)
        B, A = update.pair()
        return kept | {"A": _with_kernel(A.to(dtype), shape), "B": B.to(dtype)}
    scale = wide["alpha"].item() / update.dim or 1.0 if "alpha" in kept else 1.0
    return (update.matrix() * scale).to(dtype).reshape(shape or update.shape)


def _through_core(core: Tensor, down: Tensor) -> Tensor:
    """Return the inner factor of a Tucker decomposition, `[rank, in * kernel]`."""
    return torch.einsum("rs...,si->ri...", core, down).flatten(1)


def _with_kernel(A: Tensor, shape: Shape | None) -> Tensor:
    fits = shape is not None and math.prod(shape[1:]) == A.shape[1]
    return A.view(len(A), *shape[1:]) if fits and shape else A


def _side(tensors: Tensors, name: str, core: str) -> Pair:
    a, b = tensors[f"{name}_a"], tensors[f"{name}_b"].flatten(1)
    return (a.T, _through_core(tensors[core], b)) if core in tensors else (a, b)


def _lokr(tensors: Tensors) -> Update:
    sides, dims = [], []
    for name, core in (("lokr_w1", "none"), ("lokr_w2", "lokr_t2")):
        if name in tensors:
            whole = tensors[name].flatten(1)
            fan_out, fan_in = whole.shape
            eye = torch.eye(min(fan_out, fan_in), dtype=whole.dtype)
            sides.append((whole, eye) if fan_in <= fan_out else (eye, whole))
        else:
            sides.append(_side(tensors, name, core))
            dims.append(len(sides[-1][1]))
    one, two = sides
    return Update("lokr", one, two, dims[0] if dims else 0)


def read_layer(weight: Weight, tensors: Tensors) -> Delta:
    """Return the update of a layer, of one of LyCORIS's kinds or a plain one."""
    shared.check_plain(weight)
    kind = kind_of(tensors)
    own = tensors if kind is None else plain_or_dense(kind, tensors, weight.shape)
    delta = shared.dense(own) if isinstance(own, Tensor) else shared.plain(weight, own)
    delta.origin = kind or ""
    return delta
