"""The class of a module with parametrized tensors, one for all modules that are alike.

`torch.nn.utils.parametrize` gives every module a class of its own, with properties that close over
the module. Copies then share a class that belongs to one of them, nothing can be pickled, and a
compiler sees a new type at every layer. Here a module's class depends on its original class and on
the names of its parametrized tensors alone; its properties close over nothing, and pickling names
the original class.
"""

from __future__ import annotations

import copyreg
import functools
import pickle
import threading
from collections.abc import Callable
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .activation import in_activation_space
from .chains import chains_of, type_before
from .deltas.protocol import Delta
from .errors import LoRAError
from .layers import computes_as_its_row, layer_of


def properties_of(cls: type) -> set[str]:
    """Return the names of the properties that a class itself defines."""
    return {name for name, value in vars(cls).items() if isinstance(value, property)}


class _SharedClass(type):
    """Type of a class that many modules share: what torch does to one must not reach the rest."""

    def __setattr__(cls, name: str, value: object) -> None:
        # torch's register_parametrization, on one more tensor of one module.
        super().__setattr__(name, _weight_property(name) if isinstance(value, property) else value)

    def __delattr__(cls, name: str) -> None:
        # torch's remove_parametrizations, on one module.
        if name not in properties_of(cls):
            super().__delattr__(name)


_classes: WeakValueDictionary[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = (
    WeakValueDictionary()
)


def parametrized_class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """Return the class of a module of type `base` whose tensors `names` are parametrized."""
    key = (base, tuple(sorted(names)))
    cls = _classes.get(key)
    if cls is None:
        meta: type = _SharedClass
        if not issubclass(meta, type(base)):
            meta = type(meta.__name__, (meta, type(base)), {})
        layer = layer_of(base)
        body: dict[str, Any] = {name: _weight_property(name) for name in names}
        # The module's name too, by which torch.fx decides what is a leaf.
        body |= {"__reduce_ex__": _reduction(base), "__module__": base.__module__}
        body |= {name: override(base) for name, override in layer.overrides.items()}
        if layer.rereads:
            body["forward"] = _reading_once(base)
        if layer.run and computes_as_its_row(base):
            body["forward"] = in_activation_space(base, layer)
        for reset in ("reset_parameters", "_reset_parameters"):
            if hasattr(base, reset):
                body[reset] = _refuse_reset
        # Behind the base: what the base does to a checkpoint's keys comes first.
        bases = (base, _Parametrized) if base is not nn.Module else (base,)
        body |= _INNERMOST if base is nn.Module else {}
        cls = meta(f"Parametrized{base.__name__}", bases, body)
        _classes[key] = cls
    return cls


def _weight_property(name: str) -> property:
    def read(self: Any) -> Any:
        chain = self._modules["parametrizations"]._modules.get(name)
        if chain is None:  # torch has taken it off this module
            for table in (self._parameters, self._buffers, self.__dict__):
                if name in table:
                    return table[name]
            raise AttributeError(name)
        store = _store(self)
        if store is None:
            return chain()
        # What was read without a graph, or of other tensors, must not stand in for this one.
        tensors = tuple(map(id, [*chain.parameters(), *chain.buffers()]))
        key = (chain, torch.is_grad_enabled(), Delta.switched, tensors)
        if key not in store:
            store[key] = chain()
        return store[key]

    def write(self: nn.Module, value: Tensor) -> None:
        chains = chains_of(self)
        if name not in chains:
            self.__dict__[name] = value
        else:
            _check_assignable(self, name)
            chains[name].right_inverse(value)

    return property(read, write)


class _Reading(threading.local):
    """Which module's forward runs in this thread, and what it has read so far."""

    module: nn.Module | None = None
    values: dict[Any, Any] = {}  # noqa: RUF012 replaced, never filled


_reading = _Reading()


def _store(module: nn.Module) -> dict[Any, Any] | None:
    """Return where values are kept: torch's own cache, or that of a module's running forward."""
    if parametrize._cache_enabled:
        return cast("dict[Any, Any]", parametrize._cache)
    # A compiler merges equal expressions itself.
    if torch.compiler.is_compiling() or _reading.module is not module:
        return None
    return _reading.values


def _reading_once(base: type[nn.Module]) -> Callable[..., Any]:
    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return base.forward(self, *args, **kwargs)
        outer = _reading.module, _reading.values
        _reading.module, _reading.values = self, {}
        try:
            return base.forward(self, *args, **kwargs)
        finally:
            _reading.module, _reading.values = outer

    return forward


def _refuse_reset(self: nn.Module) -> None:
    raise LoRAError(
        f"a {type_before(self).__name__} with an adapter can't be reset: the draws would go into "
        "a temporary sum and be lost; call remove_lora first"
    )


def _check_assignable(module: nn.Module, name: str) -> None:
    chain = chains_of(module).get(name, ())
    if any(isinstance(entry, Delta) for entry in chain):
        raise LoRAError(
            f"{name}: can't assign to an adapted weight, which is original + update; assign to "
            f"parametrizations.{name}.original under no_grad, or call remove_lora first"
        )


class _Parametrized(nn.Module):
    """What every module with adapted tensors does differently, where its own class ends."""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        _check_assignable(self, name)
        nn.Module.register_parameter(self, name, param)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # As the last of the hooks, because others may give keys their names.
        register: Any = self.register_load_state_dict_pre_hook
        handle = register(_accept_base_keys)
        try:
            nn.Module._load_from_state_dict(self, *args, **kwargs)
        finally:
            handle.remove()


_INNERMOST = {
    name: vars(_Parametrized)[name] for name in ("register_parameter", "_load_from_state_dict")
}
"""For a bare `nn.Module`, which can't have another base behind it."""


def _accept_base_keys(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object
) -> None:
    """Translate a base's keys to the adapted model's; its deltas then keep their state."""
    for name, chain in chains_of(module).items():
        _accept_keys_of_chain(chain, name, state_dict, prefix)


def _accept_keys_of_chain(chain: Any, name: str, state_dict: dict[str, Any], prefix: str) -> None:
    stem = f"{prefix}parametrizations.{name}."
    deltas = {index: entry for index, entry in enumerate(chain) if isinstance(entry, Delta)}
    others = [index for index in range(len(chain)) if index not in deltas]
    states = {
        f"{stem}{index}.{key}": value
        for index, delta in deltas.items()
        for key, value in delta.state_dict(keep_vars=True).items()
    }
    if not others and f"{prefix}{name}" in state_dict and f"{stem}original" not in state_dict:
        state_dict[f"{stem}original"] = state_dict.pop(f"{prefix}{name}")
    elif not others or not states.keys().isdisjoint(state_dict):
        return
    for plain, index in reversed(list(enumerate(others))):
        for key in [key for key in state_dict if key.startswith(f"{stem}{plain}.")]:
            state_dict[f"{stem}{index}.{key.removeprefix(f'{stem}{plain}.')}"] = state_dict.pop(key)
    for key, value in states.items():
        state_dict.setdefault(key, value)


def _reduction(base: type[nn.Module]) -> Callable[..., tuple[Any, ...]]:
    def reduce_ex(self: nn.Module, protocol: int) -> tuple[Any, ...]:
        # Recurrent layers read their weights into their state, and a graph can't be copied.
        with torch.no_grad():
            reduced: Any = base.__reduce_ex__(self, max(protocol, 2))
        if reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            raise pickle.PicklingError(
                f"{base.__name__} pickles itself in a way of its own, which can't be followed "
                "while it is adapted; save its state dict, or call remove_lora first"
            )
        state, *rest = reduced[2:]
        return _rebuild, (base, tuple(chains_of(self)), reduced[1][1:]), state, *rest

    return reduce_ex


def _rebuild(base: type[nn.Module], names: tuple[str, ...], args: tuple[Any, ...]) -> nn.Module:
    cls = parametrized_class(base, names)
    return cls.__new__(cls, *args)
