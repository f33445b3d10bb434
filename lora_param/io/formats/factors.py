"""What foreign formats share: keys to modules, factors to the matrix view, all faults in a list."""

import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ...deltas import Delta, DenseDelta, DoRA, LoRAParametrization, Pair
from ...errors import FileError, shortened
from ...layers import Shape
from ...lowrank import summed
from ...targets import nearest
from ...weight import Weight
from ..outline import Outline, Unknown, class_name, is_plain
from ..tensors import Tensors

Factors = dict[str, dict[str, Tensor]]
"""By a module's name in a file: its tensors `"A"`, `"B"` and `"alpha"`."""

Named = tuple[str, Delta]
"""A weight's name, and what is done to it."""

Item = TypeVar("Item")
Result = TypeVar("Result")

ROLES = {"lora_down": "A", "lora_up": "B", "down": "A", "up": "B"}
"""Which factor a file means; A and B mean themselves."""


def refuse(complaints: Iterable[str], deed: str = "loaded") -> None:
    """Raise a `FileError` that lists all complaints, if there are any."""
    if text := "; ".join(dict.fromkeys(complaints)):
        raise FileError(f"nothing was {deed}: {text}")


def collect(
    make: Callable[[Item], Iterable[Result]], items: Iterable[Item], deed: str = "loaded"
) -> list[Result]:
    """List what each item makes, or raise one `FileError` that lists what is wrong with all."""
    results, complaints = list[Result](), list[str]()
    for item in items:
        try:
            results += make(item)
        except (RuntimeError, ValueError) as error:
            named = isinstance(error, FileError)
            complaints.append(f"{error}" if named else f"{item}: {error}")
    refuse(complaints, deed)
    return results


def low_rank(
    A: Tensor, B: Tensor, alpha: float, magnitude: Tensor | None = None, **numbers: Any
) -> Pair:
    """Return the update that factors are, in the matrix view, or raise a `LoRAError`.

    With a `magnitude`, of the weight's dimensions, it is a DoRA's, of the widest dtype there is.
    """
    numbers = {"rank": B.shape[-1], "alpha": alpha, "dropout": 0.0, **numbers}
    tensors, kind = {"lora_A": A, "lora_B": B}, LoRAParametrization if magnitude is None else DoRA
    if magnitude is not None:
        dtype = torch.promote_types(A.dtype, magnitude.dtype)
        tensors = {n: t.to(dtype) for n, t in (tensors | {"magnitude": magnitude}).items()}
    return cast("Pair", kind.restore(tensors, numbers))


def dense(added: Tensor) -> DenseDelta:
    """Return the update that adds a tensor."""
    return cast("DenseDelta", DenseDelta.restore({"D": added}, {}))


def warn_of_statistics(format: str, names: Sequence[str]) -> None:
    """Warn of the statistics that a format has no place for."""
    reason = f"{format}'s files have no place for a norm's statistics"
    fix = "train the whole norms too, or keep a native file"
    warnings.warn(f"{reason}: left out are {shortened(names, 3, ', ')}; {fix}", stacklevel=6)


def matches_any(patterns: Iterable[str], names: Iterable[str]) -> bool:
    """Say whether one of the patterns is that of a whole name."""
    return any(re.fullmatch(pattern, name) for name in names for pattern in patterns)


def group_factors(
    tensors: Tensors, *patterns: str, prefix: str = ""
) -> tuple[Factors, dict[str, Tensor]]:
    """Sort tensors by the patterns' groups `name` and `role`; return the rest by key."""
    factors: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    rest = {}
    for key, tensor in ((k, t) for k, t in tensors.items() if k.startswith(prefix)):
        match = next((m for pattern in patterns if (m := re.fullmatch(pattern, key))), None)
        role = ROLES.get(match["role"], match["role"]) if match else ""
        if match and role not in factors[match["name"] or ""]:
            factors[match["name"] or ""][role] = tensor
        else:
            rest[key] = tensor
    return dict(factors), rest


def all_found(found: Mapping[str, Item | None], weights: Outline) -> dict[str, Item]:
    """Return what names in a file find, or raise for those that find no module."""
    if names := [name for name, each in found.items() if each is None]:
        near = nearest(names[0], weights.weights)
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


def of_layer(
    weight: Weight, A: Tensor, B: Tensor, alpha: float, transposed: bool, **more: Any
) -> Pair:
    """Return the update of a layer of its factors, kernel and all, as the libraries keep them."""
    factors = (B.shape[0], *A.shape[1:])
    wanted = factors if weight.shape is None else weight.shape[:: -1 if transposed else 1]
    if _trim(factors) != _trim(wanted) or _trim(B.shape[1:]) != _trim(A.shape[:1]):
        raise ValueError(f"has factors {(*A.shape,)} and {(*B.shape,)} for a weight of {wanted}")
    pair = low_rank(*stored_factors(A, B, transposed), alpha, **more)
    pair.rows = weight.rows
    return pair


def _trim(shape: Shape) -> Shape:
    """Drop trailing ones: a 1x1 convolution and a linear layer have each other's factors."""
    while shape[-1:] == (1,):
        shape = shape[:-1]
    return shape


def tensors_of_another_base(tensors: Tensors, weights: Outline) -> Iterator[str]:
    """Complain of a base's tensors in a file, unless the model has the same."""
    for key, tensor in {} if weights.unknown else tensors.items():
        own = weights.tensors.get(key)
        if own is None or own.is_meta or not torch.equal(own.cpu(), tensor):
            yield f"{key} is neither a factor nor equal to the model's"


def both_factors(tensors: Tensors) -> tuple[Tensor, Tensor]:
    """Return a layer's factors, or raise a `ValueError` for one that is missing or no matrix."""
    for role in "AB":
        if (factor := tensors.get(role)) is None:
            raise ValueError(f"has no lora_{role}")
        if factor.ndim < 2 or not factor.is_floating_point():
            raise ValueError(f"has a lora_{role} of {factor.dtype} and {tuple(factor.shape)}")
    return tensors["A"], tensors["B"]


def check_plain(weight: Weight) -> None:
    """Raise a `ValueError` unless a weight may be a linear or convolution layer's."""
    if not is_plain(weight) and not isinstance(weight.module, Unknown):
        raise ValueError(f"is a {class_name(weight.module)}, not a linear or convolution")


def plain(weight: Weight, tensors: Tensors) -> Pair:
    """Return the update of a linear or convolution layer; no alpha, or 0, means the rank."""
    (A, B), alpha = both_factors(tensors), tensors.get("alpha", torch.zeros(()))
    if alpha.numel() != 1 or alpha.is_complex():
        raise ValueError(f"has an alpha of {tuple(alpha.shape)}, not one number")
    scaled = float(alpha.item()) or float(len(A))
    magnitude = tensors.get("dora_scale")
    return of_layer(weight, A, B, scaled, weight.layer.transposed, magnitude=magnitude)


def joined(format: str, deltas: Mapping[Weight, Delta]) -> dict[Weight, Delta]:
    """Return deltas with a weight's low-rank blocks as one pair of all of it, and warn of its size.

    What can't be one, a dense block or one whose features are no side of the matrix, stays.
    """
    blocks, result = defaultdict[Weight, list[LoRAParametrization]](list), dict[Weight, Delta]()
    for weight, delta in deltas.items():
        whole = weight.whole
        joins = weight.rows and (delta.dim == 0 or whole.view == whole.shape)
        if joins and isinstance(delta, LoRAParametrization):
            blocks[weight := whole].append(delta)
        result[weight] = delta
    pairs = {whole: _side_by_side(whole.shape or (), own) for whole, own in blocks.items()}
    for whole, own in blocks.items():
        if len({delta.dropout for delta in own}) > 1:
            reason = f"its blocks differ in dropout, and are written with {pairs[whole].dropout:g}"
            warnings.warn(f"{whole.name}: {reason}", stacklevel=5)
    if pairs:
        both = chain(*blocks.values()), pairs.values()
        listed = shortened([whole.name for whole in pairs])
        kept, size = (sum(p.lora_A.numel() + p.lora_B.numel() for p in own) for own in both)
        warnings.warn(
            f"the format {format} has no blocks of rows: those of {listed} are "
            f"written as one pair each, of their ranks' sum, with {size:,} numbers for {kept:,}; "
            "where these are trained on, the zeros among them won't stay zero",
            stacklevel=5,
        )
    return result | pairs


def _side_by_side(shape: Shape, blocks: Sequence[LoRAParametrization]) -> Pair:
    """Put blocks side by side: a factor has zeros where the others' rows are."""
    pairs = list[tuple[Tensor, Tensor, float]]()
    for delta in blocks:
        A, B, rows = delta.lora_A.detach(), delta.lora_B.detach() * delta.scale, delta.rows
        if rows and delta.dim in (0, max(len(shape) - 2, 0)):
            B = rows.spread(B, B.ndim - 2, shape[delta.dim])
        elif rows:
            A = rows.spread(A, A.ndim - 1, shape[delta.dim])
        pairs.append((A, B, 1.0))
    A, B, _ = summed(pairs)
    pair = low_rank(A, B, A.shape[-2], dropout=min(delta.dropout for delta in blocks))
    pair.strength = blocks[0].strength
    return pair
