"""The adapters' own tensors and numbers: for an optimizer, and as a strict state dict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from .chains import chains_of
from .checks import check_structure, deltas_called
from .deltas import Delta
from .errors import LoRAError, StateDictError
from .undo import all_or_nothing, in_order
from .weight import tensor_names, walk

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
        >>> import torch
        >>> from lora_param import register_lora
        >>> model = torch.nn.Linear(3, 2)
        >>> _ = register_lora(model, rank=1)
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
        >>> import torch
        >>> from lora_param import register_lora
        >>> model = torch.nn.Linear(3, 2)
        >>> _ = register_lora(model, rank=1)
        >>> optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-3)
    """
    yield from (parameter for _, parameter in named_lora_parameters(model, adapter))


def lora_state_dict(model: nn.Module, adapter: str | None = None) -> dict[str, Tensor]:
    """Return the adapters' state: tensors, detached and not copied, and numbers.

    Returns:
        Tensors by the names of `named_lora_parameters`, and for each weight `_extra_state`: kind,
        rank, alpha and dropout, as JSON in a tensor of bytes.

    Raises:
        AdapterError: There is no such adapter.

    Example:
        >>> import torch
        >>> from lora_param import register_lora
        >>> model = torch.nn.Linear(3, 2)
        >>> _ = register_lora(model, rank=1)
        >>> list(lora_state_dict(model))
        ['weight.default.lora_A', 'weight.default.lora_B', 'weight.default._extra_state']
    """
    state: dict[str, Tensor] = {}
    for weight, delta in deltas_called(walk(model, "lora_state_dict"), adapter):
        state |= delta.state_dict(prefix=f"{weight.name}.{delta.adapter}.")
    return state


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
        >>> import torch
        >>> from lora_param import register_lora
        >>> model = torch.nn.Linear(3, 2)
        >>> _ = register_lora(model, rank=1)
        >>> saved = {name: tensor.clone() for name, tensor in lora_state_dict(model).items()}
        >>> load_lora_state_dict(model, saved)
    """
    if not isinstance(state_dict, Mapping):
        raise StateDictError(f"a state dict must be a mapping, got {type(state_dict).__name__}")
    pairs = deltas_called(walk(model, "load_lora_state_dict"), adapter)
    with all_or_nothing() as undo:
        load_deltas({f"{w.name}.{d.adapter}.": d for w, d in pairs}, state_dict, undo)


def load_deltas(
    deltas: Mapping[str, Delta], state_dict: Mapping[str, Any], undo: ExitStack
) -> None:
    """Load deltas from their states, by prefix, or raise an error that lists all that doesn't fit.

    Raises:
        StateDictError: Nothing was loaded.
    """
    expected = {key for prefix, each in deltas.items() for key in each.state_dict(prefix=prefix)}
    complaints = [f"missing: {name}" for name in sorted(expected) if name not in state_dict]
    complaints += [f"unexpected: {name}" for name in state_dict if name not in expected]
    copies: list[tuple[nn.Parameter, Tensor]] = []
    for prefix, delta in deltas.items():
        for name, parameter in delta.named_parameters(prefix[:-1]):
            value = state_dict.get(name, parameter)
            if fault := _fault(value, parameter):
                complaints.append(fault.format(name))
            else:  # a copy, for the case that it is a view of another delta's tensor
                copies.append((parameter, value.detach().clone()))
    for prefix, delta in deltas.items():
        undo.callback(setattr, delta, "numbers", delta.numbers)
        try:
            delta.set_extra_state(state_dict.get(prefix + NUMBERS, delta.get_extra_state()))
        except LoRAError as error:
            complaints.append(f"{prefix}{NUMBERS}: {error}")
    if complaints:
        listing = "; ".join(complaints)
        raise StateDictError(f"the state dict doesn't fit, nothing was loaded: {listing}")
    for parameter, value in copies:
        undo.callback(parameter.detach().copy_, parameter.detach().clone())
        parameter.detach().copy_(value)


def _fault(value: object, parameter: nn.Parameter) -> str | None:
    """Say what keeps a value from being copied into a parameter, with a place for its name."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        return f"no floating-point tensor: {{}} is {kind}"
    if value.shape != parameter.shape:
        return f"misshapen: {{}} is {tuple(value.shape)}, should be {tuple(parameter.shape)}"
    if value.layout is not torch.strided or value.is_meta != parameter.is_meta:
        return f"without values to copy: {{}} is {value.layout} on {value.device}"
    if not value.is_meta and not value.to(parameter.dtype).isfinite().all():
        return "not finite: {}"
    return None


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return what `model.state_dict()` gives after `remove_lora(model)`: keys, order and bits.

    Tensors are detached and not copied; the model, plain or adapted, is left as it is.

    Raises:
        LoRAError: The model is wrapped or sharded; of a `DistributedDataParallel`, pass `.module`.

    Example:
        >>> import torch
        >>> from lora_param import register_lora
        >>> model = torch.nn.Linear(3, 2)
        >>> _ = register_lora(model, rank=1)
        >>> list(model.state_dict())[:2], list(base_state_dict(model))
        (['bias', 'parametrizations.weight.original'], ['weight', 'bias'])
    """
    check_structure(walk(model, "base_state_dict"), "base_state_dict")
    state = model.state_dict()
    for path, module in model.named_modules(remove_duplicate=False):
        if any(isinstance(entry, Delta) for chain in chains_of(module).values() for entry in chain):
            state = _without_deltas(state, f"{path}." if path else "", module)
    return state


def _without_deltas(state: dict[str, Any], prefix: str, module: nn.Module) -> dict[str, Any]:
    """Give one module's entries the keys and the order that they have without deltas."""
    names: dict[str, str | None] = {}
    for tensor, chain in chains_of(module).items():
        stem = f"{prefix}parametrizations.{tensor}."
        others = [str(i) for i, entry in enumerate(chain) if not isinstance(entry, Delta)]
        for key in [key for key in state if key.startswith(stem)]:
            number, _, inside = key.removeprefix(stem).partition(".")
            if number in others:
                names[key] = f"{stem}{others.index(number)}.{inside}"
            elif inside or not others:
                names[key] = None if inside else f"{prefix}{tensor}"
    renamed = {name: each for key, each in state.items() if (name := names.get(key, key))}
    # The module's own tensors stand where its first entry stood, in their old order.
    keys = list(renamed)
    first = next(index for index, key in enumerate(keys) if key.startswith(prefix))
    own = [f"{prefix}{name}" for name in tensor_names(module)]
    return in_order(renamed, [*keys[:first], *own, *keys[first:]])
