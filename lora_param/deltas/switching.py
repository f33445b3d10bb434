"""How a delta is switched: whether it acts, how strongly, and whether it may be trained."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, cast
from weakref import WeakSet

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from ..chains import originals_of, run_through
from ..errors import LoRAError
from ..routing import Routing, Switch, routing_of
from .numbers import check_alpha


class _Place:
    """Where a switch is, with an identity."""

    switch = Switch()


_flags = threading.Lock()


class Switched(nn.Module):
    """What has a switch of its own, and those of blocks that aren't over, of which the last holds.

    Blocks may begin and end in any order, in threads or generators.
    """

    kind: ClassVar[str]
    adds: ClassVar[bool] = False
    """Whether its value is `W` plus something, which a strength can multiply."""

    switched: ClassVar[object] = object()
    """Another object after every change of a switch: what was planned before holds no more."""

    _places = cast("list[_Place]", [])  # of its own switch, and those of blocks that aren't over
    _switch = Switch()  # the last of their switches
    _chains = cast("WeakSet[Chain]", frozenset())  # in which it stands, a chain's copies too
    _resting = cast("tuple[str, ...]", ())  # its parameters whose flags a switch has taken away

    def __init__(self) -> None:
        super().__init__()
        self.__dict__.update(_places=[_Place()], _switch=Switch())

    @property
    def switch(self) -> Switch:
        """How it acts now."""
        return self._switch

    @switch.setter
    def switch(self, switch: Switch) -> None:
        self._places[-1].switch = switch
        self._switched()

    def now(self) -> Switch:
        """How it acts here and now: by its switch, or as the batch is routed."""
        routing = routing_of(self) if Routing.used else None
        return self._switch if routing is None else routing.switch(self)

    @contextmanager
    def switched_for_now(self, switch: Switch) -> Iterator[None]:
        """Switch it for a block, also beside other blocks that begin and end in any order.

        Gradients of what may not be trained in the block are away meanwhile.
        """
        own, resting = _Place(), [] if switch.trained else list(self.parameters())
        own.switch, grads = switch, [(each, each.grad) for each in resting]
        self._places.append(own)
        try:
            self._switched()
            yield
        finally:
            self._places.remove(own)
            self._switched()
            for parameter, grad in grads:
                parameter.grad = grad

    def _switched(self) -> None:
        """Let plans know, and flags follow: those that were taken away come back."""
        own = None
        while own is not Switched.switched:  # again where another thread has switched meanwhile
            again, own = own is not None, object()
            Switched.switched = own
            self.__dict__["_switch"] = self._places[-1].switch
            for chain in [*self._chains]:
                if again:
                    chain.note()
                elif self._switch.on != (self in chain.acting):
                    chain.turn(self)
        if self._switch.trained and not self._resting:
            return
        with _flags:
            parameters, trained = dict(self.named_parameters()), self._switch.trained
            flagged = [name for name in parameters if parameters[name].requires_grad]
            resting = tuple(dict.fromkeys((*self._resting, *flagged)))
            self.__dict__["_resting"] = () if trained else resting
            for name in resting:
                parameters[name].requires_grad_(trained)
                parameters[name].grad = parameters[name].grad if trained else None

    def __getstate__(self) -> dict[str, Any]:
        return {name: own for name, own in self.__dict__.items() if name != "_chains"}

    @property
    def trains(self) -> bool:
        """Whether any of its parameters requires a gradient, or did when it was last trained."""
        return bool(self._resting) or any(each.requires_grad for each in self.parameters())

    @property
    def enabled(self) -> bool:
        """Whether it acts."""
        return self.switch.on

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        self.switch = self.switch._replace(on=enabled)

    @property
    def strength(self) -> float:
        """What multiplies all that it adds to a weight."""
        return cast(float, self.switch.strength)

    @strength.setter
    def strength(self, strength: float) -> None:
        self.switch = self.switch._replace(strength=self.check_strength(strength))

    def check_strength(self, strength: object) -> float:
        """Return a strength that it can act with as a float, or raise."""
        if (value := check_alpha(strength, 1, "a strength")) != 1 and not self.adds:
            reason = f"a {self.kind} delta adds nothing that could be multiplied"
            raise LoRAError(f"a strength must be 1, because {reason}, got {strength!r}")
        return value


def _noting(name: str) -> Any:
    method = getattr(ParametrizationList, name)

    def call(self: Chain, *args: Any) -> None:
        method(self, *args)
        self.note()

    return call


class Chain(ParametrizationList):
    """A weight's parametrizations; compiled code finds those that are on in one place, `acting`."""

    acting = cast("tuple[nn.Module, ...]", ())
    unsafe, is_tensor, ntensors = True, True, 1
    add_module, insert = _noting("add_module"), _noting("insert")  # by torch and by hand
    __setattr__, __delattr__ = _noting("__setattr__"), _noting("__delattr__")
    __setstate__ = _noting("__setstate__")

    def __init__(self, original: Tensor | None, training: bool) -> None:
        # Past torch's own, whose set_() on the original would invalidate graphs that have saved it.
        nn.Module.__init__(self)
        table: Any = self._parameters if isinstance(original, nn.Parameter) else self._buffers
        table["original"], self.__dict__["training"] = original, training

    def forward(self) -> Tensor:
        """Return the weight that they make of the original."""
        entries = tuple(self._modules.values()) if Routing.used else self.acting
        return run_through(entries, originals_of(self))

    def turn(self, entry: Switched) -> None:
        """Take one entry in or out, as its switch says, in less time than all are looked at."""
        acting = self.acting
        if not entry._switch.on and acting.count(entry) == 1:
            at = acting.index(entry)
            acting = acting[:at] + acting[at + 1 :]
        else:
            on = {*acting, entry} if entry._switch.on else {*acting} - {entry}
            acting = tuple(filter(on.__contains__, self._modules.values()))
        self.__dict__["acting"] = acting

    def note(self) -> None:
        """Find out which of its entries are on, and be told by their switches."""
        seen = None
        while seen is not Switched.switched:  # without a lock, which a fault could leave locked
            seen = Switched.switched
            for entry in self._modules.values():
                if isinstance(entry, Switched):
                    entry.__dict__.setdefault("_chains", WeakSet()).add(self)
            on = [e for e in self._modules.values() if not isinstance(e, Switched) or e._switch.on]
            self.__dict__["acting"] = tuple(on)
