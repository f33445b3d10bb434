"""Torch's attention in activation space: what its own code, and no other, gets as a weight."""

from __future__ import annotations

import functools
import types
from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 as everybody calls it
from torch.utils._pytree import tree_map_only

from .activation import Plan, acting, computed, formed
from .chains import type_before
from .deltas.protocol import Delta
from .groups import SHAPE
from .layers import Layer, computes_as_its_row
from .modes import is_exact, is_unseen
from .ops import LinearRun
from .routing import Routing

READERS = {"torch.nn.modules.activation": "query", "torch.nn.modules.transformer": "src"}
"""The modules of torch's attention and encoder layer, and what these call their input."""

NARROW = 64
"""Up to which width torch's kernels for inference, with sums, take less time than the calls."""

_learnt: WeakSet[Delta] = WeakSet()


class ProjectionRun(LinearRun):
    """A weight, or some `rows` of it, at work on `[..., in]` in an attention."""

    def __init__(self, x: Tensor, bias: Tensor | None, rows: slice, in_place: bool) -> None:
        self.transposed, self.in_place, self.bias, self.rows = False, in_place, bias, rows
        self.lead, self.x = (x.shape[:-1], x.flatten(0, -2)) if x.dim() > 2 else (None, x)
        self.adds = bias is not None and not x.is_contiguous()

    def positions(self) -> int:
        """Return the number of tokens, for some of the rows 0."""
        return len(self.x) if self.rows.start is None else 0

    def base(self, weight: Tensor) -> Tensor:
        """Return `[tokens, rows]`, with the bits that torch gives where a weight is trained."""
        self.shape = weight.shape
        y = F.linear(self.x, weight[self.rows], None if self.adds else self.bias)
        return y + self.bias.to(y.dtype) if self.adds else y  # type: ignore[union-attr]

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return what the rows make of an input by a weight, without their bias."""
        return F.linear(x, weight[self.rows])

    def factors(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Return `[rank, in]` and `[rank, rows]`."""
        return A, B[self.rows].t()

    def across(self, values: Tensor) -> Tensor:
        """Return of the weight's numbers those of the rows."""
        return values[self.rows]

    def unbiased(self, y: Tensor) -> Tensor:
        """Return `y - bias`."""
        return y if self.bias is None else y - self.bias.to(y.dtype)


class Projection(Tensor):
    """An adapted weight, or some rows of it, as torch's attention reads it.

    `F.linear` computes with it in activation space, and torch takes no kernel of several layers,
    because it is no plain tensor. All else gets the sum.
    """

    of: tuple[Any, ...]
    rows = slice(None)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer what is asked of the weight itself, project by it, or form it."""
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if func is F.linear and isinstance(args[1], cls):
            return args[1]._project(args[0], *args[2:], **kwargs)
        if func is F.multi_head_attention_forward and func.__globals__ is vars(F):
            return _unasking(func)(*args, **kwargs)
        if name in SHAPE or name in ("split", "chunk"):
            with torch._C.DisableTorchFunctionSubclass():
                answer = func(*args, **kwargs)
            return answer if name in SHAPE else args[0]._blocks(answer)
        args, kwargs = tree_map_only(cls, cls._formed, (args, kwargs))
        return func(*args, **kwargs)

    def _project(self, x: Tensor, bias: Tensor | None = None) -> Any:
        *_, weight, plan, routing = self.of
        run = ProjectionRun(x, bias, self.rows, is_unseen(weight))
        run.routing = routing
        return computed(run, weight, plan)

    def _blocks(self, parts: Sequence[Tensor]) -> list[Projection]:
        blocks, stop = [], self.rows.start or 0
        for part in parts:
            block = _as_projection(part, self.of)
            block.rows = slice(stop, stop := stop + len(part))
            blocks.append(block)
        return blocks

    def _formed(self) -> Any:
        module, name, chain, *_, routing = self.of
        return formed(module, name, chain, routing is not None)[self.rows]


def _as_projection(weight: Tensor, of: tuple[Any, ...]) -> Projection:
    projection = weight.detach().as_subclass(Projection)
    projection.of = of
    return projection


def _unasking(attend: Any) -> Any:
    """Return torch's attention without its question whether an argument is a plain tensor."""
    scope = {**attend.__globals__, "has_torch_function": lambda tensors: False}
    return types.FunctionType(attend.__code__, scope, attend.__name__, attend.__defaults__)


def attends(frame: types.FrameType) -> bool:
    """Say whether a frame is of torch's own attention, or its encoder layer, on a plain batch."""
    if (argument := READERS.get(frame.f_globals.get("__name__", ""))) is None:
        return False
    module, x = map(frame.f_locals.get, ("self", argument))
    kind: Any = type_before(module) if isinstance(module, nn.Module) else object
    if not (kind is nn.TransformerEncoderLayer or issubclass(kind, nn.MultiheadAttention)):
        return False
    return "forward" not in module.__dict__ and isinstance(x, Tensor) and not x.is_nested


_computes_as_its_row = functools.lru_cache(maxsize=64)(computes_as_its_row)


def projection(
    module: nn.Module, name: str, layer: Layer, chain: nn.Module, routing: Routing | None
) -> Projection | None:
    """Return a weight as torch's attention reads it; `None` where it reads the sum."""
    found, kind = acting(module, name, layer, False, routing), type_before(module)
    if found is None or not (_computes_as_its_row(kind) and is_unseen(found[0])):  # type: ignore[arg-type]
        return None
    weight, plan = found
    if plan.in_front or not plan.acting or plan.space == "weight":
        return None
    if not (torch.is_grad_enabled() or _leaves_kernels(plan, weight)):
        return None
    return _as_projection(weight, (module, name, chain, weight, plan, routing))


def _leaves_kernels(plan: Plan, weight: Tensor) -> bool:
    """Say whether inference pays without torch's kernels, and the base's bits aren't expected."""
    drops = any(delta.training for delta in plan.dropping)
    if plan.rank and not drops and min(weight.shape) <= NARROW and is_exact(weight, weight):
        return False
    deltas = [delta for run in plan.acting for delta in run]
    fresh = [delta for delta in deltas if delta not in _learnt]
    _learnt.update(delta for delta in fresh if not torch.equal(delta(weight), weight))
    return any(delta in _learnt for delta in deltas)
