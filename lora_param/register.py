"""The verbs: register, enable, disable, remove. Each does all of its work or none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .base import freeze, is_frozen, thaw
from .errors import AdapterError, LoRAError, TargetError
from .layers import layer_of
from .parametrization import (
    Init,
    LoRAParametrization,
    check_adapter,
    check_alpha,
    check_dropout,
    check_dtype,
    check_rank,
)
from .refusals import check_droppable, check_model, check_unshared, check_weights, without_tied
from .surgery import (
    all_or_nothing,
    attach,
    base_modules,
    chain_of,
    check_module,
    detach,
    template_of,
    tensor_names,
)
from .targets import Target, Weight, resolve, spread


def register_lora(
    model: nn.Module,
    *,
    rank: int | Mapping[str, int] = 8,
    alpha: float | Mapping[str, float | None] | None = None,
    target: Target | None = None,
    exclude: Target | None = None,
    adapter: str = "default",
    freeze: bool = True,
    dropout: float = 0.0,
    init: Init = "kaiming",
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
) -> list[str]:
    """Adapt a model in place: each chosen weight reads `W + (B @ A).view_as(W) * alpha / rank`.

    Modules keep their names and stay instances of their types, originals stay the same objects with
    the same bits, and the output is equal to the frozen model's until `lora_B` has been trained. An
    optimizer built earlier doesn't know the adapters: give it `lora_parameters(model)`.

    Args:
        model: Any module; the model itself may be the layer.
        rank: An integer from 1 to the smaller side of the weight's matrix view, or a mapping from
            pattern to integer; the first pattern that matches a weight decides.
        alpha: A finite number or a mapping from pattern to number; `None` means `rank`.
        target: What to adapt: a glob over a parameter's full name, over its module's path, or over
            a dotted suffix of either (`"q_proj"` finds `layers.3.q_proj`); a module type; a
            predicate `(module's path, module) -> bool`; or several of these. `None` means every
            weight that multiplies activations: linear, convolution, bilinear, attention and
            recurrent layers. Embeddings and other parameters are adapted only when named.
        exclude: The same, for what is left out.
        adapter: The adapter's name, without dots. Several adapters on one weight add up.
        freeze: Freeze every parameter that is no adapter's and clear its `.grad`; `remove_lora`
            gives the flags back. `False` leaves them as they are.
        dropout: Probability with which entries of a layer's input are dropped in front of `lora_A`
            in training; every weight must be one that is computed in activation space.
        init: How `lora_A` is drawn, `"kaiming"` or `"gaussian"`; see `LoRAParametrization`.
        generator: Source of the draws, made in model order; the global one if `None`.
        dtype: The factors' dtype; `None` means each weight's own. With float32 factors on a
            bfloat16 or float16 weight, weight space computes the update in float32 and rounds the
            sum once; activation space casts the factors to the input's dtype.

    Returns:
        The adapted parameters' names in model order, such as `["linear1.weight"]`.

    Raises:
        LoRAError: `rank`, `alpha`, `dropout`, `init` or `dtype` is out of range; the model is
            wrapped or sharded; or the call is made in `torch.inference_mode`.
        TargetError: A pattern matches nothing, or a weight can't be adapted.
        AdapterError: The adapter's name is unusable, or taken on one of the weights.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(20, 10), torch.nn.Linear(10, 4))
        >>> register_lora(model, rank=2)
        ['0.weight', '1.weight']
        >>> [p.shape for p in model.parameters() if p.requires_grad][:2]
        [torch.Size([2, 20]), torch.Size([10, 2])]

    Source:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685,
        section 4.
    """
    check_model(model, "register_lora")
    check_adapter(adapter)
    if dtype is not None:
        check_dtype(dtype)
    with all_or_nothing(model):
        weights = resolve(model, target, exclude)
        check_weights(weights, adapter)
        if target is None:
            weights = without_tied(model, weights)
        check_unshared(model, weights, "an adapter here would not act there")
        if not weights:
            raise TargetError(
                "every weight is tied to an embedding; name other weights with target"
            )
        ranks, alphas = spread("rank", rank, weights), spread("alpha", alpha, weights)
        plans = [_plan(weight, r, a) for weight, r, a in zip(weights, ranks, alphas, strict=True)]
        check_droppable(weights, check_dropout(dropout))
        if freeze:
            _freeze(model)
        for weight, (shape, value), r, a in zip(weights, plans, ranks, alphas, strict=True):
            *batch, fan_out, fan_in = shape
            parametrization = LoRAParametrization(
                fan_out,
                fan_in,
                r,
                a,
                batch=tuple(batch),
                adapter=adapter,
                dropout=dropout,
                init=init,
                generator=generator,
                device=value.device,
                dtype=dtype or value.dtype,
            )
            attach(weight.module, weight.tensor, parametrization)
        return [weight.name for weight in weights]


_freeze = freeze  # `register_lora` has an argument of that name


def adapters_of(
    model: nn.Module, adapter: str | None = None
) -> list[tuple[Weight, LoRAParametrization]]:
    """List the adapters, or those of one name, in model order and chain order; raise for none."""
    check_module(model, "a call about adapters")
    found = [
        (Weight(path, module, tensor), entry)
        for path, module in base_modules(model)
        for tensor in tensor_names(module)
        for entry in chain_of(module, tensor)
        if isinstance(entry, LoRAParametrization)
    ]
    wanted = [(weight, entry) for weight, entry in found if adapter in (None, entry.adapter)]
    if not wanted:
        names = sorted({entry.adapter for _, entry in found})
        there = f"the model has {', '.join(map(repr, names))}" if names else "the model has none"
        which = "an adapter" if adapter is None else f"an adapter {adapter!r}"
        raise AdapterError(f"there is no weight with {which}; {there}")
    return wanted


def enable_lora(model: nn.Module, adapter: str | None = None) -> None:
    """Switch adapters on.

    Args:
        model: An adapted model.
        adapter: The adapter's name; `None` means all.

    Raises:
        AdapterError: There is no such adapter.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 2)
        >>> _ = register_lora(model, rank=1)
        >>> disable_lora(model)
        >>> enable_lora(model)
    """
    for _, entry in adapters_of(model, adapter):
        entry.enabled = True


def disable_lora(model: nn.Module, adapter: str | None = None) -> None:
    """Switch adapters off: with none on, reading a weight returns the original tensor itself.

    Args:
        model: An adapted model.
        adapter: The adapter's name; `None` means all.

    Raises:
        AdapterError: There is no such adapter.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 2)
        >>> _ = register_lora(model, rank=1)
        >>> disable_lora(model)
        >>> model.weight is model.parametrizations.weight.original
        True
    """
    for _, entry in adapters_of(model, adapter):
        entry.enabled = False


@contextmanager
def lora_disabled(model: nn.Module, adapter: str | None = None) -> Iterator[None]:
    """Switch adapters off for a block, then give each the state back that it had before.

    Args:
        model: An adapted model.
        adapter: The adapter's name; `None` means all.

    Yields:
        Nothing.

    Raises:
        AdapterError: There is no such adapter.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 2)
        >>> _ = register_lora(model, rank=1)
        >>> with lora_disabled(model):
        ...     base_output = model(torch.ones(1, 3))
    """
    states = [(entry, entry.enabled) for _, entry in adapters_of(model, adapter)]
    try:
        for entry, _ in states:
            entry.enabled = False
        yield
    finally:
        for entry, enabled in states:
            entry.enabled = enabled


def remove_lora(model: nn.Module, adapter: str | None = None) -> None:
    """Take adapters off; without its last adapter the model is as it was before `register_lora`.

    Class, parameter objects and their order, `requires_grad`, state-dict keys and bits are what
    they were. Parametrizations of others stay.

    Args:
        model: An adapted model.
        adapter: The adapter's name; `None` means all.

    Raises:
        AdapterError: There is no such adapter.
        LoRAError: The model is wrapped or sharded, or the call is made in `torch.inference_mode`.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 2)
        >>> _ = register_lora(model, rank=1)
        >>> remove_lora(model)
        >>> type(model), [name for name, _ in model.named_parameters()]
        (<class 'torch.nn.modules.linear.Linear'>, ['weight', 'bias'])
    """
    check_model(model, "remove_lora")
    with all_or_nothing(model):
        if adapter is None and not _is_adapted(model) and is_frozen(model):
            thaw(model)  # the adapters went with a submodule, or torch took them off
        else:
            take_off(model, adapters_of(model, adapter))


def _plan(weight: Weight, rank: int, alpha: float | None) -> tuple[tuple[int, ...], Tensor]:
    """Return a weight's matrix view and a tensor of its dtype and device, all checked."""
    value = template_of(weight.module, weight.tensor)
    shape = layer_of(type(weight.module)).view(tuple(value.shape))
    try:
        check_alpha(alpha, check_rank(rank, shape[-2], shape[-1]))
    except LoRAError as error:
        raise LoRAError(f"{weight.name}: {error} or exclude this weight") from None
    return shape, value


def take_off(model: nn.Module, pairs: list[tuple[Weight, LoRAParametrization]]) -> None:
    """Detach adapters; with the last one of the model, give the base its flags back."""
    for weight, entry in pairs:
        detach(weight.module, weight.tensor, entry)
    if not _is_adapted(model):
        thaw(model)


def _is_adapted(model: nn.Module) -> bool:
    return any(isinstance(module, LoRAParametrization) for module in model.modules())
