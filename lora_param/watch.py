"""Warnings of mistakes at which no call fails: training that reaches no adapter, or is lost."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from weakref import WeakSet

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from .deltas import Delta
from .walk import Walk
from .weight import Weight

FIX = "build the optimizer after register_lora, of lora_parameters(model)"

_watched: WeakSet[nn.Module] = WeakSet()  # frozen, and no optimizer of theirs has made a step since
_strangers: WeakSet[Optimizer] = WeakSet()  # that have made one, on none of these models
_hook_in = functools.cache(register_optimizer_step_post_hook)  # once; it stays


def watch(walk: Walk) -> None:
    """Warn if the first optimizer to make a step on a frozen model has none of its adapters."""
    _watched.add(walk.places[0][1])
    _strangers.clear()
    _hook_in(_after_step)


def _after_step(optimizer: Optimizer, *_: object) -> None:
    if torch.compiler.is_compiling() or not _watched or optimizer in _strangers:
        return
    held = {id(each) for group in optimizer.param_groups for each in group["params"]}
    for found in map(Walk, list(_watched)):
        factors = [each for _, delta in found.deltas for each in delta.parameters()]
        adapters = {id(each) for each in factors if each.requires_grad}
        frozen = {id(tensor) for _, tensor in found.parameters if not tensor.requires_grad}
        if held & (adapters | frozen) or not adapters:
            _watched.discard(found.places[0][1])
        if adapters and held & frozen and not held & adapters:
            reason = "this optimizer's step trained no adapter: it has parameters that are frozen"
            warnings.warn(f"{reason} since register_lora, and no adapter's; {FIX}", stacklevel=3)
    _strangers.add(optimizer)


def check_saved(walk: Walk, pairs: Sequence[tuple[Weight, Delta]]) -> None:
    """Warn of an adapter that changes nothing, and of training of the base, which isn't saved."""
    trained = [list(delta.parameters()) for _, delta in pairs if not delta.of_buffers]
    if all(any(not each.any() for each in parameters) for parameters in trained):
        reason = f"adapter {pairs[0][1].adapter!r} was never trained: its update is zero everywhere"
        warnings.warn(f"{reason}; if it should have been, {FIX}", stacklevel=3)
    if loose := [weight.name for weight, tensor in walk.parameters if tensor.requires_grad]:
        names = ", ".join(loose[:3]) + (f" and {len(loose) - 3:,} more" if loose[3:] else "")
        reason = (
            f"a file of adapters doesn't hold what trained the base, and {names} can be trained"
        )
        fix = "freeze them, train them by train=, or keep base_state_dict(model) too"
        warnings.warn(f"{reason}; {fix}", stacklevel=3)
