"""What an optimizer is given, in groups, and a warning of one that was given no adapter."""

import functools
import math
import warnings
from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from .checks import OPTIMIZER, deltas_called, walk
from .deltas.numbers import real
from .errors import LoRAError
from .targets import matches, number_for_each
from .walk import Walk


def lora_parameter_groups(
    model: nn.Module,
    lr: float,
    *,
    ratio: float = 16.0,
    weight_decay: float = 0.0,
    factors: Mapping[str, float] | None = None,
    adapter: str | None = None,
) -> list[dict[str, Any]]:
    """Group the adapters' parameters by learning rate and weight decay (LoRA+).

    The factor of a pair that makes a layer's output learns `ratio` times as fast as the one that
    meets its input: `lora_B` as `lora_A`, or the other way round where a layer stores its weight as
    `(in, out)`. All else learns at `lr`. Lengths and what is of one dimension don't decay.

    Args:
        model: An adapted model.
        lr: The learning rate, as it was before there was a ratio.
        ratio: A positive number; 1 for equal rates.
        weight_decay: Towards the base, also of a pair that started from its weight (`init`).
        factors: What multiplies the rates of some weights, by pattern, of which the first that
            matches decides; of other weights the factor is 1.
        adapter: The adapter's name; `None` means all.

    Returns:
        Groups with `"params"`, `"lr"` and `"weight_decay"`, in model order of their first.

    Raises:
        AdapterError: There is no such adapter.
        TargetError: A pattern matches no adapted weight.
        LoRAError: A number isn't finite, or is negative, or `ratio` isn't positive.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
        >>> _ = register_lora(model, rank=1)
        >>> groups = lora_parameter_groups(model, 1e-3, factors={"1": 0.5})
        >>> [(len(group["params"]), group["lr"]) for group in groups]
        [(1, 0.001), (1, 0.016), (1, 0.0005), (1, 0.008)]
        >>> optimizer = torch.optim.AdamW(groups)

    Source:
        Hayou, Ghosh and Yu, "LoRA+: Efficient Low Rank Adaptation of Large Models",
        arXiv:2402.12354, section 4.
    """
    factors = {} if factors is None else factors
    if not isinstance(factors, Mapping) or not all(isinstance(each, str) for each in factors):
        raise LoRAError(f"factors must map patterns to numbers, got {factors!r:.60}")
    numbers = {f"factors of {key!r}": number for key, number in factors.items()}
    numbers |= {"lr": lr, "ratio": ratio, "weight_decay": weight_decay}
    for name, number in numbers.items():
        least = "positive" if name == "ratio" else "at least 0"
        if not 0 <= real(number) < math.inf or (not number and name == "ratio"):
            raise LoRAError(f"{name} must be a finite number and {least}, got {number!r:.40}")
    pairs = deltas_called(walk(model, "lora_parameter_groups"), adapter)
    weights = [weight for weight, _ in pairs]
    if not all(any(matches(each, weight) for each in factors) for weight in weights):
        factors = {**factors, "*": 1.0}
    rates = number_for_each("factors", factors, weights)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for (weight, delta), factor in zip(pairs, rates, strict=True):
        fast = "_A" if weight.layer.transposed else "_B"
        for name, parameter in delta.named_parameters():
            rate = lr * factor * (ratio if name.endswith(fast) else 1)
            decays = parameter.ndim > 1 and name != "magnitude"
            groups.setdefault((rate, weight_decay if decays else 0.0), []).append(parameter)
    return [{"params": each, "lr": r, "weight_decay": d} for (r, d), each in groups.items()]


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
            what = "this optimizer's step trained no adapter: it has parameters that are frozen"
            reason = f"{what} since register_lora, and no adapter's"
            warnings.warn(f"{reason}; {OPTIMIZER}", stacklevel=3)
    _strangers.add(optimizer)
