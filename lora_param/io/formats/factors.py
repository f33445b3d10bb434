"""What foreign formats share: keys to modules, factors to the matrix view, refusals in one list."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ...deltas import LoRAParametrization
from ...errors import FileError, LoRAError
from ...weight import join
from ..outline import NOTHING, ModuleOutline, Outline, Shape, WeightOutline

Factors = dict[str, dict[str, Tensor]]
"""By a module's name in a file: its tensors `"A"`, `"B"` and `"alpha"`."""

LoRADeltas = Mapping[str, LoRAParametrization]
Reader = Callable[[ModuleOutline, Shape | None, Mapping[str, Tensor]], tuple[Tensor, Tensor, float]]

ROLES = {"lora_down": "A", "lora_up": "B", "down": "A", "up": "B"}
"""Which factor a file means; A and B mean themselves."""


def low_rank(
    name: str, A: Tensor, B: Tensor, alpha: float, dropout: float = 0.0
) -> tuple[str, LoRAParametrization]:
    """Pair a weight's name with the update that its factors are, in the matrix view."""
    numbers = {"rank": B.shape[-1], "alpha": alpha, "dropout": dropout}
    try:
        return name, LoRAParametrization.restore({"lora_A": A, "lora_B": B}, numbers)
    except LoRAError as error:
        raise FileError(f"{name}: {error}") from None


def factors_of(delta: LoRAParametrization) -> tuple[Tensor, Tensor]:
    """Return a delta's factors, without a graph."""
    return delta.lora_A.detach(), delta.lora_B.detach()


def refuse(complaints: Iterable[str], deed: str = "loaded") -> None:
    """Raise a `FileError` that lists all complaints, if there are any."""
    if text := "; ".join(dict.fromkeys(complaints)):
        raise FileError(f"nothing was {deed}: {text}")


def matches_any(patterns: Iterable[str], names: Iterable[str]) -> bool:
    """Say whether one of the patterns is that of a whole name."""
    compiled = [re.compile(pattern) for pattern in patterns]
    return any(pattern.fullmatch(name) for name in names for pattern in compiled)


def group_factors(
    tensors: Mapping[str, Tensor], *patterns: str
) -> tuple[Factors, dict[str, Tensor]]:
    """Sort tensors by the patterns' groups `name` and `role`; return the rest by key."""
    factors: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    rest = {}
    compiled = [re.compile(pattern) for pattern in patterns]
    for key, tensor in tensors.items():
        match = next((m for pattern in compiled if (m := pattern.fullmatch(key))), None)
        role = ROLES.get(match["role"], match["role"]) if match else ""
        if match and role not in factors[match["name"] or ""]:
            factors[match["name"] or ""][role] = tensor
        else:
            rest[key] = tensor
    return dict(factors), rest


def incomplete_factors(factors: Factors) -> Iterator[str]:
    """Yield modules without both factors, and factors that are no matrices."""
    for name, tensors in factors.items():
        for role in "AB":
            if (factor := tensors.get(role)) is None:
                yield f"{name} has no lora_{role}"
            elif factor.ndim < 2 or not factor.is_floating_point():
                yield f"lora_{role} of {name} is {factor.dtype} of {tuple(factor.shape)}"


def without_module(names: Sequence[str], weights: Outline) -> list[str]:
    """Complain of names in a file that find no module, with what is nearest to the first."""
    if not names:
        return []
    near = weights.nearest(names[0])
    return [f"no module for {', '.join(names)}; the nearest to the first are {near}"]


def stored_factors(A: Tensor, B: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    """Turn factors `(rank, in, ...)`, `(out, rank, ...)` to those of the stored weight, or back."""
    A, B = A.flatten(1), B.flatten(1)
    return (B.T.contiguous(), A.T.contiguous()) if transposed else (A, B)


def factors_with_kernel(A: Tensor, B: Tensor, shape: Shape | None) -> tuple[Tensor, Tensor]:
    """Give the factors of a convolution its kernel, as the libraries keep them."""
    kernel = (shape or ())[2:]
    return A.reshape(len(A), -1, *kernel), B.reshape(*B.shape, *[1] * len(kernel))


def shape_fault(
    name: str, shape: Shape | None, A: Tensor, B: Tensor, transposed: bool = False
) -> list[str]:
    """Complain of factors that aren't those of a weight, kernel and all."""
    factors = (B.shape[0], *A.shape[1:])
    wanted = factors if shape is None else shape[:: -1 if transposed else 1]
    if _trim(factors) == _trim(wanted) and _trim(B.shape[1:]) == _trim(A.shape[:1]):
        return []
    return [f"{name} has factors {tuple(A.shape)} and {tuple(B.shape)} for a weight of {wanted}"]


def _trim(shape: Shape) -> Shape:
    """Drop trailing ones: a 1x1 convolution and a linear layer have each other's factors."""
    while shape[-1:] == (1,):
        shape = shape[:-1]
    return shape


def tensors_of_another_base(tensors: Mapping[str, Tensor], weights: Outline) -> list[str]:
    """Complain of a base's tensors in a file, unless the model has the same."""
    if weights.unknown:
        return []
    own = weights.tensors
    return [
        f"{key} is neither a factor nor equal to the model's"
        for key, tensor in tensors.items()
        if key not in own or own[key].is_meta or not torch.equal(own[key].cpu(), tensor)
    ]


def read_layers(
    factors: Factors, paths: Mapping[str, str | None], weights: Outline, read: Reader
) -> list[tuple[str, LoRAParametrization]]:
    """Build the updates of modules, each of whose factors and alpha `read` makes sense of."""
    deltas, complaints = [], []
    unplaced = [name for name in factors if paths[name] is None]
    refuse([*incomplete_factors(factors), *without_module(unplaced, weights)])
    for name, tensors in factors.items():
        full = join(paths[name] or "", "weight")
        weight = weights.weight(full) or WeightOutline(ModuleOutline(paths[name] or ""), "weight")
        transposed = weight.module.layer.transposed
        try:
            A, B, alpha = read(weight.module, weight.shape, tensors)
        except ValueError as error:
            complaints.append(f"{name} {error}")
            continue
        if faults := shape_fault(name, weight.shape, A, B, transposed):
            complaints += faults
        else:
            deltas.append(low_rank(full, *stored_factors(A, B, transposed), alpha))
    refuse(complaints)
    return deltas


def plain_factors(
    module: ModuleOutline, shape: Shape | None, tensors: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, float]:
    """Take a linear or convolution layer's factors as they are; no alpha, or 0, means the rank."""
    A, B, alpha = tensors["A"], tensors["B"], tensors.get("alpha", torch.zeros(()))
    if not module.is_plain and module.layer is not NOTHING:
        raise ValueError(f"is a {module.class_name}, not a linear or convolution")
    if alpha.numel() != 1 or alpha.is_complex():
        raise ValueError(f"has an alpha of {tuple(alpha.shape)}, not one number")
    return A, B, float(alpha.item()) or float(len(A))
