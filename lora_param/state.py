"""The adapters' own tensors and numbers: for an optimizer, and as a strict state dict."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from .checks import Need, deltas_called, walk
from .deltas import Delta
from .errors import LoRAError, StateDictError
from .sharding import alike, mesh_of, own_piece, spread, whole
from .undo import all_or_nothing
from .walk import Walk

NUMBERS = "_extra_state"
"""What torch calls the part of a state dict that holds no parameter: a delta's kind and numbers."""


def named_lora_parameters(
    model: nn.Module, adapter: str | None = None
) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the adapters' parameters, in model order, with names that depend on nothing else.

    Yields:
        `("<weight>.<adapter>.lora_A", A)`, and so on.

    Raises:
        AdapterError: There is no such adapter.

    Example:
        >>> [(name, tuple(p.shape)) for name, p in named_lora_parameters(model)]
        [('weight.default.lora_A', (1, 3)), ('weight.default.lora_B', (2, 1))]
    """
    for weight, delta in deltas_called(walk(model, "named_lora_parameters"), adapter):
        for name, parameter in delta.named_parameters():
            yield f"{weight.name}.{delta.adapter}.{name}", parameter


def lora_parameters(model: nn.Module, adapter: str | None = None) -> Iterator[nn.Parameter]:
    """Yield the adapters' parameters, in model order: what an optimizer takes.

    Raises:
        AdapterError: There is no such adapter.

    Example:
        >>> optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-3)
    """
    yield from (parameter for _, parameter in named_lora_parameters(model, adapter))


def lora_state_dict(
    model: nn.Module, adapter: str | None = None, *, full: bool = False
) -> dict[str, Tensor]:
    """Return the adapters' state: tensors, detached and not copied, and numbers.

    Of a sharded model they are `DTensor`s, or with `full` gathered, for which every rank calls it.

    Returns:
        Tensors by the names of `named_lora_parameters`, and for each weight `_extra_state`: kind,
        rank, alpha and dropout, as JSON in a tensor of bytes.

    Raises:
        AdapterError: There is no such adapter.

    Example:
        >>> list(lora_state_dict(model))
        ['weight.default.lora_A', 'weight.default.lora_B', 'weight.default._extra_state']
    """
    found = walk(model, "lora_state_dict", Need.TENSORS)
    state: dict[str, Tensor] = {}
    for weight, delta in deltas_called(found, adapter):
        state |= delta.state_dict(prefix=f"{weight.name}.{delta.adapter}.")
    return {name: whole(tensor) for name, tensor in state.items()} if full else state


def load_lora_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor], adapter: str | None = None
) -> None:
    """Load one adapter of a model that has it registered, or all: as a whole or not at all.

    The state dict is what `lora_state_dict` returned for the same weights, ranks and names. Its
    tensors are copied, into the adapters' dtype and device, and its numbers are taken over.

    Raises:
        AdapterError: There is no such adapter.
        StateDictError: Lists every missing, unexpected and misshapen entry, what is no finite
            floating-point tensor, and numbers of another kind or rank.

    Example:
        >>> saved = {name: tensor.clone() for name, tensor in lora_state_dict(model).items()}
        >>> load_lora_state_dict(model, saved)
    """
    if not isinstance(state_dict, Mapping):
        raise StateDictError(f"a state dict must be a mapping, got {type(state_dict).__name__}")
    pairs = deltas_called(walk(model, "load_lora_state_dict", Need.TENSORS), adapter)
    with all_or_nothing() as undo:
        load_deltas({f"{w.name}.{d.adapter}.": d for w, d in pairs}, state_dict, undo)


def load_deltas(
    deltas: Mapping[str, Delta], state_dict: Mapping[str, Any], undo: ExitStack
) -> None:
    """Load deltas from their states, by prefix, or raise one error of all that doesn't fit."""
    tensors = [tensor for delta in deltas.values() for tensor in delta.parameters()]
    with alike(mesh_of(tensors)):
        copies = _fitting(deltas, state_dict, undo)
    for parameter, value in copies:
        undo.callback(parameter.detach().copy_, parameter.detach().clone())
        parameter.detach().copy_(spread(value, parameter))


def _fitting(
    deltas: Mapping[str, Delta], state_dict: Mapping[str, Any], undo: ExitStack
) -> list[tuple[Tensor, Tensor]]:
    """Pair deltas' tensors with copies of what goes into them, and give deltas their numbers."""
    expected = {key for prefix, each in deltas.items() for key in each.state_dict(prefix=prefix)}
    complaints = [f"missing: {name}" for name in sorted(expected) if name not in state_dict]
    complaints += [f"unexpected: {name}" for name in state_dict if name not in expected]
    copies: list[tuple[Tensor, Tensor]] = []
    for prefix, delta in deltas.items():
        for name, parameter in delta.state_dict(prefix=prefix, keep_vars=True).items():
            value = state_dict.get(name, parameter)
            if name == prefix + NUMBERS:
                undo.callback(delta.set_extra_state, parameter)
                try:
                    delta.set_extra_state(value)
                except LoRAError as error:
                    complaints.append(f"{name}: {error}")
            elif fault := _fault(value, parameter):
                complaints.append(fault.format(name))
            else:  # a copy, for the case that it is a view of another delta's tensor
                copies.append((parameter, value.detach().clone()))
    if complaints:
        listing = "; ".join(complaints)
        raise StateDictError(f"the state dict doesn't fit, nothing was loaded: {listing}")
    return copies


def _fault(value: object, parameter: Tensor) -> str | None:
    """Say what keeps a value from being copied into a parameter, with a place for its name."""
    floating = parameter.is_floating_point()
    if not isinstance(value, Tensor) or value.is_floating_point() != floating:
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        return f"no {'floating-point' if floating else 'integer'} tensor: {{}} is {kind}"
    if value.shape != parameter.shape:
        return f"misshapen: {{}} is {tuple(value.shape)}, should be {tuple(parameter.shape)}"
    if value.layout is not torch.strided or value.is_meta != parameter.is_meta:
        return f"without values to copy: {{}} is {value.layout} on {value.device}"
    if not value.is_meta and not own_piece(value).to(parameter.dtype).isfinite().all():
        return "not finite: {}"
    return None


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return what `model.state_dict()` gives after `remove_lora(model)`: keys, order and bits.

    Tensors are detached and not copied; the model, plain or adapted, is left as it is.

    Raises:
        LoRAError: The model is wrapped or sharded; of a `DistributedDataParallel`, pass `.module`.

    Example:
        >>> list(model.state_dict())[:2], list(base_state_dict(model))
        (['bias', 'parametrizations.weight.original'], ['weight', 'bias'])
    """
    walk(model, "base_state_dict", Need.ADAPTERS)
    twin = _twin(model, {})
    for weight in dict.fromkeys(weight.whole for weight, _ in Walk(twin).deltas):
        weight.detach(set(weight.deltas), ExitStack())  # of what nobody will see again
    return twin.state_dict()


def _twin(module: nn.Module, twins: dict[nn.Module, nn.Module]) -> nn.Module:
    """Copy a tree of modules, but no tensor and no delta, so that deltas can be taken off it."""
    if isinstance(module, Delta):
        return module
    if module not in twins:
        twin = twins[module] = object.__new__(type(module))
        children = dict(module._modules)
        tables = {"_parameters": dict(module._parameters), "_buffers": dict(module._buffers)}
        twin.__dict__.update({**module.__dict__, **tables, "_modules": children})
        twin.__dict__.pop("_flat_weights", None)  # a recurrent layer's, which detaching rebuilds
        for name, child in module._modules.items():
            children[name] = None if child is None else _twin(child, twins)
    return twins[module]
