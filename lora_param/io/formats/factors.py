"""What foreign formats share: keys to modules, factors to the matrix view, refusals in one list."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...deltas import Delta, DenseDelta, DoRA, LoRAParametrization
from ...deltas.pair import Pair as LowRank
from ...errors import FileError, LoRAError
from ...layers import Shape
from ...weight import Weight
from ..outline import Outline, Unknown, class_name, is_plain

Factors = dict[str, dict[str, Tensor]]
"""By a module's name in a file: its tensors `"A"`, `"B"` and `"alpha"`."""

Pair = tuple[str, LowRank]
AnyPair = tuple[str, Delta]
Reader = Callable[[Weight, Mapping[str, Tensor]], tuple[Tensor, Tensor, float]]
Item = TypeVar("Item")
Result = TypeVar("Result")

ROLES = {"lora_down": "A", "lora_up": "B", "down": "A", "up": "B"}
"""Which factor a file means; A and B mean themselves."""


def refuse(complaints: Iterable[str], deed: str = "loaded") -> None:
    """Raise a `FileError` that lists all complaints, if there are any."""
    if text := "; ".join(dict.fromkeys(complaints)):
        raise FileError(f"nothing was {deed}: {text}")


def collect(
    make: Callable[[Item], Result], items: Iterable[Item], deed: str = "loaded"
) -> list[Result]:
    """Make something of each item, or raise one `FileError` that lists those of all of them."""
    results, complaints = [], []
    for item in items:
        try:
            results.append(make(item))
        except FileError as error:
            complaints.append(str(error))
    refuse(complaints, deed)
    return results


def low_rank(
    name: str,
    A: Tensor,
    B: Tensor,
    alpha: float,
    *,
    magnitude: Tensor | None = None,
    **numbers: Any,
) -> Pair:
    """Pair a weight's name with the update that its factors are, in the matrix view.

    With a `magnitude`, of the weight's dimensions, it is a DoRA's, of the widest dtype there is.
    """
    numbers = {"rank": B.shape[-1], "alpha": alpha, "dropout": 0.0, **numbers}
    tensors, kind = {"lora_A": A, "lora_B": B}, LoRAParametrization if magnitude is None else DoRA
    if magnitude is not None:
        dtype = torch.promote_types(A.dtype, magnitude.dtype)
        tensors = {n: t.to(dtype) for n, t in (tensors | {"magnitude": magnitude}).items()}
    try:
        delta: Any = kind.restore(tensors, numbers)
        return name, delta
    except LoRAError as error:
        raise FileError(f"{name}: {error}") from None


def dense(name: str, added: Tensor) -> tuple[str, DenseDelta]:
    """Pair a weight's name with what is added to it."""
    delta: Any = DenseDelta.restore({"D": added}, {})
    return name, delta


def warn_of_statistics(format: str, names: Sequence[str]) -> None:
    """Warn of the statistics that a format has no place for."""
    more = f" and {len(names) - 3:,} more" * bool(names[3:])
    reason = f"{format}'s files have no place for a norm's statistics"
    fix = "train the whole norms too, or keep a native file"
    warnings.warn(f"{reason}: left out are {', '.join(names[:3])}{more}; {fix}", stacklevel=6)


def matches_any(patterns: Iterable[str], names: Iterable[str]) -> bool:
    """Say whether one of the patterns is that of a whole name."""
    return any(re.fullmatch(pattern, name) for name in names for pattern in patterns)


def group_factors(
    tensors: Mapping[str, Tensor], *patterns: str
) -> tuple[Factors, dict[str, Tensor]]:
    """Sort tensors by the patterns' groups `name` and `role`; return the rest by key."""
    factors: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    rest = {}
    for key, tensor in tensors.items():
        match = next((m for pattern in patterns if (m := re.fullmatch(pattern, key))), None)
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


def all_found(found: Mapping[str, Item | None], weights: Outline) -> dict[str, Item]:
    """Return what names in a file find, or raise for those that find no module."""
    if names := [name for name, each in found.items() if each is None]:
        near = weights.nearest(names[0])
        refuse([f"no module for {', '.join(names)}; the nearest to the first are {near}"])
    return {name: each for name, each in found.items() if each is not None}


def stored_factors(A: Tensor, B: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    """Turn factors `(rank, in, ...)`, `(out, rank, ...)` to those of the stored weight, or back."""
    A, B = A.flatten(1), B.flatten(1)
    return (B.T.contiguous(), A.T.contiguous()) if transposed else (A, B)


def factors_with_kernel(A: Tensor, B: Tensor, shape: Shape | None) -> tuple[Tensor, Tensor]:
    """Give the factors of a convolution its kernel, as the libraries keep them."""
    kernel = (shape or ())[2:]
    return A.reshape(len(A), -1, *kernel), B.reshape(*B.shape, *[1] * len(kernel))


def check_shape(
    name: str, shape: Shape | None, A: Tensor, B: Tensor, transposed: bool = False
) -> None:
    """Raise a `FileError` for factors that aren't those of a weight, kernel and all."""
    factors = (B.shape[0], *A.shape[1:])
    wanted = factors if shape is None else shape[:: -1 if transposed else 1]
    if _trim(factors) != _trim(wanted) or _trim(B.shape[1:]) != _trim(A.shape[:1]):
        got = f"{tuple(A.shape)} and {tuple(B.shape)}"
        raise FileError(f"{name} has factors {got} for a weight of {wanted}")


def _trim(shape: Shape) -> Shape:
    """Drop trailing ones: a 1x1 convolution and a linear layer have each other's factors."""
    while shape[-1:] == (1,):
        shape = shape[:-1]
    return shape


def tensors_of_another_base(tensors: Mapping[str, Tensor], weights: Outline) -> Iterator[str]:
    """Complain of a base's tensors in a file, unless the model has the same."""
    for key, tensor in {} if weights.unknown else tensors.items():
        own = weights.tensors.get(key)
        if own is None or own.is_meta or not torch.equal(own.cpu(), tensor):
            yield f"{key} is neither a factor nor equal to the model's"


def read_layer(name: str, weight: Weight, tensors: Mapping[str, Tensor], read: Reader) -> Pair:
    """Build the update of a layer, of whose factors and alpha `read` makes sense."""
    if complaints := [*incomplete_factors({name: dict(tensors)})]:
        raise FileError("; ".join(complaints))
    try:
        A, B, alpha = read(weight, tensors)
    except ValueError as error:
        raise FileError(f"{name} {error}") from None
    transposed = weight.layer.transposed
    check_shape(name, weight.shape, A, B, transposed)
    m = tensors.get("dora_scale")
    pair = low_rank(weight.name, *stored_factors(A, B, transposed), alpha, magnitude=m)
    pair[1].rows = weight.rows
    return pair


def read_layers(factors: Factors, found: Mapping[str, Weight], read: Reader) -> list[Pair]:
    """Build the updates of layers, or list what is wrong with all of them."""
    return collect(lambda name: read_layer(name, found[name], factors[name], read), found)


def check_plain(weight: Weight) -> None:
    """Raise a `ValueError` unless a weight may be a linear or convolution layer's."""
    if not is_plain(weight) and not isinstance(weight.module, Unknown):
        raise ValueError(f"is a {class_name(weight.module)}, not a linear or convolution")


def plain_factors(weight: Weight, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, float]:
    """Take a linear or convolution layer's factors as they are; no alpha, or 0, means the rank."""
    A, B, alpha = tensors["A"], tensors["B"], tensors.get("alpha", torch.zeros(()))
    check_plain(weight)
    if alpha.numel() != 1 or alpha.is_complex():
        raise ValueError(f"has an alpha of {tuple(alpha.shape)}, not one number")
    return A, B, float(alpha.item()) or float(len(A))
