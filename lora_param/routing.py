"""How the rows of a batch are routed in this context, as deltas and layers ask for it."""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .errors import LoRAError
from .places import Places, is_captured, is_traced


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
    with deltas, -1 where none of them acts.
    """

    used: ClassVar[bool] = False
    """Whether there is any in some context: otherwise nobody looks for one."""

    def __init__(self, weights: Tensor, columns: dict[Any, int], places: Places) -> None:
        self.weights, self.columns, self.places = weights, columns, places
        self.rows, self.settings = len(weights), weights.tolist()
        found = [[(c, s) for c, s in enumerate(row) if s] for row in self.settings]
        self.mixed = any(own[1:] for own in found)
        self._choices = [(*own, (0, 0.0))[0] for own in found]
        self.plans: dict[Any, Any] = {}
        self._tensors: dict[Any, Tensor] = {}

    def of(self, weights: Tensor) -> Routing:
        """Return the same for other strengths."""
        return Routing(weights, self.columns, self.places)

    def switch(self, delta: nn.Module) -> Switch:
        """Return how a delta acts where all rows are alike, or raise if they aren't."""
        if (column := self.columns[delta]) < 0:
            return OFF
        if self.rows > 1:
            raise LoRAError(
                "a weight is read while each row of the batch has adapters of its own "
                "(lora_routed); call its module on the batch, or do this outside of the block"
            )
        if delta.adds and (self.weights.requires_grad or self.is_input):
            return Switch(True, self.weights[0, column])
        self.check_fixed()
        return Switch(self.settings[0][column] != 0, self.settings[0][column])

    @property
    def is_input(self) -> bool:
        """Whether what runs is recorded, to run again on what its tensor of strengths has then."""
        return is_traced() or is_captured(self.weights)

    def check_fixed(self) -> None:
        """Raise where a CUDA graph would not see what is written into its tensor of strengths."""
        if is_captured(self.weights):
            reason = "a CUDA graph sees new strengths of what adds alone, in activation space alone"
            raise LoRAError(f"{reason}; name each row's adapters instead of giving a tensor")

    def separates(self, module: nn.Module) -> bool:
        """Say whether rows differ in what acts on them in a module, or a chain."""
        return self.rows > 1 and self.columns[module] >= 0

    def mixes(self, delta: nn.Module, others: Sequence[nn.Module]) -> bool:
        """Say whether a row has a delta and another adapter's of these, or that isn't known."""
        if self.is_input:  # where a row may mix them later
            return bool(others) and (self.mixed or not is_traced())
        own = self.columns[delta]
        rest = {self.columns[each] for each in others} - {own}
        meets = (row[own] and any(row[c] for c in rest) for row in self.settings)
        return self.mixed and any(meets)

    @functools.cached_property
    def groups(self) -> list[tuple[list[int], Routing]]:
        """Rows of one setting, and a routing of one row for them; of a learned mixture each."""
        rows: dict[Any, list[int]] = {}
        for row in range(self.rows):
            own = row if self.weights.requires_grad else tuple(self.settings[row])
            rows.setdefault(own, []).append(row)
        return [(each, self.of(self.weights[each[:1]])) for each in rows.values()]

    @property
    def choices(self) -> list[tuple[int, float]] | None:
        """Each row's only column and its strength; `None` if a row mixes, or that isn't known."""
        unknown = self.is_input or torch._C._are_functorch_transforms_active()
        return None if unknown or self.weights.requires_grad or self.mixed else self._choices

    def table(self, deltas: Sequence[Any], widths: Sequence[int], like: Tensor) -> Tensor:
        """Return a number for each row and column of the deltas' joint inner factor, `[rows, n]`.

        `widths` says how many of them each delta has.
        """
        spans = tuple((self.columns[d], n) for d, n in zip(deltas, widths, strict=True))
        dtype = torch.promote_types(like.dtype, torch.float32)

        def table() -> Tensor:
            weights = self.weights.to(like.device, dtype)
            return torch.cat([weights[:, c : c + 1].expand(-1, n) for c, n in spans], 1)

        if self.weights.requires_grad or self.is_input:
            return table()
        return self._kept((spans, dtype, like.device), table)

    def on(self, device: torch.device, numbers: Sequence[float], dtype: Any = None) -> Tensor:
        """Return numbers as a tensor on a device, which gets them once for all layers."""
        make = functools.partial(torch.tensor, numbers, device=device, dtype=dtype)
        return self._kept((*numbers, dtype, device), make)

    def _kept(self, key: tuple[Any, ...], make: Callable[[], Tensor]) -> Tensor:
        key = (*key, torch.is_inference_mode_enabled())  # what that makes, no graph can save
        if key not in self._tensors:
            self._tensors[key] = make()
        return self._tensors[key]


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
        if module in routing.places.known:
            for known in (module, chain, delta):
                routing.columns.setdefault(known, -1)


@contextmanager
def unrouted(deltas: Sequence[Any], adapter: str | None = None) -> Iterator[None]:
    """Let no routing that holds here hold for deltas' models in a block, or for one adapter."""
    with ExitStack() as block:
        for routing in {found for delta in deltas if (found := routing_of(delta))}:
            weights = routing.weights[:0]
            if adapter is not None:
                weights = routing.weights.clone()
                own = {routing.columns.get(delta, -1) for delta in deltas} - {-1}
                weights[:, [*own]] = 0
            block.enter_context(routed_here(routing.of(weights)))
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
    noted = (threading.get_ident(), routings)
    count = sys.getrefcount(noted)
    torch._C._stash_obj_in_tls(KEY, noted)
    if sys.getrefcount(noted) == count:  # torch 2.6 keeps it, and takes no reference for that
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(noted))
