"""Attach a parametrization to one tensor of one module, and take it off without a trace.

`torch.nn.utils.parametrize` gives every module a class of its own, with properties that close over
the module. Copies then share a class that belongs to one of them, and nothing can be pickled. Here
a module's class depends on its original class and on the names of its parametrized tensors alone;
equal modules share it, its properties close over nothing, and pickling names the original class.
"""

from __future__ import annotations

import copyreg
import pickle
from collections.abc import Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .errors import LoRAError
from .parametrization import LoRAParametrization


class _Found(NamedTuple):
    """How a module was before its first adapter; kept on the module as `_lora_found`."""

    type: type[nn.Module] | None
    order: tuple[str, ...]


def base_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """List a model's modules with their paths, each once, without any parametrizations."""
    modules, hidden = [], set()
    for path, module in model.named_modules():
        if id(module) in hidden:
            continue
        if parametrize.is_parametrized(module):
            hidden |= {id(each) for each in module.parametrizations.modules()}
        modules.append((path, module))
    return modules


def tensor_names(module: nn.Module) -> list[str]:
    """List the names of a module's own parameters, in the order they had before any adapter."""
    present = [name for name, value in module._parameters.items() if value is not None]
    present += _chains(module)
    order = _found(module).order if "_lora_found" in module.__dict__ else ()
    return list(dict.fromkeys([*(name for name in order if name in present), *present]))


def original_of(module: nn.Module, name: str) -> Tensor | None:
    """Return a parameter, beneath any parametrization; `None` if it isn't one tensor."""
    if name in (chains := _chains(module)):
        return getattr(chains[name], "original", None)
    return module._parameters.get(name)


def chain_of(module: nn.Module, name: str) -> list[nn.Module]:
    """List the parametrizations of a tensor, in the order in which they apply."""
    chains = _chains(module)
    return list(chains[name]) if name in chains else []


def originals_of(module: nn.Module, name: str) -> list[Tensor]:
    """List the tensors at the start of a parametrized tensor's chain."""
    chain = _chains(module)[name]
    names = (
        ["original"] if chain.is_tensor else [f"original{index}" for index in range(chain.ntensors)]
    )
    return [getattr(chain, each) for each in names]


def value_of(module: nn.Module, name: str) -> Tensor:
    """Return what reading a tensor gives, without a graph and without advancing anyone's state."""
    if not (chain := chain_of(module, name)):
        return module._parameters[name]  # type: ignore[return-value]
    with undisturbed(chain):
        value: Tensor = _chains(module)[name]()
    return value


def template_of(module: nn.Module, name: str) -> Tensor:
    """Return a tensor of the weight's shape, dtype and device; free where adapters are alone."""
    if all(isinstance(entry, LoRAParametrization) for entry in chain_of(module, name)):
        return original_of(module, name)  # type: ignore[return-value]
    return value_of(module, name)


@contextmanager
def undisturbed(chain: list[nn.Module]) -> Iterator[None]:
    """Evaluate a chain without a graph, without autocast, and without advancing its state."""
    modules = [(each, each.training) for entry in chain for each in entry.modules()]
    devices = {tensor.device.type for entry in chain for tensor in entry.parameters()} - {"meta"}
    with ExitStack() as contexts:
        contexts.enter_context(torch.no_grad())
        for device in devices:
            contexts.enter_context(torch.autocast(device, enabled=False))
        try:
            for each, _ in modules:
                each.training = False  # in training, spectral_norm advances its power iteration
            yield
        finally:
            for each, training in modules:
                each.training = training


def attach(module: nn.Module, name: str, parametrization: LoRAParametrization) -> None:
    """Append a parametrization to the chain of a parameter; the original stays the same object."""
    base = parametrize.type_before_parametrizations(module)
    if "_lora_found" not in module.__dict__:
        module.__dict__["_lora_found"] = _Found(type(module), tuple(module._parameters))
    if name in _chains(module):
        _chains(module)[name].append(parametrization.train(module.training))
    else:
        # Built around a stand-in: torch's constructor calls set_() on the tensor that it is given,
        # which would invalidate any graph that has saved the original.
        stand_in = nn.Parameter(torch.empty(0), requires_grad=False)
        chain = parametrize.ParametrizationList([parametrization], stand_in, unsafe=True)
        chain._parameters["original"] = module._parameters.pop(name)
        chains = module._modules.setdefault("parametrizations", nn.ModuleDict())
        # Past ModuleDict's own check, which refuses a parameter called "keys" or "values".
        cast("nn.ModuleDict", chains)._modules[name] = chain.train(module.training)
    module.__class__ = _parametrized_class(base, tuple(_chains(module)))


def detach(module: nn.Module, name: str, parametrization: LoRAParametrization) -> None:
    """Take one entry off a chain; without its last adapter the module is as it was found."""
    base, chain = parametrize.type_before_parametrizations(module), _chains(module)[name]
    remaining = [entry for entry in chain if entry is not parametrization]
    if remaining:
        chain._modules.clear()
        chain._modules.update({str(index): entry for index, entry in enumerate(remaining)})
    else:
        del _chains(module)[name]
    found = _found(module)
    _restore_class(module, base, found)
    if not remaining:
        # By setattr, where recurrent layers keep a second list of their weights up to date.
        setattr(module, name, chain.original)
        for each in dict.fromkeys([*found.order, *module._parameters]):
            if each in module._parameters:
                module._parameters[each] = module._parameters.pop(each)


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Undo what the block did to modules, parameters, flags and gradients if it raises."""
    modules = [
        (each, type(each), dict(each.__dict__), dict(each._parameters), dict(each._modules))
        for each in model.modules()
    ]
    tensors = [(each, each.data, each.requires_grad, each.grad) for each in model.parameters()]
    try:
        yield
    except BaseException:
        for module, cls, attributes, parameters, children in modules:
            module.__class__ = cls
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._parameters.clear()
            module._parameters.update(parameters)
            module._modules.clear()
            module._modules.update(children)
        for tensor, data, requires_grad, grad in tensors:
            tensor.data, tensor.requires_grad, tensor.grad = data, requires_grad, grad
        raise


def _chains(module: nn.Module) -> MutableMapping[str, Any]:
    chains: object = (
        module._modules["parametrizations"] if parametrize.is_parametrized(module) else {}
    )
    return cast("MutableMapping[str, Any]", chains)


def _found(module: nn.Module) -> _Found:
    found: _Found = module.__dict__.get("_lora_found", _Found(None, ()))
    return found


def _restore_class(module: nn.Module, base: type[nn.Module], found: _Found) -> None:
    chains = _chains(module)
    adapted = any(
        isinstance(entry, LoRAParametrization) for chain in chains.values() for entry in chain
    )
    if not adapted:
        module.__dict__.pop("_lora_found", None)
    if not chains:
        module._modules.pop("parametrizations", None)
        module.__class__ = base
    elif not adapted and found.type and _properties(found.type) == set(chains):
        module.__class__ = found.type
    else:
        module.__class__ = _parametrized_class(base, tuple(chains))


def _properties(cls: type) -> set[str]:
    return {name for name, value in vars(cls).items() if isinstance(value, property)}


class _SharedClass(type):
    """Type of a class that many modules share: what torch does to one must not reach the rest."""

    def __setattr__(cls, name: str, value: object) -> None:
        # torch's register_parametrization, on one more tensor of one module.
        super().__setattr__(name, _weight_property(name) if isinstance(value, property) else value)

    def __delattr__(cls, name: str) -> None:
        # torch's remove_parametrizations, on one module.
        if name not in _properties(cls):
            super().__delattr__(name)


_classes: WeakValueDictionary[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = (
    WeakValueDictionary()
)


def _parametrized_class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    key = (base, tuple(sorted(names)))
    cls = _classes.get(key)
    if cls is None:
        meta: type = _SharedClass
        if not issubclass(meta, type(base)):
            meta = type(meta.__name__, (meta, type(base)), {})
        body: dict[str, Any] = {name: _weight_property(name) for name in names}

        def reduce_ex(self: nn.Module, protocol: int) -> tuple[Any, ...]:
            return _reduce(self, base, max(protocol, 2))

        cls = meta(f"Parametrized{base.__name__}", (base,), body | {"__reduce_ex__": reduce_ex})
        _classes[key] = cls
    return cls


def _weight_property(name: str) -> property:
    def read(self: Any) -> Any:
        if name not in self.parametrizations:  # torch has taken it off this module
            for table in (self._parameters, self._buffers, self.__dict__):
                if name in table:
                    return table[name]
            raise AttributeError(name)
        if not parametrize._cache_enabled:
            return self.parametrizations[name]()
        key = (id(self), name)
        if key not in parametrize._cache:
            parametrize._cache[key] = self.parametrizations[name]()
        return parametrize._cache[key]

    def write(self: nn.Module, value: Tensor) -> None:
        if name not in (chains := _chains(self)):
            self.__dict__[name] = value
        elif any(isinstance(entry, LoRAParametrization) for entry in chains[name]):
            raise LoRAError(
                f"{name}: can't assign to an adapted weight, which is original + update; assign to "
                f"parametrizations.{name}.original under no_grad, or call remove_lora first"
            )
        else:
            chains[name].right_inverse(value)

    return property(read, write)


def _reduce(module: nn.Module, base: type[nn.Module], protocol: int) -> tuple[Any, ...]:
    with torch.no_grad():  # a recurrent layer reads its weights into its state; a graph has no copy
        reduced: Any = base.__reduce_ex__(module, protocol)
    if reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
        raise pickle.PicklingError(
            f"{base.__name__} pickles itself in a way of its own, which can't be followed while it "
            "is adapted; save its state dict, or call remove_lora first"
        )
    state, *rest = reduced[2:]
    # A class that torch made for this one module can't be named in a pickle and suits no copy.
    if "_lora_found" in state:
        state = {**state, "_lora_found": _found(module)._replace(type=None)}
    return _rebuild, (base, tuple(_chains(module))), state, *rest


def _rebuild(base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    cls = _parametrized_class(base, names)
    return cls.__new__(cls)
