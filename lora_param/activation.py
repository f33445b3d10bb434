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
from .deltas.protocol import SPACES, Delta
from .deltas.switching import Switched
from .groups import by_rows
from .layers import Layer, computes_as_its_row, layer_of, methods_of
from .offloaded import brought_in, is_hooked
from .ops import PLAIN, is_exact
from .quantised import logical, packed_or_dense
from .routing import Routing, routing_of

PASS, CALLS = 8, 200_000
"""How many multiplications a pass over an element of an input or output costs, on a CPU, and the
calls that an update of the output makes beyond those that one of the weight does."""

Runs = tuple[tuple[Delta, ...], ...]
"""Deltas in the order in which they act, neighbours of one kind together."""


class Plan(NamedTuple):
    """How a weight is computed, for as long as nothing is switched and its chain is this one."""

    switched: object
    entries: tuple[nn.Module, ...]
    in_front: tuple[nn.Module, ...]
    acting: Runs
    space: str  # "weight" too where no other can be
    rank: int = 0  # of all that acts together, where that says what a sum costs
    dropping: tuple[Delta, ...] = ()  # of the input, in training


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
        # As `is_traced`, without a call more.
        traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
        routing = routing_of(self) if Routing.used else None
        bias = chains_of(self).get("bias") if routing is not None else None
        if bias is not None and routing.separates(bias):  # type: ignore[union-attr]
            return in_weight_space(self, *args, **kwargs)
        if not (found := acting(self, "weight", layer, traced, routing)):
            if not traced and (hooked := _hooked(self)):
                with brought_in(hooked):
                    return forward(self, *args, **kwargs)
            return in_weight_space(self, *args, **kwargs)
        weight, plan = found
        if routing is not None and routing.rows > 1:
            x = routing.places.spread(self, x)
        # As `is_unseen`, without a call more.
        seen = traced or torch._C._are_functorch_transforms_active()
        in_place = not (seen or torch._C._len_torch_dispatch_stack()) and type(weight) in PLAIN
        at_work = run(self, x, layer.transposed, in_place)
        at_work.routing = routing
        if routing is not None and routing.rows > 1 and plan.space != "weight":
            at_work.rows_in = routing.places.dim_of(self, x, len(at_work.batch))
        y = computed(at_work, weight, plan)
        return in_weight_space(self, *args, **kwargs) if y is None else y

    return forward


def computed(run: Any, weight: Tensor, plan: Plan) -> Any:
    """Return the output of a layer at work with its deltas; `None` for one in weight space."""
    run.weight, run.acting = weight, plan.acting
    if run.in_place and plan.rank and run.routing is None and _is_summed(plan, weight, run):
        for delta in itertools.chain(*plan.acting):
            weight = delta.sum(weight)
        return run.result(run.base(weight))
    if plan.space == "weight":
        return None
    y = run.base(weight)
    for first, *others in plan.acting:
        y = first.act(y, run.x, run, others)
    return run.result(y)


def acts(module: nn.Module, name: str) -> bool:
    """Say whether a module can compute a tensor's deltas, and one more, in activation space."""
    base = type_before(module)
    layer, chain = layer_of(base), chains_of(module).get(name)
    if not layer.run or name not in layer.tensors or not computes_as_its_row(base):
        return False
    patched = "forward" in module.__dict__ and not (name == "weight" and is_hooked(module))
    if patched or (layer.suits is not None and not layer.suits(module)):
        return False
    if chain is None:
        return True
    plan = _plan(chain, layer, tuple(chain._modules.values()))
    asked = bool(plan.acting)  # for weight space, which another beside it may change
    seen = not _hooked(module) and _is_watched(chain, plan.acting)
    return (plan.space != "weight" or asked) and not seen


def space_of(module: nn.Module, name: str) -> str:
    """Say in which space a module would compute, or computes, a tensor's deltas."""
    if not acts(module, name):
        return "weight"
    if (chain := chains_of(module).get(name)) is None:
        return "activation"
    original = originals_of(chain)[0]
    plan = _plan(chain, layer_of(type_before(module)), tuple(chain._modules.values()))
    if plan.space == "weight":
        return "weight"
    counted = plan.rank and type(original) in PLAIN and is_exact(original, original)
    return "activation or weight, by cost" if counted else "activation"


def _is_summed(plan: Plan, weight: Tensor, run: Any) -> bool:
    """Say whether to compute with the sum of a weight and its deltas, in which nothing is lost."""
    if plan.dropping and any(delta.training for delta in plan.dropping):
        return False
    if not (positions := run.positions()):
        return False
    if plan.space != "weight":
        trained = torch.is_grad_enabled() and not weight.requires_grad
        once, each = _saved(weight.shape, plan.rank, run.__class__, trained)
        if positions == 1 or once + positions * each <= 0:  # a vector meets factors quickly
            return False
        for delta in itertools.chain(*plan.acting) if trained else ():
            flags = {each.requires_grad for each in delta._parameters.values() if each is not None}
            if len(flags) > 1:  # of one factor alone the gradient needs no input
                return False
    return is_exact(run.x, weight)


@functools.lru_cache(maxsize=1024)
def _saved(shape: torch.Size, rank: int, run: Any, trained: bool) -> tuple[int, int]:
    """Count the multiplications that a sum saves in a forward: at once, and for each position.

    Of `T` positions and a weight `[out, in]`, the output's update takes `CALLS` and
    `T (rank + PASS) (in + out)`, the sum `(rank + run.forming) in out`; a backward has twice as
    many, and for the weight's gradient `T in out` more. So but for the calls a sum is formed only
    where it is smaller than the layer's input and output together.
    """
    size, rows = shape.numel(), shape[0]
    each = (max(rank, run.narrowest) + PASS) * (rows + size // rows)
    return CALLS - (rank + run.forming) * size, each - trained * size // 3


def acting(
    module: nn.Module, name: str, layer: Layer, traced: bool, routing: Routing | None
) -> tuple[Tensor, Plan] | None:
    """Return a weight as it is beneath its deltas, and those that are on; `None` without such."""
    chains: Any = module._modules.get("parametrizations")  # gone, where a shallow copy's twin left
    if chains is None or (chain := chains._modules.get(name)) is None:
        return None
    record = module.__dict__.get("_lora")
    # A trace depends on nothing that was found out before it, and leaves nothing behind.
    plan: Plan | None = None if traced or not record else record.plans.get(name)
    if routing is not None:
        plan = None if routing.is_input else routing.plans.get(chain)
    entries = chain.__dict__.get("acting") if routing is None else None
    entries = tuple(chain._modules.values()) if entries is None else entries
    if not plan or plan.switched is not Switched.switched or plan.entries != entries:
        plan = _plan(chain, layer, entries, routing)
        if routing is not None:
            routing.plans[chain] = plan
        elif record and not traced:
            record.plans[name] = plan
    if not plan.acting and (traced or routing is not None):
        return None
    if plan.space == "weight" and not plan.rank:
        return None
    if _is_watched(chain, plan.acting):
        return None
    weight = chain._parameters.get("original")
    if weight is None or plan.in_front:
        weight = run_through(plan.in_front, originals_of(chain))
        if any(_misfits(delta, weight, layer) for run in plan.acting for delta in run):
            return None
    return weight, plan


def _hooked(module: nn.Module) -> list[nn.Module]:
    """List a weight's chain and what acts in it, as far as accelerate's hooks bring them in."""
    chain: Any = chains_of(module).get("weight")
    return [each for each in (chain, *getattr(chain, "acting", ())) if each and is_hooked(each)]


def _is_watched(chain: nn.Module, acting: Runs) -> bool:
    """Say whether a hook, or a forward of its own, would see a chain or an acting delta called."""
    for module in (chain, *itertools.chain(*acting)):
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            return True
    return False


def _plan(chain: Any, layer: Layer, entries: Any, routing: Routing | None = None) -> Plan:
    switched = Switched.switched  # before any switch is looked at, which may change meanwhile
    ours = [isinstance(entry, Delta) for entry in entries]
    first = ours.index(True) if True in ours else len(entries)
    runs: list[tuple[Delta, ...]] = []
    for each in entries[first:]:
        if isinstance(each, Delta) and not _is_on(each, routing):
            continue
        can_act = isinstance(each, Delta) and each.has_own("act")
        if can_act and routing is not None and routing.rows > 1:
            before = [*itertools.chain(*runs)]
            can_act = each.has_own("routes") and each.routes(routing, before, layer.transposed)
        if not can_act or (not first and _misfits(each, originals_of(chain)[0], layer)):
            return Plan(switched, entries, entries[:first], (), "weight")
        if runs and type(runs[-1][0]) is type(each):
            runs[-1] += (each,)
        else:
            runs.append((each,))
    acting = tuple(itertools.chain(*runs))
    space = min((delta.space for delta in acting), key=SPACES.index, default="auto")
    dropping = tuple(delta for delta in acting if delta.numbers.get("dropout"))
    space = "auto" if dropping and space == "weight" else space  # in which nothing can be dropped
    rank, counted = 0, all(delta.width for delta in acting)
    # What is in front runs once in a forward, of which some move a state of theirs.
    if counted and layer.run.forming and space in (("auto",) if first else ("auto", "weight")):
        rank = sum(delta.width for delta in acting)
    return Plan(switched, entries, entries[:first], tuple(runs), space, rank, dropping)


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
