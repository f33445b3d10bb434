"""New adapters out of adapters: combinations of several, and one with another rank."""

import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from .checks import Need, check_weights, deltas_called, walk
from .deltas import Delta, DenseDelta, LoRAParametrization
from .deltas.numbers import SCALINGS, check_rank, real
from .deltas.protocol import Shape, check_adapter, tensors_of
from .errors import AdapterError, LoRAError
from .lowrank import (
    Product,
    Rank,
    check_rank_or_share,
    dare,
    factorised,
    recompressed,
    summed,
    ties,
)
from .progress import progress
from .register import install
from .undo import all_or_nothing, keep_entries
from .weight import Weight, overlapping

Method = Literal["sum", "ties", "dare"]
Terms = Sequence[tuple[Delta, float]]
"""Deltas of one weight with their strengths."""


@dataclass(frozen=True)
class Fit:
    """What a weight's new update is, and what it misses of the one that was asked for.

    `error` is the Frobenius norm of the difference as a share of the norm; `rank` is `None` for a
    dense delta.
    """

    weight: str
    rank: int | None
    error: float


def combine_lora(
    model: nn.Module,
    adapters: Mapping[str, float],
    *,
    adapter: str,
    method: Method = "sum",
    rank: Rank | None = None,
    density: float | None = None,
    generator: torch.Generator | None = None,
) -> list[Fit]:
    """Register a combination of adapters as a new one beside them, which is off until selected.

    It is one of the updates, `sum(strength * scale * B A)`, whatever is selected at present.

    Args:
        model: An adapted model.
        adapters: Strengths by name, of either sign.
        adapter: The new adapter's name.
        method: `"sum"`; `"ties"`, the mean of what is large and agrees in sign, weighted by the
            strengths; or `"dare"`, the sum of what is left when entries are dropped at random.
        rank: `None` for all of it: a sum's ranks add up, up to the weight's smaller side, and the
            others are dense deltas. A number, or a share of the squared norm such as 0.95, for the
            nearest update of that rank; a sum's without forming it, by QR and a small SVD.
        density: The share of entries that `"ties"` and `"dare"` keep.
        generator: Source of the draws of `"dare"`; the global one if `None`.

    Returns:
        Each weight's rank and relative error, in model order.

    Raises:
        AdapterError: No such adapter, a name that is taken, a kind that doesn't add, or statistics
            that differ.
        LoRAError: An option is out of range.

    Example:
        >>> _ = register_lora(model, rank=1, adapter="b")
        >>> combine_lora(model, {"default": 0.7, "b": -0.3}, adapter="both")
        [Fit(weight='weight', rank=2, error=0.0)]
        >>> select_lora(model, "both")

    Source:
        arXiv:2306.01708 for TIES, arXiv:2311.03099 for DARE.
    """
    found = walk(model, "combine_lora", Need.CHANGE)
    check_adapter(adapter)
    if not isinstance(adapters, Mapping) or not adapters:
        raise LoRAError(f"adapters must be strengths by name, got {adapters!r:.60}")
    for name in adapters:
        deltas_called(found, name)
    pairs = [(weight, delta) for weight, delta in found.deltas if delta.adapter in adapters]
    check_weights([weight for weight, _ in pairs if not weight.is_buffer], adapter)
    terms = [(weight, delta, adapters[delta.adapter]) for weight, delta in pairs]
    made, fits = combine(terms, method, rank, density, generator)
    for delta in made.values():
        delta.adapter, delta.enabled = adapter, False
    install(found, list(made.items()), freeze=False)
    return fits


def combine(
    terms: Iterable[tuple[Weight, Delta, float]],
    method: Method = "sum",
    rank: Rank | None = None,
    density: float | None = None,
    generator: torch.Generator | None = None,
) -> tuple[dict[Weight, Delta], list[Fit]]:
    """Combine each weight's deltas, at these strengths, and say what the results miss."""
    _check_options(method, density)
    rank = None if rank is None else check_rank_or_share(rank)
    own: defaultdict[Weight, list[tuple[Delta, float]]] = defaultdict(list)
    for weight, delta, strength in terms:
        strength = delta.check_strength(1 if delta.of_buffers else strength)
        own[weight].append((delta, strength))
    for one, other in overlapping(own):
        fix = "combine adapters of the same blocks"
        raise AdapterError(f"{one.name}: overlaps {other.name} in part; {fix}")
    made, fits = dict[Weight, Delta](), list[Fit]()
    for weight, deltas in progress(list(own.items()), "combining"):
        made[weight], fit = _combined(weight, deltas, method, rank, density or 1, generator)
        fits += [] if weight.is_buffer else [fit]
    return made, fits


def _check_options(method: object, density: float | None) -> None:
    """Raise for options of a combination that are out of range."""
    if method not in ("sum", "ties", "dare"):
        raise LoRAError(f'method must be "sum", "ties" or "dare", got {method!r}')
    if method == "sum" and density is not None:
        raise LoRAError(f'density is for "ties" and "dare", got {density!r}; drop it')
    if method != "sum" and not 0 < real(density) <= 1:
        rule = "must satisfy 0 < density <= 1, the share of entries to keep"
        raise LoRAError(f'density {rule} with method="{method}", got {density!r}')


def _combined(
    weight: Weight,
    terms: Terms,
    method: Method,
    rank: Rank | None,
    density: float,
    generator: torch.Generator | None,
) -> tuple[Delta, Fit]:
    """Combine the deltas on one weight, at strength 1 each."""
    first: Any = terms[0][0]
    odd: list[Any] = [each for each, _ in terms if not each.adds]
    if odd and not (odd[0].of_buffers and all(odd[0].S.equal(each.S) for each in odd)):
        reason = f"a {odd[0].kind} delta is no sum, so that it can't be combined with others"
        raise AdapterError(f"{weight.name}: adapter {odd[0].adapter!r}: {reason}")
    made, error, view = first, 0.0, weight.view
    with torch.no_grad():
        if odd:
            made = _copied(first, first.numbers)
        elif method == "sum" and all(isinstance(each, LoRAParametrization) for each, _ in terms):
            made, error = _product_sum(cast("Any", terms), view, rank)
        else:
            total = _total(terms, tuple(weight.like.shape), method, density, generator)
            if rank is not None and len(view) > 1:
                product = factorised(total.reshape(view), rank)
                made, error = pair_of(product, _dtype(terms)), product.error
            else:
                made = DenseDelta.restore({"D": total.to(_dtype(terms))}, {})
    made.rows, made.dim = first.rows, first.dim
    return made, Fit(weight.name, made.numbers.get("rank"), error)


def _total(
    terms: Terms, shape: Shape, method: str, density: float, generator: torch.Generator | None
) -> Tensor:
    """Form the combination of updates of a shape, in float64."""
    updates, strengths = [], [strength for _, strength in terms]
    for delta, _ in terms:
        zeros = torch.zeros(shape, dtype=torch.float64, device=next(delta.parameters()).device)
        updates.append(delta.restore(tensors_of(delta), delta.numbers).value(zeros))
    if method == "ties":
        return ties(updates, strengths, density)
    if method == "dare":
        return dare(updates, strengths, density, generator)
    return cast("Tensor", sum(u * s for u, s in zip(updates, strengths, strict=True)))


def _product_sum(
    terms: Sequence[tuple[LoRAParametrization, float]], view: Shape, rank: Rank | None
) -> tuple[Delta, float]:
    first, limit = terms[0][0], min(view[-2:])
    if len(terms) == 1 and rank is None:  # keeps its factors' bits
        alpha = first.alpha * terms[0][1]
        return _copied(first, first.numbers | {"alpha": alpha, "dropout": 0.0}), 0.0
    product = summed([(d.lora_A.double(), d.lora_B.double(), d.scale * s) for d, s in terms])
    if rank is not None or product.A.shape[-2] > limit:
        product = recompressed(product.A, product.B, limit if rank is None else rank)
    return pair_of(product, _dtype(terms)), product.error


def pair_of(product: Product, dtype: torch.dtype) -> Delta:
    """Make a pair of a product."""
    A, B, rank = product.A.to(dtype), product.B.to(dtype), product.A.shape[-2]
    numbers = {"rank": rank, "alpha": float(rank), "scaling": "lora", "dropout": 0.0}
    return LoRAParametrization.restore({"lora_A": A, "lora_B": B}, numbers)


def _copied(delta: Delta, numbers: Mapping[str, Any]) -> Delta:
    return delta.restore({name: each.clone() for name, each in tensors_of(delta).items()}, numbers)


def _dtype(terms: Terms) -> torch.dtype:
    dtypes = [next(delta.parameters()).dtype for delta, _ in terms]
    return functools.reduce(torch.promote_types, dtypes)


def resize_lora(model: nn.Module, rank: Rank, adapter: str | None = None) -> list[Fit]:
    """Give an adapter's pairs another rank, in place: the nearest update of a lower one, or room.

    A lower rank keeps the largest singular values. A higher one keeps the update, with columns of
    zeros in `lora_B` and rows of `lora_A` drawn as fresh ones are. The scale stays what it was. The
    factors are new Parameters: build the optimizer anew. Dense deltas and statistics stay.

    Args:
        model: An adapted model.
        rank: The new rank, or a share below 1 of each update's squared norm for the least rank that
            holds it. A plain number is lowered to the smaller side of a weight.
        adapter: The adapter; `None` for all.

    Returns:
        Each pair's rank and relative error, in model order.

    Raises:
        AdapterError: There is no such adapter with a pair, or a kind doesn't add.
        LoRAError: The rank is out of range.

    Example:
        >>> resize_lora(model, 2)
        [Fit(weight='weight', rank=2, error=0.0)]
    """
    found = walk(model, "resize_lora", Need.CHANGE)
    rank = check_rank_or_share(rank)
    pairs = deltas_called(found, adapter)
    changed = [(delta, *resized(w, delta, rank)) for w, delta in pairs if "rank" in delta.numbers]
    if not changed:
        raise AdapterError("there is no pair of factors to resize; its deltas are dense")
    with all_or_nothing() as undo:
        for delta, new, _ in changed:
            _become(delta, new, undo)
    return [fit for *_, fit in changed]


def resized(weight: Weight, delta: Delta, rank: Rank) -> tuple[Delta, Fit]:
    """Return a pair of another rank, with the same scale, and what it misses."""
    if not isinstance(delta, LoRAParametrization):
        reason = f"a {delta.kind} delta is no sum, so that none of a lower rank is the nearest"
        raise AdapterError(f"{weight.name}: adapter {delta.adapter!r}: {reason}")
    view, A, B = weight.view, delta.lora_A.detach(), delta.lora_B.detach()
    if isinstance(rank, int):
        rank = min(rank, min(view[-2:]))
    if isinstance(rank, int) and rank > A.shape[-2]:
        more = rank - A.shape[-2]
        fresh = A.new_empty(*A.shape[:-2], more, A.shape[-1]).uniform_(-1, 1) / A.shape[-1] ** 0.5
        product = Product(torch.cat([A, fresh], -2), nn.functional.pad(B, (0, more)))
    else:
        product = recompressed(A, B, rank)
    found = check_rank(product.A.shape[-2], *view[-2:])
    numbers = {"rank": found, "alpha": delta.scale * SCALINGS[delta.scaling](found)}
    tensors = {"lora_A": product.A.to(A.dtype), "lora_B": product.B.to(A.dtype)}
    return delta.made_of(tensors, delta.numbers | numbers), Fit(weight.name, found, product.error)


def _become(delta: Delta, new: Delta, undo: ExitStack) -> None:
    """Give a pair another's factors and numbers; its flags, switches and place stay."""
    own, starts, lora = delta._parameters, delta._buffers, new._parameters
    for name, factor in own.items():
        lora[f"lora{name[-2:]}"].requires_grad_(factor.requires_grad)  # type: ignore[union-attr]
    undo.callback(setattr, delta, "numbers", delta.numbers)
    resting = delta.__dict__, ["_resting"]
    keep_entries(undo, (own, {*own, *lora}), (starts, {*starts}), resting)
    delta.__dict__["_resting"] = tuple(f"lora{name[-2:]}" for name in delta._resting)
    starts.clear()
    own.clear()
    own.update(lora)
    delta.numbers = new.numbers
