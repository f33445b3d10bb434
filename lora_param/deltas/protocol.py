"""What a delta is: one adapter's change of one weight, a map from weight to weight."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ..errors import AdapterError, LoRAError, StateDictError
from ..offloaded import train_nothing
from ..ops import autocasts
from ..quantised import dense
from ..rows import Rows
from ..sharding import mesh_of, whole
from .switching import Switched

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The dtypes that weights and a delta's tensors can have."""

SPACES = ("activation", "weight", "auto")
"""Where a delta can be asked to act, the first of those on one weight first; `"auto"` by cost."""

Shape = tuple[int, ...]
Parts = tuple[tuple[str, ...], tuple[str, ...]]


class Delta(Switched):
    """What one adapter does to one weight, as a parametrization of torch's.

    A kind is a subclass in a file of its own and a row in `KINDS`. It says what the weight becomes
    (`value`) and, where that can be had without forming the weight, how the layer's output changes
    (`act`). Its tensors are its parameters, its numbers are `numbers`; both are its state. `rows`
    are those of the weight that change, all of them for `None`, counted in its dimension `dim`.
    """

    kind: ClassVar[str]
    options: ClassVar[tuple[str, ...]]
    """Which options of `register_lora` the kind takes."""

    parts: ClassVar[Parts]
    """The names of its parameters and of its buffers, as a fresh one has them."""

    least_dimensions: ClassVar[int] = 1
    act: ClassVar[Any] = None
    """`(y, x, run, others)` to a layer's output for the input `x`, which was `y` so far and may be
    changed in place; `others` are deltas of the kind directly behind. `None` where there is none.
    `run`, of `ops`, is all that is known of the layer."""

    routes: ClassVar[Any] = None
    """`(routing, before, transposed)` to whether `act` heeds a routing, of rows that differ in what
    acts on them, behind these deltas and on a weight stored so; `None` where it never does."""

    sum: ClassVar[Any] = None
    """`(weight)` to its value within rounding, quicker, where a `width` is all that this costs."""

    of_buffers: ClassVar[bool] = False
    """Whether it stands for a buffer that training moves, and is made with `freeze` alone."""

    of_values: ClassVar[bool] = False
    """Whether a fresh one depends on what others beneath it have made of the weight."""

    width = 0  # of the product that it is
    space = "auto"  # of `SPACES`
    by_rows = True  # whether a row of its value depends on that row of the weight alone
    adapter = ""  # not annotated, because torch.jit.script reads that
    rows = cast("Rows | None", None)
    dim = 0
    origin = ""  # which kind it was in another library's file
    _holds = cast("set[Any]", frozenset())  # of `frozen`

    def __init__(self, adapter: str, dtype: torch.dtype | None) -> None:
        super().__init__()
        check_adapter(adapter)
        if (dtype := dtype or torch.get_default_dtype()) not in FLOATS:
            known = show_dtypes(*FLOATS)
            raise LoRAError(f"an adapter's dtype must be one of {known}, got {dtype}")
        self.__dict__.update(adapter=adapter)

    def has_own(self, name: str) -> bool:
        """Whether its very class defines it; a subclass, as of parametrized tensors, may differ."""
        return name in type(self).__dict__  # torch 2.6 traces no vars()

    @classmethod
    def make(cls, weight: Tensor, view: Shape, **options: Any) -> Delta:
        """Build a fresh delta, which changes nothing yet, for a weight of this matrix view."""
        raise NotImplementedError

    @classmethod
    def restore(
        cls, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], parts: Parts | None = None
    ) -> Delta:
        """Build the delta of these tensors, of which none is copied, or raise `StateDictError`."""
        delta = cls.__new__(cls)
        Delta.__init__(delta, "default", None)
        parameters, buffers = parts or cls.parts
        for name in parameters:
            own = tensors[name]
            own = own if isinstance(own, nn.Parameter) else nn.Parameter(own.detach())
            delta._parameters[name] = own
        delta._buffers.update({name: tensors[name] for name in buffers})
        delta.numbers = dict(numbers)
        return delta

    def made_of(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> Delta:
        """Build another of its kind, with its adapter's name, its rows, strength and space."""
        delta = self.restore(tensors, numbers)
        delta.adapter, delta.strength, delta.space = self.adapter, self.strength, self.space
        delta.rows, delta.dim = self.rows, self.dim
        return delta

    @property
    def numbers(self) -> dict[str, Any]:
        """All that decides its value beside its tensors, for JSON."""
        return {}

    @numbers.setter
    def numbers(self, numbers: Mapping[str, Any]) -> None:
        if numbers.keys() != self.numbers.keys() or None in numbers.values():
            own, got = list(self.numbers), list(numbers)
            raise StateDictError(f"a {self.kind} delta has {own}, got {got}"[:300])
        for name in self.numbers:
            setattr(self, name, numbers[name])

    def misfit(self, shape: Shape, view: Shape) -> str | None:
        """Say why it can't be a weight's of this shape and matrix view; `None` if it can."""
        for name, own in (*self.named_parameters(), *self.named_buffers()):
            if (got := tuple(own.shape)) != shape:
                return f"its {name} is {got}, should be {shape}"
        return None

    def value(self, weight: Tensor) -> Tensor:
        """Return the adapted weight, in the weight's shape and dtype."""
        raise NotImplementedError

    def block(self, start: int, stop: int) -> Delta:
        """Return the delta of some of the weight's rows; its tensors are views of these."""
        raise NotImplementedError

    def rebased(self, old: Tensor, new: Tensor) -> dict[str, Tensor]:
        """Return those of its tensors that are others on another base."""
        return {}

    def singular_values(self, shape: Shape) -> Tensor:
        """Return those of what is added to a weight of this shape, `[*batch, count]`, if any is."""
        return torch.zeros(0)

    def along(self, name: str, dim: int) -> int | None:
        """Return which dimension of a tensor of its lies along one of the weight's, if any does."""
        return dim

    def gathered(self) -> Delta:
        """Return it with tensors that are whole, itself if they are."""
        tensors = {**self._parameters, **self._buffers}
        if mesh_of(tensors.values()) is None:
            return self
        return self.made_of({name: whole(each) for name, each in tensors.items()}, self.numbers)

    def reset_parameters(self) -> None:
        """Make its tensors those of a fresh delta, which changes nothing."""
        raise NotImplementedError

    @property
    def is_away(self) -> bool:
        """Whether its tensors are on the meta device, in part or all."""
        return any(each.is_meta for each in (*self.parameters(), *self.buffers()))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        away = self.is_away
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if away and not self.is_away:
            self.reset_parameters()  # `to_empty` has given them memory, and no values
        return self

    def forward(self, weight: Tensor) -> Tensor:
        """Return the adapted weight, in the weight's shape and dtype, also inside autocast."""
        if not self.now().on:
            return weight
        if "_hf_hook" in self.__dict__:
            train_nothing(self)
        weight = dense(weight)
        if autocasts(weight):
            with torch.autocast(weight.device.type, enabled=False):
                return self.forward(weight)
        if self.rows is None:
            return self.value(weight)
        return self.rows.put(weight, self.value(self.rows.take(weight, self.dim)), self.dim)

    def get_extra_state(self) -> Tensor:
        """Return kind and numbers as a tensor, which every way to keep a state dict can hold."""
        said: dict[str, Any] = {"kind": self.kind, **self.numbers}
        if self.strength != 1:
            said["strength"] = self.strength
        if self.rows is not None:
            said["rows"] = str(self.rows)
        text = json.dumps(said).encode()
        size = -(-len(text) // 256) * 256  # so that states can be copied into each other
        return torch.frombuffer(bytearray(text.ljust(size)), dtype=torch.uint8)

    def set_extra_state(self, state: object) -> None:
        """Take over the numbers of a delta of the same kind, or raise a `StateDictError`."""
        try:
            # Also of a state dict whose every tensor has been made half, or averaged with another.
            said = json.loads(bytes(map(int, state.cpu().tolist())))  # type: ignore[attr-defined]
        except (AttributeError, TypeError, ValueError, RuntimeError, RecursionError):
            said = None
        if not isinstance(said, dict):
            raise StateDictError(
                f"must hold a delta's kind and numbers, got {type(state).__name__}"
            )
        rows = None if self.rows is None else str(self.rows)
        for what, own in (("kind", self.kind), ("rows", rows)):
            if (theirs := said.pop(what, None)) != own:
                raise StateDictError(f"its {what} must be {own!r}, got {theirs!r:.40}")
        strength = said.pop("strength", 1.0)
        self.check_strength(strength)
        self.numbers, self.strength = said, strength

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.__dict__["_switch"] = self._places[-1].switch  # all that an older pickle has
        for hold in self._holds:  # a copy's
            hold.add(self)

    def _load_from_state_dict(self, *args: Any) -> None:
        try:
            super()._load_from_state_dict(*args)
        except LoRAError as error:  # torch says it with all else that doesn't fit
            args[-1].append(f"{args[1]}_extra_state: {error}")

    def extra_repr(self) -> str:
        """Name, numbers and state, for `print(model)`."""
        said = self.numbers | ({} if self.strength == 1 else {"strength": self.strength})
        numbers = [f"{n}={v if isinstance(v, str) else format(v, 'g')}" for n, v in said.items()]
        return ", ".join([repr(self.adapter), *numbers, "enabled" if self.enabled else "disabled"])


def tensors_of(delta: Delta) -> dict[str, Tensor]:
    """Return a delta's parameters and buffers by name, without a graph."""
    own = (*delta.named_parameters(), *delta.named_buffers())
    return {name: tensor.detach() for name, tensor in own}


def check_adapter(adapter: object) -> None:
    """Raise unless `adapter` can be an adapter's name."""
    if not isinstance(adapter, str) or not adapter or "." in adapter:
        rule = "a non-empty string without dots"
        raise AdapterError(f"an adapter's name must be {rule}, got {adapter!r}")


def show_dtypes(*dtypes: torch.dtype) -> str:
    """Return the dtypes' names without `torch.`, comma-separated."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
