"""How the rows of a batch are routed in this context, as deltas and layers ask for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .errors import LoRAError


class Switch(NamedTuple):
    """How a delta acts: at all, how strongly, and whether it may be trained meanwhile."""

    on: bool = True
    strength: Any = 1.0  # of a learned mixture a tensor
    trained: bool = True


OFF = Switch(on=False)
KEY = "lora_param.routings"


class Routing:
    """What acts on each row of a batch: `weights[row, column]` is an adapter's strength there.

    `columns` are those of a model's deltas, -1 of one that acts on no row; of a chain or a module
    with deltas, -1 where none of them acts. `dims` say of each such module which dimension of its
    input has the rows, and whether that was said by somebody.
    """

    used: ClassVar[bool] = False
    """Whether there is any in some context: otherwise nobody looks for one."""

    run: Any = None  # runs a module by groups of rows, past any compiler

    def __init__(
        self,
        weights: Tensor,
        columns: dict[nn.Module, int],
        dims: Mapping[nn.Module, tuple[int, bool]],
        paths: Mapping[nn.Module, str],
    ) -> None:
        self.weights, self.columns, self.dims, self.paths = weights, columns, dims, paths
        self.rows = len(weights)
        self.plans: dict[Any, Any] = {}
        self._tables: dict[Any, Tensor] = {}

    def switch(self, delta: nn.Module) -> Switch:
        """Return how a delta acts where all rows are alike, or raise if they aren't."""
        if (column := self.columns[delta]) < 0:
            return OFF
        if self.rows > 1:
            raise LoRAError(
                "a weight is read while each row of the batch has adapters of its own "
                "(lora_routed); call its module on the batch, or do this outside of the block"
            )
        strength: Any = self.weights[0, column]
        if not strength.requires_grad:
            strength = self._settings[0][column]
        return Switch(bool(strength != 0) or isinstance(strength, Tensor), strength)

    def separates(self, module: nn.Module) -> bool:
        """Say whether rows differ in what acts on them in a module, or a chain."""
        return self.rows > 1 and self.columns[module] >= 0

    @cached_property
    def _settings(self) -> list[list[float]]:
        settings: list[list[float]] = self.weights.tolist()
        return settings

    @cached_property
    def groups(self) -> list[tuple[list[int], Routing]]:
        """Rows of one setting, and a routing of one row for them; of a learned mixture each."""
        rows: dict[Any, list[int]] = {}
        for row in range(self.rows):
            own = row if self.weights.requires_grad else tuple(self._settings[row])
            rows.setdefault(own, []).append(row)
        return [
            (each, Routing(self.weights[each[:1]], self.columns, self.dims, self.paths))
            for each in rows.values()
        ]

    @cached_property
    def choices(self) -> tuple[list[int], list[float]] | None:
        """Each row's only column and its strength, if no row mixes."""
        if self.weights.requires_grad:
            return None
        found = [[c for c, strength in enumerate(row) if strength] for row in self._settings]
        if any(len(own) > 1 for own in found):
            return None
        columns = [own[0] if own else 0 for own in found]
        return columns, [row[c] for row, c in zip(self._settings, columns, strict=True)]

    def table(self, deltas: Sequence[Any], columns: Sequence[int], low: Tensor) -> Tensor:
        """Return what the columns of the deltas' joint inner factor are multiplied by: `[rows, n]`.

        `columns` says how many of them each delta has.
        """
        spans = tuple((self.columns[d], d.scale, n) for d, n in zip(deltas, columns, strict=True))
        traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
        kept = not (self.weights.requires_grad or traced)
        key = (spans, low.dtype, low.device)
        if kept and key in self._tables:
            return self._tables[key]
        wide = torch.promote_types(self.weights.dtype, torch.float32)
        weights = self.weights.to(low.device, wide)
        parts = [weights[:, c : c + 1].expand(-1, n) * scale for c, scale, n in spans]
        table = torch.cat(parts, 1).to(low.dtype)
        if kept:
            self._tables[key] = table
        return table

    def dim_of(self, module: nn.Module, x: Tensor, candidates: int) -> int:
        """Return which of an input's first dimensions has the rows, or raise."""
        (dim, said), shape = self.dims[module], x.shape
        if not torch.compiler.is_compiling() and _is_mapped(x):
            reason = "vmap hides the rows of a routed batch; route inside of it, or do without it"
            raise LoRAError(f"{self.paths[module] or 'model'}: {reason}")
        n = self.rows
        fits = dim < candidates and shape[dim] % n == 0
        doubtful = not said and any(shape[d] == n for d in range(candidates) if d != dim)
        if not fits or doubtful:
            path = self.paths[module] or "model"
            where = f"{path}: its input is {tuple(shape)}, and"
            what = f"dimension {dim} can't hold {n} rows or a multiple of that"
            if fits:
                what = f"more than one dimension could be that of the {n} rows"
            fix = f'say which it is by dims={{"{path}": ...}}, or dim= for all'
            raise LoRAError(f"{where} {what}; {fix}, or take the adapters off this layer")
        return dim


def _is_mapped(x: Tensor) -> bool:
    """Say whether a dimension of a tensor is vmap's."""
    transforms = torch._C._functorch
    while transforms.is_functorch_wrapped_tensor(x):
        if transforms.is_batchedtensor(x):
            return True
        x = transforms.get_unwrapped(x)
    return False


_open: list[Routing] = []  # in any context
_lock = threading.Lock()
_routings: ContextVar[tuple[Routing, ...]] = ContextVar("lora_routings", default=())


def routing_of(module: nn.Module) -> Routing | None:
    """Return the routing in this context that knows a delta, a chain or a module."""
    routings = _routings.get()
    if not routings and not torch.compiler.is_compiling() and torch._C._is_key_in_tls(KEY):
        # In a thread of autograd's, which recomputes what checkpointing has dropped. What a thread
        # has noted itself may be of another of its tasks.
        thread, noted = torch._C._get_obj_in_tls(KEY)
        routings = () if thread == threading.get_ident() else noted
    for routing in reversed(routings):
        if module in routing.columns:
            return routing if routing.rows else None
    return None


def left_out(module: nn.Module, chain: nn.Module, delta: nn.Module) -> None:
    """Let a delta that is new act on no row of the batches that are being routed."""
    for routing in _open if Routing.used else ():
        if module in routing.paths:
            for known in (module, chain, delta):
                routing.columns.setdefault(known, -1)


@contextmanager
def unrouted(deltas: Sequence[Any], adapter: str | None = None) -> Iterator[None]:
    """Let no routing that holds here hold for deltas' models in a block, or for one adapter."""
    with ExitStack() as block:
        for routing in {routing_of(delta): None for delta in deltas}:
            if routing is not None:
                weights = routing.weights[:0]
                if adapter is not None:
                    own = [routing.columns[d] for d in deltas if routing.columns.get(d, -1) >= 0]
                    index = torch.tensor([*{*own}], dtype=torch.long, device=routing.weights.device)
                    weights = routing.weights.index_fill(1, index, 0)
                block.enter_context(
                    routed_here(Routing(weights, routing.columns, routing.dims, routing.paths))
                )
        yield


@contextmanager
def routed_here(routing: Routing) -> Iterator[None]:
    """Let a routing hold in a block, in this thread or task."""
    with _lock:
        _open.append(routing)
        Routing.used = True
    _enter((*_routings.get(), routing))
    try:
        yield
    finally:
        _enter(tuple(each for each in _routings.get() if each is not routing))
        with _lock:
            _open.remove(routing)
            Routing.used = bool(_open)


def _enter(routings: tuple[Routing, ...]) -> None:
    _routings.set(routings)
    torch._C._stash_obj_in_tls(KEY, (threading.get_ident(), routings))
