"""The class of a module with parametrized tensors, one for all modules that are alike.

Torch gives every module a class of its own, with properties that close over the module: copies
share the class of one of them, nothing can be pickled, and a compiler sees a new type at every
layer. Here a class depends on the original class and the names of parametrized tensors alone.
"""

from __future__ import annotations

import copyreg
import functools
import pickle
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .activation import in_activation_space
from .attention import attended
from .chains import chains_of, originals_of, reading
from .deltas.protocol import Delta
from .deltas.switching import Switched
from .errors import LoRAError
from .groups import by_rows, weight_by_row
from .layers import Layer, computes_as_its_row, layer_of
from .places import is_traced
from .quantised import as_beneath
from .routing import Routing, routing_of
from .sharding import in_its_forward, is_sharded, news

Method = Callable[..., Any]


def properties_of(cls: type) -> set[str]:
    """Name the properties that a class itself defines."""
    return {name for name, value in vars(cls).items() if isinstance(value, property)}


class _SharedClass(type):
    """Type of a class that many modules share: what torch does to one must not reach the rest."""

    def __setattr__(cls, name: str, value: object) -> None:
        # torch's register_parametrization, on one more tensor of one module.
        layer = layer_of(cls)
        own = _weight_property(name, layer) if isinstance(value, property) else value
        super().__setattr__(name, own)

    def __delattr__(cls, name: str) -> None:
        # torch's remove_parametrizations, on one module.
        if name not in properties_of(cls):
            super().__delattr__(name)


_classes: WeakValueDictionary[Any, type[nn.Module]] = WeakValueDictionary()


def parametrized_class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """Return the class of a module of type `base` whose tensors `names` are parametrized."""
    key = (base, tuple(sorted(names)))
    if (cls := _classes.get(key)) is None:
        meta: type = _SharedClass
        if not issubclass(meta, type(base)):
            meta = type(meta.__name__, (meta, type(base)), {})
        layer = layer_of(base)
        # The module's name too, by which torch.fx decides what is a leaf.
        body: dict[str, Any] = {"__module__": base.__module__}
        body |= {name: make(base) for name, make in METHODS.items() if hasattr(base, name)}
        body |= {name: make(base) for name, make in layer.overrides.items()}
        if layer.moving or (layer.rereads and _is_torchs(base.forward)):
            body["forward"] = by_rows(base, _reading_once(base, layer))
        elif layer.run and computes_as_its_row(base):
            body["forward"] = in_activation_space(base, layer)
        elif base.forward is not nn.Module.forward:
            body["forward"] = by_rows(base)
        body |= {name: _weight_property(name, layer) for name in names}
        cls = _classes[key] = meta(f"Parametrized{base.__name__}", (base,), body)
    return cls


def _weight_property(name: str, layer: Layer) -> property:
    moving = name in layer.moving
    packs, projects = layer.dense is not None, layer.run and name in layer.tensors
    once = moving or not layer.moving  # a norm's forward reads its weight once, whosever it is

    def compute(self: Any, chain: Any) -> Any:
        value = chain()
        if "forward" in self.__dict__:
            value = in_its_forward(self, value)
        # Of a buffer of the base's own a copy, because whoever reads it may move it.
        return value.clone() if moving and value is chain._buffers.get("original") else value

    def read(self: Any) -> Any:
        chains = self._modules.get("parametrizations")
        chain = None if chains is None else chains._modules.get(name)
        if chain is None:  # torch has taken it off this module
            for table in (self._parameters, self._buffers, self.__dict__):
                if name in table:
                    return table[name]
            raise AttributeError(name)
        if packs and chain in reading.beneath:
            return reading.beneath[chain]
        routing = routing_of(chain) if Routing.used else None
        if routing is not None and routing.separates(chain):
            return weight_by_row(routing, self, name, originals_of(chain)[0])
        store, key, eager = {}, chain, not torch.compiler.is_compiling()
        if once and eager and self in reading.modules:
            store, key = reading.values, (chain, routing)
        elif parametrize._cache_enabled and not moving and routing is None:
            # Torch's own, in which anything may be done.
            state = (torch.is_grad_enabled(), Switched.switched)
            store, key = parametrize._cache, (chain, *state, *chain.parameters(), *chain.buffers())
        if key not in store:
            value = None
            if projects and not is_traced():
                value = attended(sys._getframe(1), self, name, layer, routing, compute)
            if value is not None and store is parametrize._cache:
                return value
            store[key] = compute(self, chain) if value is None else value
        return store[key]

    def write(self: nn.Module, value: Tensor) -> None:
        if name not in chains_of(self):
            self.__dict__[name] = value
        else:
            chains_of(self)[name].right_inverse(value)

    return property(read, write)


def _is_spared(module: nn.Module) -> bool:
    """Say whether a norm has buffers under a delta, and what it reads of them is the base's."""
    chains = [chain for name, chain in chains_of(module).items() if "original" in chain._buffers]
    return any(chain() is chain.original for chain in chains)


def _is_torchs(method: Any) -> bool:
    """Say whether a method is torch's own, of which it is known that it changes no weight."""
    return bool(getattr(method, "__globals__", {}).get("__name__", "")[:17] == "torch.nn.modules.")


def _reading_once(base: Any, layer: Layer) -> Method:
    stock, own = base.forward, not _is_torchs(base.forward)

    def once(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        outer = reading.modules, reading.values
        reading.modules, reading.values = (self, *self._modules.values()), {}
        try:
            return base.forward(self, *args, **kwargs)
        finally:
            reading.modules, reading.values = outer

    @functools.wraps(stock)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            return (once if base.forward is stock else base.forward)(self, *args, **kwargs)
        # Whether it reads again what it has moved, which a trace could not remember.
        rereads = layer.moving and self.training and (own or self.momentum is None)
        if rereads and _is_spared(self):
            return torch.compiler.disable(once)(self, *args, **kwargs)  # type: ignore[no-untyped-call]
        return base.forward(self, *args, **kwargs)

    return forward


def _refusing_reset(base: Any) -> Method:
    def reset_parameters(self: nn.Module) -> None:
        reason = "the draws would go into a temporary sum and be lost; call remove_lora first"
        raise LoRAError(f"a {base.__name__} with an adapter can't be reset: {reason}")

    return reset_parameters


def _resetting_copies(base: Any) -> Method:
    def reset_running_stats(self: nn.Module) -> None:
        if _is_spared(self):
            reason = "with its adapters off the base's own would be lost; call enable_lora"
            raise LoRAError(f"the statistics of a {base.__name__} can't be reset: {reason}")
        base.reset_running_stats(self)

    return reset_running_stats


def _registering(base: Any) -> Method:
    def register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        _check_assignable(self, name)
        base.register_parameter(self, name, param)

    return register_parameter


def _setting(base: Any) -> Method:
    def __setattr__(self: nn.Module, name: str, value: Any) -> None:  # noqa: N807
        if name in layer_of(base).moving and value is not None and value is getattr(self, name):
            return  # as by `self.running_mean += x`, which has written into it
        _check_assignable(self, name)
        if reason := layer_of(base).refusal(SimpleNamespace(**{name: value})):  # type: ignore[arg-type]
            raise LoRAError(f"{name}: {reason}, or call remove_lora first")
        base.__setattr__(self, name, value)

    return __setattr__


def _saving(base: Any) -> Method:
    def _save_to_state_dict(
        self: nn.Module, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        with as_beneath(self):
            base._save_to_state_dict(self, destination, prefix, keep_vars)
        for name in chains_of(self):  # of a layer that writes its weight itself
            destination.pop(prefix + name, None)

    return _save_to_state_dict


def _check_assignable(module: nn.Module, name: str) -> None:
    if "_modules" not in module.__dict__:  # a replica of DataParallel's, to which it gives these
        return
    if any(isinstance(entry, Delta) for entry in chains_of(module).get(name, ())):
        rule = "can't assign to an adapted weight, which is original + update"
        fix = f"assign to parametrizations.{name}.original under no_grad"
        if name in layer_of(type(module)).moving:
            rule, fix = "can't assign to an adapter's copy of a buffer", "write into it, with copy_"
        raise LoRAError(f"{name}: {rule}; {fix}, or call remove_lora first")


def _loading(base: Any) -> Method:
    def _load_from_state_dict(self: Any, *args: Any, **kwargs: Any) -> None:
        state_dict, prefix = args[:2]
        # Where a checkpoint is older than a buffer, a batch norm puts in what it reads itself.
        moving = [name for name in layer_of(base).moving if name in chains_of(self)]
        absent = [name for name in moving if f"{prefix}{name}" not in state_dict]
        accept = functools.partial(_accept, absent)
        # As the last of the hooks, because others may give keys their names.
        handle = self.register_load_state_dict_pre_hook(accept)
        try:
            with as_beneath(self):
                base._load_from_state_dict(self, *args, **kwargs)
        finally:
            handle.remove()

    return _load_from_state_dict


def _accept(absent: Any, module: Any, state_dict: Any, prefix: str, metadata: Any, *_: Any) -> None:
    """Translate a base's keys to the adapted model's; its deltas then keep their state."""
    for name, chain in chains_of(module).items():
        stem = f"{prefix}parametrizations.{name}."
        # What was absent has been put in since, of the adapted module, and isn't the base's.
        if name in absent and f"{prefix}{name}" in state_dict:
            state_dict[f"{prefix}{name}"] = chain.original
            if f"{stem}original" in state_dict:
                del state_dict[f"{prefix}{name}"]
        deltas = {index: entry for index, entry in enumerate(chain) if isinstance(entry, Delta)}
        others = [index for index in range(len(chain)) if index not in deltas]
        states: dict[str, Any] = {}
        for index, delta in deltas.items():
            states |= delta.state_dict(prefix=f"{stem}{index}.", keep_vars=True)
        _take_in(state_dict, f"{prefix}{name}", f"{stem}original", chain, states)
        # By parameters, because others' parametrizations may have an extra state too.
        said = any(isinstance(states[key], nn.Parameter) for key in states.keys() & state_dict)
        if not others and f"{prefix}{name}" in state_dict and f"{stem}original" not in state_dict:
            base = state_dict[f"{stem}original"] = state_dict.pop(f"{prefix}{name}")
            arrives = metadata.get("assign_to_params_buffers") and chain.original.is_meta
            for index, delta in deltas.items():
                if arrives:
                    delta.to_empty(device=base.device)
                    states |= delta.state_dict(prefix=f"{stem}{index}.", keep_vars=True)
                packed = not (base.is_floating_point() or delta.of_buffers)
                rebased = {} if packed else delta.rebased(chain.original, base)
                for part, value in rebased.items():
                    states[f"{stem}{index}.{part}"] = value
        elif not others or said:
            continue
        for plain, index in reversed(list(enumerate(others))):
            for key in [key for key in state_dict if key.startswith(f"{stem}{plain}.")]:
                inside = key.removeprefix(f"{stem}{plain}.")
                state_dict[f"{stem}{index}.{inside}"] = state_dict.pop(key)
        for key, value in states.items():
            if not value.is_meta:  # else it has no state to keep, and is drawn, or is missing
                state_dict.setdefault(key, value)


def _take_in(state_dict: Any, plain: str, key: str, chain: Any, states: dict[str, Any]) -> None:
    """Lay out a sharded weight's base, which the first rank alone may have, under its plain key."""
    # torch.distributed.checkpoint fills in what is there already, and marks for extra states.
    for each in states.keys() & state_dict:
        if type(state_dict[each]).__name__ == "_EXTRA_STATE":
            del state_dict[each]
    original = getattr(chain, "original", None)
    if not is_sharded(original) or state_dict.get(key, original) is not original:
        return
    if (value := news(state_dict.get(plain), original)) is not None:
        state_dict.pop(key, None)
        state_dict[plain] = value


def _reduction(base: Any) -> Method:
    def reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
        # Recurrent layers read their weights into their state, and a graph can't be copied.
        with torch.no_grad():
            reduced = base.__reduce_ex__(self, max(protocol, 2))
        if reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            reason = "pickles itself in a way of its own, which can't be followed while adapted"
            fix = "save its state dict, or call remove_lora first"
            raise pickle.PicklingError(f"{base.__name__} {reason}; {fix}")
        return _rebuild, (base, tuple(chains_of(self)), reduced[1][1:]), *reduced[2:]

    return reduce


def _rebuild(base: type[nn.Module], names: tuple[str, ...], args: tuple[Any, ...]) -> nn.Module:
    cls = parametrized_class(base, names)
    return cls.__new__(cls, *args)


METHODS: dict[str, Callable[[Any], Method]] = {
    "__reduce_ex__": _reduction,
    "__setattr__": _setting,
    "_load_from_state_dict": _loading,
    "_save_to_state_dict": _saving,
    "register_parameter": _registering,
    "reset_parameters": _refusing_reset,
    "reset_running_stats": _resetting_copies,
    "_reset_parameters": _refusing_reset,
}
"""What every module with parametrized tensors does in its own class's place, made from that."""
