"""Attach a parametrization to one tensor of one module, and take it off without a trace."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .classes import Found, chains_of, found_of, parametrized_class, properties_of, type_before
from .errors import LoRAError
from .parametrization import LoRAParametrization


def check_module(model: object, call: str) -> None:
    """Raise unless `model` is a module."""
    if not isinstance(model, nn.Module):
        raise LoRAError(f"{call} takes a torch.nn.Module, got {type(model).__name__}; pass a model")


def base_modules(model: nn.Module, *, aliases: bool = False) -> list[tuple[str, nn.Module]]:
    """List paths and modules without any parametrizations; with aliases, at all their places."""
    modules, hidden = [], set()
    for path, module in model.named_modules(remove_duplicate=not aliases):
        if id(module) in hidden:
            continue
        for chain in chains_of(module).values():
            hidden |= {id(each) for each in chain.modules()}
        if chains_of(module):
            hidden.add(id(module._modules["parametrizations"]))
        modules.append((without_wrappers(path), module))
    return modules


def without_wrappers(path: str) -> str:
    """Drop from a path what `torch.compile` puts into it when it wraps a module."""
    return ".".join(name for name in path.split(".") if name not in ("", "_orig_mod"))


def plain_name(key: str) -> str:
    """Return the plain model's name of a key of a state dict."""
    return re.sub(r"parametrizations\.([^.]+)\.original$", r"\1", without_wrappers(key))


def tensor_names(module: nn.Module) -> list[str]:
    """List the names of a module's own parameters, in the order they had before any adapter."""
    present = [name for name, value in module._parameters.items() if value is not None]
    present += chains_of(module)
    order = found_of(module).order if "_lora_found" in module.__dict__ else ()
    return list(dict.fromkeys([*(name for name in order if name in present), *present]))


def original_of(module: nn.Module, name: str) -> Tensor | None:
    """Return a parameter, beneath any parametrization; `None` if it isn't one tensor."""
    if name in (chains := chains_of(module)):
        return getattr(chains[name], "original", None)
    return module._parameters.get(name)


def chain_of(module: nn.Module, name: str) -> list[nn.Module]:
    """List the parametrizations of a tensor, in the order in which they apply."""
    chains = chains_of(module)
    return list(chains[name]) if name in chains else []


def value_of(module: nn.Module, name: str) -> Tensor:
    """Return what reading a tensor gives, without a graph and without advancing anyone's state."""
    if not (chain := chain_of(module, name)):
        return module._parameters[name]  # type: ignore[return-value]
    with undisturbed(chain):
        value: Tensor = chains_of(module)[name]()
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
    base = type_before(module)
    if "_lora_found" not in module.__dict__:
        module.__dict__["_lora_found"] = Found(type(module), tuple(module._parameters))
    if name in chains_of(module):
        chains_of(module)[name].append(parametrization.train(module.training))
    else:
        # Built around a stand-in: torch's constructor calls set_() on the tensor that it is given,
        # which would invalidate any graph that has saved the original.
        stand_in = nn.Parameter(torch.empty(0), requires_grad=False)
        chain = parametrize.ParametrizationList([parametrization], stand_in, unsafe=True)
        chain._parameters["original"] = module._parameters.pop(name)
        chains = module._modules.setdefault("parametrizations", nn.ModuleDict())
        # Past ModuleDict's own check, which refuses a parameter called "keys" or "values".
        cast("nn.ModuleDict", chains)._modules[name] = chain.train(module.training)
    module.__class__ = parametrized_class(base, tuple(chains_of(module)))


def detach(module: nn.Module, name: str, parametrization: LoRAParametrization) -> None:
    """Take one entry off a chain; without its last adapter the module is as it was found."""
    base, chain = type_before(module), chains_of(module)[name]
    remaining = [entry for entry in chain if entry is not parametrization]
    if remaining:
        chain._modules.clear()
        chain._modules.update({str(index): entry for index, entry in enumerate(remaining)})
    else:
        del chains_of(module)[name]
    found = found_of(module)
    _restore_class(module, base, found)
    if not remaining:
        table = module._parameters if isinstance(chain.original, nn.Parameter) else module._buffers
        table[name] = chain.original
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()  # its own list of its weights
        _reorder(module._parameters, found.order)


plain_for_now: WeakSet[nn.Module] = WeakSet()
"""Modules whose chains are put away."""


def put_plain(module: nn.Module, values: Mapping[str, Tensor]) -> Callable[[], None]:
    """Put frozen Parameters in the place of chains; return what brings the chains back."""
    cls, base, found = type(module), type_before(module), found_of(module)
    holder = cast("nn.ModuleDict", module._modules["parametrizations"])
    children, chains = list(module._modules), dict(chains_of(module).items())
    parameters, training = list(module._parameters), module.training
    for name, value in values.items():
        del chains_of(module)[name]
        module._parameters[name] = nn.Parameter(value, requires_grad=False)
    _restore_class(module, base, found)
    _reorder(module._parameters, found.order)
    plain_for_now.add(module)

    def bring_back() -> None:
        plain_for_now.discard(module)
        for name in values:
            module._parameters.pop(name, None)
        holder._modules.clear()
        holder._modules.update(chains)
        module._modules["parametrizations"] = holder
        module.__dict__["_lora_found"], module.__class__ = found, cls
        if module.training != training:
            holder.train(module.training)
        _reorder(module._modules, children)
        _reorder(module._parameters, parameters)

    return bring_back


def _reorder(table: dict[str, Any], order: Sequence[str]) -> None:
    for name in [*order, *(each for each in table if each not in order)]:
        if name in table:
            table[name] = table.pop(name)


def memory_of(tensor: Tensor | None) -> int:
    """Identify a Parameter by where its bytes begin, if it has bytes of its own."""
    if type(tensor) is nn.Parameter and tensor.layout is torch.strided:
        return tensor.data_ptr() or id(tensor)
    return id(tensor)


def snapshot(model: nn.Module) -> Callable[[], None]:
    """Remember a model's modules, parameters, flags and gradients; return what brings them back."""
    modules = [
        (each, type(each), dict(each.__dict__), [(table, dict(table)) for table in _tables(each)])
        for each in model.modules()
    ]
    tensors = [
        (each, each.data, memory_of(each), each.requires_grad, each.grad)
        for each in model.parameters()
    ]

    def bring_back() -> None:
        for module, cls, attributes, tables in modules:
            module.__class__ = cls
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for table, content in tables:
                table.clear()
                table.update(content)
        for tensor, data, memory, requires_grad, grad in tensors:
            if memory_of(tensor) != memory:
                tensor.data = data
            if tensor.requires_grad != requires_grad:
                tensor.requires_grad = requires_grad
            tensor.grad = grad

    return bring_back


def _tables(module: nn.Module) -> list[dict[str, Any]]:
    return [module._parameters, module._buffers, module._modules]


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Undo what the block did to a model if it raises."""
    bring_back = snapshot(model)
    try:
        yield
    except BaseException:
        bring_back()
        raise


def completed(action: Callable[[], None]) -> None:
    """Do what can be repeated and not be undone: an interrupt waits until it has been repeated."""
    try:
        action()
    except BaseException:
        action()
        raise


def _restore_class(module: nn.Module, base: type[nn.Module], found: Found) -> None:
    chains = chains_of(module)
    adapted = any(
        isinstance(entry, LoRAParametrization) for chain in chains.values() for entry in chain
    )
    if not adapted:
        module.__dict__.pop("_lora_found", None)
    if not chains:
        module._modules.pop("parametrizations", None)
        module.__class__ = base
    elif not adapted and found.type and properties_of(found.type) == set(chains):
        module.__class__ = found.type
    else:
        module.__class__ = parametrized_class(base, tuple(chains))
