"""What can't be done, and why: each rule is a row that gives a reason or `None`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .activation import acts
from .chains import chains_of, type_before
from .deltas.protocol import FLOATS, Delta, show_dtypes
from .errors import AdapterError, LoRAError, TargetError
from .weight import Walk, Weight, memory_of, merged_for_now

FIXED = {
    "DistributedDataParallel": "it synchronises the parameters it was given; register before "
    "wrapping, and afterwards pass its .module, when it is no longer trained",
    "FullyShardedDataParallel": "its parameters are sharded; call this before sharding",
    "FSDPModule": "its parameters are sharded; call this before sharding",
    "ScriptModule": "its code is compiled; call this before scripting",
}
"""Torch's classes around or on a model after which no parameter can be added or taken away."""


def check_model(walk: Walk, call: str) -> None:
    """Raise unless the structure of a model can be changed for good, here and now."""
    check_structure(walk, call)
    if torch.is_inference_mode_enabled():
        raise LoRAError(
            f"{call} can't be called in torch.inference_mode: what is made there never gets a "
            "gradient; call it outside"
        )


def check_structure(walk: Walk, call: str) -> None:
    """Raise unless the structure of a model can be changed."""
    for module, path in walk.owners.items():
        if module in merged_for_now:
            raise LoRAError(
                f"{path or 'model'}: {call} can't be called in a lora_merged block, in which there "
                "are no adapters; call it after the block"
            )
        for base in type(module).__mro__:
            if base.__name__ in FIXED and base.__module__.startswith("torch."):
                raise LoRAError(
                    f"{path or 'model'}: {call} can't be called on a {base.__name__}: "
                    f"{FIXED[base.__name__]}"
                )


def deltas_called(walk: Walk, adapter: str | None) -> list[tuple[Weight, Delta]]:
    """List the deltas, or those of one adapter, in model order and chain order.

    Raises:
        AdapterError: There are none.
    """
    wanted = [(weight, each) for weight, each in walk.deltas if adapter in (None, each.adapter)]
    if not wanted:
        names = sorted({delta.adapter for _, delta in walk.deltas})
        there = f"the model has {', '.join(map(repr, names))}" if names else "the model has none"
        which = "an adapter" if adapter is None else f"an adapter {adapter!r}"
        raise AdapterError(f"there is no weight with {which}; {there}")
    return wanted


def check_weights(weights: Sequence[Weight], adapter: str) -> None:
    """Raise for the first weight that can't be adapted, naming the rule and the fix."""
    for weight in weights:
        tensor, chain = weight.original, weight.chain
        for rule in RULES:
            if reason := rule(weight, tensor, chain):
                raise TargetError(f"{weight.name}: {reason}, or exclude this weight")
        for entry in chain:
            if isinstance(entry, Delta) and entry.adapter == adapter and _overlap(weight, entry):
                raise AdapterError(
                    f'{weight.name}: there is an adapter "{adapter}" on this weight already; '
                    "choose another name, or remove that one first"
                )


def _overlap(weight: Weight, delta: Delta) -> bool:
    """Say whether a delta changes some of a weight's rows."""
    if weight.rows is None or delta.rows is None:
        return True
    return bool(weight.rows.start < delta.rows.stop and delta.rows.start < weight.rows.stop)


def check_droppable(weights: Sequence[Weight]) -> None:
    """Raise for the first weight whose input a delta doesn't meet."""
    for weight in weights:
        if not (acts(weight.module, weight.tensor) and weight.layer.drops):
            raise TargetError(
                f"{weight.name}: dropout needs a layer that computes in activation space, and an "
                f"input to drop from, which a {type_before(weight.module).__name__} has not; use "
                "dropout=0, or exclude this weight"
            )


def partners(walk: Walk, weights: Sequence[Weight]) -> list[list[Weight]]:
    """List for each weight the others that are the same Parameter."""
    if not walk.shared:
        return [[] for _ in weights]
    same = [walk.shared.get(memory_of(weight.original), []) for weight in weights]
    return [
        [other for other in others if other.name != weight.name]
        for weight, others in zip(weights, same, strict=True)
    ]


def check_unshared(walk: Walk, weights: Sequence[Weight], consequence: str) -> None:
    """Raise for the first weight whose Parameter is another module's too."""
    for weight, others in zip(weights, partners(walk, weights), strict=True):
        if others:
            names = ", ".join(other.name for other in others)
            raise TargetError(
                f"{weight.name}: {names} is the same Parameter, and {consequence}; give each "
                "place a Parameter of its own, or exclude this weight"
            )


def without_tied(walk: Walk, weights: Sequence[Weight]) -> list[Weight]:
    """Leave out, with a warning that names them, the weights that are tied to an embedding."""
    tied = {
        weight.name: ", ".join(other.name for other in others)
        for weight, others in zip(weights, partners(walk, weights), strict=True)
        if any(isinstance(other.module, (nn.Embedding, nn.EmbeddingBag)) for other in others)
    }
    if tied:
        listing = "; ".join(f"{name} (is {others})" for name, others in tied.items())
        warnings.warn(f"not adapted, because tied to an embedding: {listing}", stacklevel=3)
    left = [weight for weight in weights if weight.name not in tied]
    if not left:
        raise TargetError("every weight is tied to an embedding; name other weights with target")
    return left


def _name_taken(weight: Weight, tensor: Tensor | None, chain: list[nn.Module]) -> str | None:
    own = weight.module._modules | weight.module._parameters | weight.module._buffers
    if "parametrizations" in own and not chains_of(weight.module):
        return (
            'its module has something of its own called "parametrizations", where torch keeps these'
        )
    return None


def _made_in_inference_mode(
    weight: Weight, tensor: Tensor | None, chain: list[nn.Module]
) -> str | None:
    if tensor is not None and tensor.is_inference():
        return (
            "it was made in torch.inference_mode and can never be trained; build the model outside"
        )
    return None


def _normed_by_hook(weight: Weight, tensor: Tensor | None, chain: list[nn.Module]) -> str | None:
    for hook in weight.module._forward_pre_hooks.values():
        kind = type(hook)
        if not kind.__module__.startswith("torch.nn.utils."):
            continue
        name = getattr(hook, "name", getattr(hook, "_tensor_name", None))
        if name and weight.tensor in (name, f"{name}_g", f"{name}_v", f"{name}_orig"):
            return (
                f"the forward hook {kind.__name__} sets this tensor before every forward; make it "
                "permanent (remove_weight_norm, remove_spectral_norm, prune.remove), or use "
                "torch.nn.utils.parametrizations"
            )
    return None


def _not_there(weight: Weight, tensor: Tensor | None, chain: list[nn.Module]) -> str | None:
    if chain or tensor is not None:
        return None
    if weight.tensor in weight.module._parameters:
        return "it is None; give the module a Parameter"
    return "it is no Parameter of its module; make it one"


def _lazy(weight: Weight, tensor: Tensor | None, chain: list[nn.Module]) -> str | None:
    if tensor is not None and is_lazy(tensor):
        return "it is lazy and has no shape yet; run one forward first"
    return None


def _not_floating(weight: Weight, tensor: Tensor | None, chain: list[nn.Module]) -> str | None:
    if tensor is not None and tensor.dtype not in FLOATS:
        allowed, got = show_dtypes(*FLOATS), show_dtypes(tensor.dtype)
        return f"its dtype must be one of {allowed}, got {got}; convert it"
    return None


def _not_dense(weight: Weight, tensor: Tensor | None, chain: list[nn.Module]) -> str | None:
    if tensor is not None and tensor.layout is not torch.strided:
        return f"its layout must be strided, got {tensor.layout}; make it dense"
    return None


def _distributed(weight: Weight, tensor: Tensor | None, chain: list[nn.Module]) -> str | None:
    if "DTensor" in [base.__name__ for base in type(tensor).__mro__]:
        return "it is a DTensor, already sharded; adapt the model before sharding it"
    return None


def _no_sum(weight: Weight, tensor: Tensor | None, chain: list[nn.Module]) -> str | None:
    if tensor is None or type(tensor) in (Tensor, nn.Parameter):
        return None
    try:
        with torch.no_grad():
            tensor + torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    except (NotImplementedError, RuntimeError, TypeError):
        return f"a {type(tensor).__name__} can't be added to a plain tensor; dequantize it first"
    return None


def _unreadable(weight: Weight, tensor: Tensor | None, chain: list[nn.Module]) -> str | None:
    if chain:
        try:
            _ = weight.like
        except Exception as error:
            names = ", ".join(type(entry).__name__ for entry in chain)
            return f"reading it through {names} fails with {error!r}; mend or remove these"
    return None


def _layer_rule(weight: Weight, tensor: Tensor | None, chain: list[nn.Module]) -> str | None:
    return weight.layer.refusal(weight.module)


RULES: tuple[Callable[[Weight, Tensor | None, list[nn.Module]], str | None], ...] = (
    _name_taken,
    _normed_by_hook,
    _not_there,
    _lazy,
    _made_in_inference_mode,
    _not_floating,
    _not_dense,
    _distributed,
    _no_sum,
    _unreadable,
    _layer_rule,
)
"""In this order: a later rule may rely on what an earlier one refuses."""
