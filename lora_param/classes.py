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
import inspect
import pickle
import threading
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, NamedTuple, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .activation import terms_of
from .errors import LoRAError
from .layers import activation_of, layer_of
from .parametrization import LoRAParametrization


class Found(NamedTuple):
    """How a module was before its first adapter; kept on the module as `_lora_found`."""

    type: type[nn.Module] | None
    order: tuple[str, ...]


def chains_of(module: nn.Module) -> MutableMapping[str, Any]:
    """Return a module's chains of parametrizations by tensor; empty where there are none.

    Torch's `is_parametrized` asks for an attribute, and wrappers answer that for what they wrap.
    """
    chains = module._modules.get("parametrizations")
    if not isinstance(chains, nn.ModuleDict) or not all(
        isinstance(chain, parametrize.ParametrizationList) for chain in chains.values()
    ):
        return {}
    return cast("MutableMapping[str, Any]", chains)


def originals_of(chain: Any) -> list[Tensor]:
    """List the tensors at the start of a chain."""
    if chain.is_tensor:
        return [chain.original]
    return [getattr(chain, f"original{index}") for index in range(chain.ntensors)]


def evaluated(chain: Sequence[nn.Module], originals: Sequence[Tensor]) -> Tensor:
    """Apply a chain's entries, at least one, to the tensors at its start."""
    value: Tensor = chain[0](*originals)
    for entry in chain[1:]:
        value = entry(value)
    return value


def type_before(module: nn.Module) -> type[nn.Module]:
    """Return a module's class without the one made for its parametrizations."""
    return type(module).__bases__[0] if chains_of(module) else type(module)


def found_of(module: nn.Module) -> Found:
    """Return how a module was before its first adapter."""
    found: Found = module.__dict__.get("_lora_found", Found(None, ()))
    return found


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
        if activation := activation_of(base):
            body["forward"] = _in_activation_space(base, activation, layer.suits)
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
        if name not in self.parametrizations:  # torch has taken it off this module
            for table in (self._parameters, self._buffers, self.__dict__):
                if name in table:
                    return table[name]
            raise AttributeError(name)
        chain, store = self.parametrizations[name], _store()
        if store is None:
            return chain()
        # A value read without a graph, or in another state, must not stand in for this one.
        state = tuple((getattr(e, "enabled", None), getattr(e, "scale", None)) for e in chain)
        key = (chain, torch.is_grad_enabled(), state)
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


_during_forward = threading.local()


def _store() -> dict[Any, Any] | None:
    """Return where values are kept: torch's own cache, or that of a forward that is running."""
    if parametrize._cache_enabled:
        return cast("dict[Any, Any]", parametrize._cache)
    # A compiler merges equal expressions itself.
    return None if torch.compiler.is_compiling() else getattr(_during_forward, "store", None)


def _reading_once(base: type[nn.Module]) -> Callable[..., Any]:
    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or _store() is not None:
            return base.forward(self, *args, **kwargs)
        _during_forward.store = {}
        try:
            return base.forward(self, *args, **kwargs)
        finally:
            _during_forward.store = None

    return forward


def _in_activation_space(
    base: type[nn.Module], activation: Callable[..., Tensor], suits: Callable[[Any], bool]
) -> Callable[..., Any]:
    stock: Any = base.forward
    argument = list(inspect.signature(stock).parameters)[1]

    @functools.wraps(stock)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs.get(argument)
        usual = len(args) + len(kwargs) == 1 and base.forward is stock and suits(self)
        dense = isinstance(x, Tensor) and x.layout is torch.strided and not x.is_nested
        if usual and dense and (ends := _ends(self, "weight")):
            return activation(self, x, ends[0], terms_of(ends[1]))
        return base.forward(self, *args, **kwargs)

    return forward


def _ends(module: nn.Module, name: str) -> tuple[Tensor, list[LoRAParametrization]] | None:
    """Return a weight as it is beneath its adapters, and those that are on; `None` without such."""
    others, adapters = _separated(module, name) or ([], [])
    adapters = [entry for entry in adapters if entry.enabled]
    if not adapters:
        return None
    originals = originals_of(chains_of(module)[name])
    weight = evaluated(others, originals) if others else originals[0]
    # One that was registered by hand may have another matrix view.
    matrices = all(e.lora_A.dim() == 2 and len(e.lora_B) == len(weight) for e in adapters)
    return (weight, adapters) if matrices else None


def _separated(
    module: nn.Module, name: str
) -> tuple[list[nn.Module], list[LoRAParametrization]] | None:
    """Part a chain in others' entries and adapters behind them; `None` if it isn't so ordered."""
    chains = chains_of(module)
    entries = list(chains[name]) if name in chains else []
    # By exact type: a subclass, or an adapter with parametrized factors, may compute otherwise.
    ours = [type(e) is LoRAParametrization and not _is_hooked(e) for e in entries]
    count = sum(ours)
    if not all(ours[len(ours) - count :]) or (entries and _is_hooked(chains[name])):
        return None
    return entries[: len(ours) - count], entries[len(ours) - count :]


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def in_activation_space(module: nn.Module, name: str) -> bool:
    """Say whether a module would compute, or computes, a tensor's adapters in activation space."""
    base = type_before(module)
    stock = name == "weight" and activation_of(base) is not None and layer_of(base).suits(module)
    return stock and _separated(module, name) is not None


def _refuse_reset(self: nn.Module) -> None:
    raise LoRAError(
        f"a {type_before(self).__name__} with an adapter can't be reset: the draws would go into "
        "a temporary sum and be lost; call remove_lora first"
    )


def _check_assignable(module: nn.Module, name: str) -> None:
    chain = dict(chains_of(module).items()).get(name, ())
    if any(isinstance(entry, LoRAParametrization) for entry in chain):
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
    """Translate a base's keys to the adapted model's; its adapters then keep their values."""
    for name, chain in chains_of(module).items():
        _accept_keys_of_chain(chain, name, state_dict, prefix)


def _accept_keys_of_chain(chain: Any, name: str, state_dict: dict[str, Any], prefix: str) -> None:
    stem = f"{prefix}parametrizations.{name}."
    ours = {i: entry for i, entry in enumerate(chain) if isinstance(entry, LoRAParametrization)}
    others = [index for index in range(len(chain)) if index not in ours]
    if not others and f"{prefix}{name}" in state_dict and f"{stem}original" not in state_dict:
        state_dict[f"{stem}original"] = state_dict.pop(f"{prefix}{name}")
    elif not others or any(f"{stem}{index}.lora_A" in state_dict for index in range(len(chain))):
        return
    for plain, index in reversed(list(enumerate(others))):
        for key in [key for key in state_dict if key.startswith(f"{stem}{plain}.")]:
            state_dict[f"{stem}{index}.{key.removeprefix(f'{stem}{plain}.')}"] = state_dict.pop(key)
    for index, entry in ours.items():
        for factor, parameter in entry.named_parameters():
            state_dict.setdefault(f"{stem}{index}.{factor}", parameter)


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
        # A class that torch made for this one module can't be named in a pickle and suits no copy.
        if "_lora_found" in state:
            state = {**state, "_lora_found": found_of(self)._replace(type=None)}
        return _rebuild, (base, tuple(chains_of(self)), reduced[1][1:]), state, *rest

    return reduce_ex


def _rebuild(base: type[nn.Module], names: tuple[str, ...], args: tuple[Any, ...]) -> nn.Module:
    cls = parametrized_class(base, names)
    return cls.__new__(cls, *args)
