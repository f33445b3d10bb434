"""The difference between a model and a fine-tuned twin, as an adapter."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from .checks import check_weights
from .combine import Fit, pair_of
from .deltas import Delta, DenseDelta, StatisticsDelta
from .deltas.protocol import FLOATS, Shape
from .errors import LoRAError, TargetError, shortened
from .lowrank import LARGE, Rank, factorised
from .progress import progress
from .targets import Target, resolve, resolve_whole
from .walk import Walk
from .weight import Weight


def _difference(
    name: str, base: Tensor, tuned: Tensor, view: Shape | None, rank: Rank
) -> tuple[Delta, Fit] | None:
    """Return what turns a base's weight into a tuned one's: a pair, or without a view dense."""
    tuned = tuned.detach().to(base.device)
    if torch.equal(base, tuned.to(base.dtype)) and base.dtype == tuned.dtype:
        return None
    dtype = torch.promote_types(torch.promote_types(base.dtype, tuned.dtype), torch.float32)
    wide = dtype if view and min(view[-2:]) >= LARGE else torch.float64
    change = tuned.to(wide) - base.detach().to(wide)
    if not change.any():
        return None
    if not change.isfinite().all():
        raise LoRAError(f"{name}: the difference isn't finite; the checkpoint is damaged")
    if view is None:
        return DenseDelta.restore({"D": change.to(dtype)}, {}), Fit(name, None, 0.0)
    product = factorised(change.reshape(view), rank)
    return pair_of(product, dtype), Fit(name, product.A.shape[-2], product.error)


def differences(
    walk: Walk,
    tuned: Mapping[str, Tensor],
    rank: Rank,
    adapter: str = "default",
    target: Target | None = None,
    exclude: Target | None = None,
) -> tuple[list[tuple[Weight, Delta]], list[Fit]]:
    """Pair a model's weights with what turns them into a tuned model's, one at a time."""
    tensors = {weight.name: (weight, tensor) for weight, tensor in walk.tensors}
    _check_same(tensors, tuned, walk)
    excluded = set() if exclude is None else {w.name for w in resolve_whole(walk, exclude)}
    try:
        low_rank = {weight.name for weight in resolve(walk, target)}
    except TargetError:
        if target is not None:
            raise
        low_rank = set()  # a model without such layers has dense deltas alone
    moving = {weight.name for weight in walk.moving}
    pairs, fits, left = list[tuple[Weight, Delta]](), list[Fit](), list[str]()
    for name, (weight, base) in progress(tensors.items(), "extracting"):
        if name in excluded or name not in tuned:
            continue
        odd = weight.is_buffer or base.dtype not in FLOATS or not base.ndim
        if odd or (target is not None and name not in low_rank):
            value = tuned[name].to(base)
            if name in moving and target is None and not torch.equal(base, value):
                pairs.append((weight, StatisticsDelta(value)))
            elif not torch.equal(base, value):
                left.append(name)
            continue
        view = weight.view if name in low_rank else None
        if found := _difference(name, base, tuned[name], view, rank):
            pairs.append((weight, found[0]))
            fits.append(found[1])
    if not pairs:
        raise LoRAError("there is no difference: the tuned weights are the model's own")
    check_weights([weight for weight, _ in pairs if not weight.is_buffer], adapter)
    if left:
        what = shortened(left, 5, ", ")
        warnings.warn(f"changed, and not extracted: {what}", stacklevel=3)
    for _, delta in pairs:
        delta.adapter = adapter
    return pairs, fits


def _check_same(
    tensors: Mapping[str, tuple[Weight, Tensor]], tuned: Mapping[str, Tensor], walk: Walk
) -> None:
    """Raise unless both have the same parameters, of which tied ones need be there once."""
    faults = [f"unexpected: {name}" for name in tuned if name not in tensors]
    for name, (weight, base) in tensors.items():
        if name in tuned and tuned[name].shape != base.shape:
            got = tuple(tuned[name].shape)
            faults.append(f"misshapen: {name} is {got}, should be {tuple(base.shape)}")
        absent = name not in tuned and not weight.is_buffer
        if absent and not any(other.name in tuned for other in walk.partners(weight)):
            faults.append(f"missing: {name}")
    if faults:
        raise LoRAError(f"the tuned weights aren't of this model: {shortened(faults)}")
