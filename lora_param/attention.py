"""Torch's attention in activation space: what its own code, and no other, gets as a weight."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import FrameType, FunctionType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 as everybody calls it
from torch.utils._pytree import tree_map_only

from .activation import Plan, acting, computed
from .chains import chains_of, type_before
from .deltas.protocol import Delta
from .groups import SHAPE
from .layers import Layer, computes_as_its_row
from .ops import LinearRun, is_exact, is_unseen
from .places import is_captured
from .routing import Routing

READERS = {"torch.nn.modules.activation": "query", "torch.nn.modules.transformer": "src"}
"""The modules of torch's attention and encoder layer, and what these call their input."""

KERNEL = 64
"""How much wider than twice its tokens an input is for which torch's kernels pay in inference."""

_learnt: WeakSet[Delta] = WeakSet()
_formed: WeakKeyDictionary[nn.Module, ref[Tensor]] = WeakKeyDictionary()  # by chain


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
        """Return those of the rows of what there is for each of the weight's."""
        return values[self.rows] if len(values) == self.shape[0] else values


class Projection(Tensor):
    """An adapted weight, or some rows of it, as torch's attention reads it.

    `F.linear` computes with it in activation space, and torch takes no kernel of several layers,
    because it is no plain tensor. All else gets the sum.
    """

    of: tuple[Any, ...]  # chain, weight, plan and routing
    rows = slice(None)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer what is asked of the weight itself, project by it, or form it."""
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if func is F.linear and any(isinstance(each, cls) for each in args[1:2]):
            return args[1]._project(args[0], *args[2:], **kwargs)
        if func is F.multi_head_attention_forward and func.__globals__ is vars(F):
            # Without its question whether an argument is a plain tensor.
            scope = {**vars(F), "has_torch_function": lambda tensors: False}
            return FunctionType(func.__code__, scope, name, func.__defaults__)(*args, **kwargs)
        cuts = name in ("split", "chunk") and len(args) == 2 and not kwargs.get("dim", 0)
        if cuts or name in SHAPE:
            with torch._C.DisableTorchFunctionSubclass():
                answer = func(*args, **kwargs)
            if cuts or not isinstance(answer, Tensor):
                return args[0]._blocks(answer) if cuts else answer
        args, kwargs = tree_map_only(cls, cls._formed, (args, kwargs))
        return func(*args, **kwargs)

    def _project(self, x: Tensor, bias: Tensor | None = None) -> Any:
        _, weight, plan, routing = self.of
        run = ProjectionRun(x, bias, self.rows, is_unseen(weight))
        run.routing = routing
        return computed(run, weight, plan)

    def _blocks(self, parts: Sequence[Tensor]) -> list[Projection]:
        blocks, stop = [], self.rows.start or 0
        for part in parts:
            blocks.append(part.as_subclass(Projection))
            blocks[-1].of, blocks[-1].rows = self.of, slice(stop, stop := stop + len(part))
        return blocks

    def _formed(self) -> Any:
        return self.of[0]()[self.rows]


def attended(
    frame: FrameType, module: nn.Module, name: str, layer: Layer, routing: Routing | None, form: Any
) -> Any:
    """Return a weight for a frame of torch's attention or encoder layer; for another `None`."""
    if (argument := READERS.get(frame.f_globals.get("__name__", ""))) is None:
        return None
    seen, chain = frame.f_locals, chains_of(module)[name]
    reader, x = map(seen.get, ("self", argument))
    encodes = type(reader) is nn.TransformerEncoderLayer
    if not (encodes or isinstance(reader, nn.MultiheadAttention)) or "forward" in reader.__dict__:
        return None
    for each in seen.get("tensor_args", ()):  # of what it asks, before a kernel gets it
        if chain in _formed and each is _formed[chain]():
            return each
    value = None
    if isinstance(x, Tensor) and not x.is_nested:
        value = _read(module, name, layer, routing, x)
    if type(value) is not Projection:
        _formed[chain] = ref(value := form(module, chain) if value is None else value)
    return value


def _read(module: nn.Module, name: str, layer: Layer, routing: Routing | None, x: Tensor) -> Any:
    found = acting(module, name, layer, False, routing)
    if found is None or not (is_unseen(found[0]) and computes_as_its_row(type_before(module))):
        return None
    weight, plan = found
    if plan.in_front or not plan.acting or plan.space == "weight":
        return None
    if not torch.is_grad_enabled():
        if plan.rank and _pays_kernels(plan, weight, x):
            if routing:  # whose strengths a sum doesn't have
                return None
            for delta in itertools.chain(*plan.acting):
                weight = delta.sum(weight)
            return weight
        if not _has_learnt(plan, weight):
            return None
    read = weight.detach().as_subclass(Projection)
    read.of = chains_of(module)[name], weight, plan, routing
    return read


def _pays_kernels(plan: Plan, weight: Tensor, x: Tensor) -> bool:
    """Say whether a sum pays in inference, which torch's kernels of several layers can take."""
    if any(delta.training for delta in plan.dropping):
        return False
    width, tokens = x.shape[-1:].numel(), x.shape[:-1].numel()
    return width <= KERNEL + 2 * tokens and is_exact(weight, weight)


def _has_learnt(plan: Plan, weight: Tensor) -> bool:
    """Say whether any delta has changed a weight, whose own bits are expected where none has."""
    deltas = [delta for run in plan.acting for delta in run]
    unasked = weight.is_meta or is_captured(weight)  # torch's kernels are right for any values
    fresh = [delta for delta in deltas if not unasked and delta not in _learnt]
    _learnt.update(delta for delta in fresh if not torch.equal(delta(weight), weight))
    return any(delta in _learnt for delta in deltas)
