"""Torch's lists of parametrizations as they stand in a module, and what we note beside them."""

from __future__ import annotations

import threading
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList


class Record:
    """What a module remembers, as `_lora`: its class and order of parameters before, and plans.

    A copy has neither class nor plans, because torch makes a class for one module alone.
    """

    def __init__(self, type: type[nn.Module] | None = None, order: tuple[str, ...] = ()) -> None:
        self.type, self.order = type, order
        self.plans: dict[str, Any] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Record, (None, self.order)


class Reading(threading.local):
    """The modules whose weights a stock forward reads in this thread, and what it has read."""

    modules: Sequence[nn.Module | None] = ()
    values: Any = None
    beneath: Mapping[nn.Module, Tensor] = {}
    """What reading these chains gives for now, whatever is on."""


reading = Reading()


def record_of(module: nn.Module) -> Record:
    """Return what a module remembers, or an empty record."""
    return module.__dict__.get("_lora") or Record()


def chains_of(module: nn.Module) -> MutableMapping[str, Any]:
    """Return a module's chains of parametrizations by tensor; empty where there are none.

    Torch's `is_parametrized` asks for an attribute, and wrappers answer that for what they wrap.
    """
    if "parametrizations" not in module._modules:
        return {}
    holder = module._modules["parametrizations"]
    chains: Any = holder._modules if isinstance(holder, nn.ModuleDict) else {}
    for chain in chains.values():
        if not isinstance(chain, ParametrizationList):
            return {}
    return chains  # type: ignore[no-any-return]


def originals_of(chain: Any) -> list[Tensor]:
    """List the tensors at the start of a chain."""
    if chain.is_tensor:
        return [chain.original]
    return [getattr(chain, f"original{index}") for index in range(chain.ntensors)]


def run_through(entries: Sequence[nn.Module], originals: Sequence[Tensor]) -> Tensor:
    """Apply a chain's entries in their order; without any, return the one original."""
    value: Any = originals[0] if len(originals) == 1 else originals
    for index, entry in enumerate(entries):
        value = entry(*originals) if index == 0 else entry(value)
    return cast("Tensor", value)


def type_before(module: nn.Module) -> type[nn.Module]:
    """Return a module's class without the one made for its parametrizations."""
    cls = type(module)
    if cls.__bases__[0].__name__ == "FSDPModule":
        cls = cls.__bases__[1]
    return cls.__bases__[0] if chains_of(module) else cls
