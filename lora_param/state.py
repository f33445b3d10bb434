"""The adapters' own tensors: for an optimizer, and as a strict state dict."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from .errors import StateDictError
from .parametrization import LoRAParametrization
from .refusals import check_structure
from .register import adapters_of
from .surgery import base_modules, chain_of, completed, detach, snapshot, tensor_names


def named_lora_parameters(
    model: nn.Module, adapter: str | None = None
) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the adapters' parameters with names that don't depend on what else is registered.

    Args:
        model: An adapted model.
        adapter: The adapter's name; `None` means all.

    Yields:
        `("<weight>.<adapter>.lora_A", A)` and `("<weight>.<adapter>.lora_B", B)` in model order,
        such as `"linear1.weight.default.lora_A"`.

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
    for weight, entry in adapters_of(model, adapter):
        for name, parameter in entry.named_parameters():
            yield f"{weight.name}.{entry.adapter}.{name}", parameter


def lora_parameters(model: nn.Module, adapter: str | None = None) -> Iterator[nn.Parameter]:
    """Yield the adapters' parameters: what an optimizer takes.

    Args:
        model: An adapted model.
        adapter: The adapter's name; `None` means all.

    Yields:
        `lora_A` and `lora_B` of each weight, in model order.

    Raises:
        AdapterError: There is no such adapter.

    Example:
        >>> import torch
        >>> from lora_param import register_lora
        >>> model = torch.nn.Linear(3, 2)
        >>> _ = register_lora(model, rank=1)
        >>> optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-3)
    """
    for _, parameter in named_lora_parameters(model, adapter):
        yield parameter


def lora_state_dict(model: nn.Module, adapter: str | None = None) -> dict[str, Tensor]:
    """Return the adapters' tensors, detached and not copied, as `state_dict` does.

    Args:
        model: An adapted model.
        adapter: The adapter's name; `None` means all.

    Returns:
        Tensors by the names of `named_lora_parameters`.

    Raises:
        AdapterError: There is no such adapter.

    Example:
        >>> import torch
        >>> from lora_param import register_lora
        >>> model = torch.nn.Linear(3, 2)
        >>> _ = register_lora(model, rank=1)
        >>> list(lora_state_dict(model))
        ['weight.default.lora_A', 'weight.default.lora_B']
    """
    return {name: parameter.detach() for name, parameter in named_lora_parameters(model, adapter)}


def load_lora_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor], adapter: str | None = None
) -> None:
    """Copy tensors into the adapters of a model that has them registered: all of them or none.

    Args:
        model: An adapted model.
        state_dict: What `lora_state_dict` returned, for the same weights, ranks and names. Values
            are converted to the adapters' dtype and device.
        adapter: The adapter to load; `None` means all, and the state dict has to hold all.

    Raises:
        AdapterError: There is no such adapter.
        StateDictError: Lists every missing, unexpected and misshapen entry, and what is no
            finite floating-point tensor.

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
    # Copies, for the case that a value is a view of another adapter's factor.
    copies = {
        name: value.detach().clone() if isinstance(value, Tensor) else value
        for name, value in state_dict.items()
    }
    completed(filling(model, copies, adapter))


def filling(
    model: nn.Module, state_dict: Mapping[str, Tensor], adapter: str | None
) -> Callable[[], None]:
    """Hold a state dict against a model's adapters, and return what copies it into them."""
    parameters = dict(named_lora_parameters(model, adapter))
    complaints = [f"missing: {name}" for name in parameters if name not in state_dict]
    complaints += [f"unexpected: {name}" for name in state_dict if name not in parameters]
    for name, parameter in parameters.items():
        value = state_dict.get(name, parameter)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            complaints.append(f"no floating-point tensor: {name} is {kind}")
        elif value.shape != parameter.shape:
            complaints.append(
                f"misshapen: {name} is {tuple(value.shape)}, should be {tuple(parameter.shape)}"
            )
        elif value.layout is not torch.strided or value.is_meta != parameter.is_meta:
            complaints.append(f"without values to copy: {name} is {value.layout} on {value.device}")
    if complaints:
        raise StateDictError(
            f"the state dict doesn't fit, nothing was loaded: {'; '.join(complaints)}"
        )
    infinite = [
        name
        for name, parameter in parameters.items()
        if not parameter.is_meta and not state_dict[name].to(parameter.dtype).isfinite().all()
    ]
    if infinite:
        raise StateDictError(f"nothing was loaded: not finite: {', '.join(infinite)}")

    def fill() -> None:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state_dict[name])

    return fill


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict that the model would have without adapters: keys, order and bits.

    Args:
        model: A plain or an adapted model. Its adapters are lifted off for the moment of the call.

    Returns:
        What `model.state_dict()` gives after `remove_lora(model)`: tensors detached and not copied.

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
    check_structure(model, "base_state_dict")
    bring_back = snapshot(model)
    try:
        for _, module in base_modules(model):
            for tensor in tensor_names(module):
                for entry in chain_of(module, tensor):
                    if isinstance(entry, LoRAParametrization):
                        detach(module, tensor, entry)
        return model.state_dict()
    finally:
        bring_back()
