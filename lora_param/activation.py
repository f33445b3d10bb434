"""The forward of a layer whose deltas act on its output: one for all layers and kinds."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .chains import chains_of, originals_of, run_through, type_before
from .deltas.protocol import Delta
from .deltas.switching import Switched
from .groups import by_rows
from .layers import Layer, computes_as_its_row, layer_of, methods_of
from .places import is_traced
from .quantised import logical, packed_or_dense
from .routing import Routing, routing_of

PLAIN = (Tensor, nn.Parameter)
"""Types whose results can be changed in place whatever the change is."""

Runs = tuple[tuple[Delta, ...], ...]
"""Deltas in the order in which they act, neighbours of one kind together."""


class Plan(NamedTuple):
    """How a weight is computed, for as long as nothing is switched and its chain is this one."""

    switched: object
    entries: tuple[nn.Module, ...]
    in_front: tuple[nn.Module, ...]
    acting: Runs
    in_activation_space: bool


def in_activation_space(base: type[nn.Module], layer: Layer) -> Callable[..., Any]:
    """Make the forward of a type: `base(x)` for the weight beneath, and what each delta does to it.

    A weight that is read with others' parametrizations behind the deltas, with hooks on these, or
    in a module whose methods somebody has replaced is left to the stock forward, in weight space.
    """
    stock, methods, run, suits = base.forward, methods_of(base), layer.run, layer.suits
    in_weight_space = by_rows(base, packed_or_dense(base) if layer.dense else None)
    argument = list(inspect.signature(stock).parameters)[1]

    @functools.wraps(stock)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        x: Any = args[0] if args else kwargs.get(argument)
        usual = len(args) + len(kwargs) == 1 and (suits is None or suits(self))
        dense = isinstance(x, Tensor) and x.layout is torch.strided and not x.is_nested
        patched = (base.forward, getattr(base, "_conv_forward", None)) != methods
        if not usual or not dense or patched:
            return in_weight_space(self, *args, **kwargs)
        traced = is_traced()
        routing = routing_of(self) if Routing.used else None
        bias = chains_of(self).get("bias") if routing is not None else None
        if bias is not None and routing.separates(bias):  # type: ignore[union-attr]
            return in_weight_space(self, *args, **kwargs)
        if not (found := _acting(self, layer, traced, routing)):
            return in_weight_space(self, *args, **kwargs)
        weight, acting = found
        if routing is not None and routing.rows > 1:
            x = routing.places.spread(self, x)
        # A transform, or a mode that keeps results, must see no result change.
        seen = traced or torch._C._are_functorch_transforms_active()
        in_place = not (seen or torch._C._len_torch_dispatch_stack()) and type(weight) in PLAIN
        at_work = run(self, x, layer.transposed, in_place)  # type: ignore[misc]
        at_work.weight, at_work.acting, at_work.routing = weight, acting, routing
        if routing is not None and routing.rows > 1:
            at_work.rows_in = routing.places.dim_of(self, x, len(at_work.batch))
        y = at_work.base(weight)
        for first, *others in acting:
            y = first.act(y, at_work.x, at_work, others)
        return at_work.result(y)

    return forward


def acts(module: nn.Module, name: str) -> bool:
    """Say whether a module would compute, or computes, a tensor's deltas in activation space."""
    base = type_before(module)
    layer, chain = layer_of(base), chains_of(module).get(name)
    if name != "weight" or not layer.run or not computes_as_its_row(base):
        return False
    if "forward" in module.__dict__ or (layer.suits is not None and not layer.suits(module)):
        return False
    if chain is None:
        return True
    plan = _plan(chain, layer)
    return plan.in_activation_space and not _is_watched(chain, plan.acting)


def _acting(
    module: nn.Module, layer: Layer, traced: bool, routing: Routing | None
) -> tuple[Tensor, Runs] | None:
    """Return a weight as it is beneath its deltas, and those that are on; `None` without such."""
    chains: Any = module._modules.get("parametrizations")  # gone, where a shallow copy's twin left
    if chains is None or (chain := chains._modules.get("weight")) is None:
        return None
    record = module.__dict__.get("_lora")
    # A trace depends on nothing that was found out before it, and leaves nothing behind.
    plan: Plan | None = None if traced or not record else record.plan
    if routing is not None:
        plan = None if traced else routing.plans.get(chain)
    entries = tuple(chain._modules.values())
    if not plan or plan.switched is not Switched.switched or plan.entries != entries:
        plan = _plan(chain, layer, routing)
        if routing is not None:
            routing.plans[chain] = plan
        elif record and not traced:
            record.plan = plan
    if not plan.acting or not plan.in_activation_space or _is_watched(chain, plan.acting):
        return None
    weight = chain._parameters.get("original")
    if weight is None or plan.in_front:
        weight = run_through(plan.in_front, originals_of(chain))
        if any(_misfits(delta, weight, layer) for run in plan.acting for delta in run):
            return None
    return weight, plan.acting


def _is_watched(chain: nn.Module, acting: Runs) -> bool:
    """Say whether a hook, or a forward of its own, would see a chain or an acting delta called."""
    for module in (chain, *itertools.chain(*acting)):
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            return True
    return False


def _plan(chain: Any, layer: Layer, routing: Routing | None = None) -> Plan:
    switched = Switched.switched  # before any switch is looked at, which may change meanwhile
    entries = tuple(chain._modules.values())
    ours = [isinstance(entry, Delta) for entry in entries]
    first = ours.index(True) if True in ours else len(entries)
    runs: list[tuple[Delta, ...]] = []
    possible = True
    for each in entries[first:]:
        if isinstance(each, Delta) and not _is_on(each, routing):
            continue
        can_act = isinstance(each, Delta) and each.has_own("act")
        if routing is not None and routing.rows > 1:
            can_act = can_act and each.has_own("routes")
        if not can_act or (not first and _misfits(each, originals_of(chain)[0], layer)):
            possible = False
        elif runs and type(runs[-1][0]) is type(each):
            runs[-1] += (each,)
        else:
            runs.append((each,))
    return Plan(switched, entries, entries[:first], tuple(runs), possible)


def _is_on(delta: Delta, routing: Routing | None) -> bool:
    if routing is None or delta not in routing.columns:
        return delta.enabled
    return routing.columns[delta] >= 0 if routing.rows > 1 else routing.switch(delta).on


def _misfits(delta: Delta, weight: Tensor, layer: Layer) -> bool:
    """Say whether a delta, one registered by hand, has another matrix view than its layer."""
    weight = logical(weight)
    if delta.rows is not None:
        weight = delta.rows.take(weight, delta.dim)
    shape = tuple(weight.shape)
    return delta.misfit(shape, layer.view(shape)) is not None
