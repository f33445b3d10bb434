"""Merging: fold adapters into the weights for good."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .classes import chains_of, evaluated, originals_of
from .errors import AdapterError, LoRAError
from .parametrization import LoRAParametrization
from .refusals import check_model, check_structure, check_unshared
from .register import adapters_of, take_off
from .surgery import all_or_nothing, chain_of, put_plain, undisturbed, value_of
from .targets import Weight


def merge_lora(model: nn.Module, adapter: str | None = None) -> None:
    """Fold adapters into their weights for good, and take them off.

    The new weight is what reading the weight gave, rounded once to its dtype, so the output stays
    what it was; within rounding, where only some of a weight's adapters are merged. All new weights
    are computed before the first is set.

    Args:
        model: An adapted model.
        adapter: The adapter's name; `None` means all.

    Raises:
        AdapterError: There is no such adapter, or it is disabled on some weight.
        LoRAError: A merged weight would not be finite; another's parametrization in front of the
            adapter can't take the sum as its value; or the model is wrapped or sharded.
        TargetError: A weight's Parameter has been tied to another module since.

    Example:
        >>> import torch
        >>> from lora_param import register_lora
        >>> model = torch.nn.Linear(3, 2)
        >>> _ = register_lora(model, rank=1)
        >>> merge_lora(model)
        >>> type(model)
        <class 'torch.nn.modules.linear.Linear'>

    Source:
        Hu et al., arXiv:2106.09685, section 4.1, "No Additional Inference Latency".
    """
    check_model(model, "merge_lora")
    pairs = adapters_of(model, adapter)
    for weight, entry in pairs:
        if not entry.enabled:
            raise AdapterError(
                f"{weight.name}: adapter {entry.adapter!r} is disabled, so merging would change "
                "the output; enable it, or remove it"
            )
    weights = list({weight.name: weight for weight, _ in pairs}.values())
    check_unshared(model, weights, "merging would change it there too")
    merging = {id(entry) for _, entry in pairs}
    with all_or_nothing(model):
        merged = [values for weight in weights for values in _merged(weight, merging)]
        for original, value in merged:
            original.data = value
        take_off(model, pairs)


@contextmanager
def lora_merged(model: nn.Module) -> Iterator[None]:
    """Run a block at the base's own speed: inside, each weight is plain and has its present value.

    Nothing is added and subtracted: after the block, also one that raises, every module has its
    originals and adapters back, the same objects with the same bits. For inference: in the block
    other verbs raise a `LoRAError`, and what is done to the merged weights is lost. They take as
    much memory again as the adapted weights.

    Args:
        model: An adapted model. Disabled adapters stay out.

    Yields:
        Nothing.

    Raises:
        AdapterError: The model has no adapters.
        LoRAError: The model is wrapped or sharded.

    Example:
        >>> import torch
        >>> from lora_param import register_lora
        >>> model = torch.nn.Linear(3, 2)
        >>> _ = register_lora(model, rank=1)
        >>> with lora_merged(model):
        ...     type(model), model(torch.ones(1, 3)).shape
        (<class 'torch.nn.modules.linear.Linear'>, torch.Size([1, 2]))

    Source:
        Hu et al., arXiv:2106.09685, section 4.1, "No Additional Inference Latency".
    """
    check_structure(model, "lora_merged")
    values: defaultdict[nn.Module, dict[str, Tensor]] = defaultdict(dict)
    for weight, _ in adapters_of(model):
        value = value_of(weight.module, weight.tensor)
        originals = originals_of(chains_of(weight.module)[weight.tensor])
        shared = any(value.data_ptr() == original.data_ptr() for original in originals)
        values[weight.module][weight.tensor] = value.clone() if shared else value
    with ExitStack() as stack:
        for module, each in values.items():
            stack.callback(put_plain(module, each))
        yield


def _merged(weight: Weight, merging: set[int]) -> list[tuple[Tensor, Tensor]]:
    """Pair a weight's originals with the values that make up for the entries in `merging`."""
    chain = chain_of(weight.module, weight.tensor)
    last = max(index for index, entry in enumerate(chain) if id(entry) in merging)
    ours = [isinstance(entry, LoRAParametrization) for entry in chain]
    applied = [e for e, lora in zip(chain, ours, strict=True) if not lora or id(e) in merging]
    applied = applied[: applied.index(chain[last]) + 1]
    others = [entry for entry in applied if id(entry) not in merging]
    if others and any(
        lora and id(entry) not in merging
        for entry, lora in zip(chain[: chain.index(others[-1])], ours, strict=False)
    ):
        raise LoRAError(
            f"{weight.name}: {type(others[-1]).__name__} stands between the adapters, so one can't "
            "be merged without the other; merge all"
        )
    originals = originals_of(chains_of(weight.module)[weight.tensor])
    with undisturbed(chain):
        value = evaluated(applied, originals)
        _check_finite(weight, originals, value)
        new = _inverted(weight, others, value) if others else [value]
    return list(zip(originals, new, strict=True))


def _inverted(weight: Weight, others: list[nn.Module], value: Tensor) -> list[Tensor]:
    """Find the originals that others' parametrizations turn into `value`."""
    refusal = (
        f"{weight.name}: {', '.join(type(entry).__name__ for entry in others)}, in front of the "
        "adapter, can't take the merged weight as its value; remove that parametrization first, or "
        "keep the adapter"
    )
    try:
        new: Any = value
        for entry in reversed(others):
            new = entry.right_inverse(new)  # type: ignore[operator]
        originals = [new] if isinstance(new, Tensor) else list(new)
        again = evaluated(others, originals)
    except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
        raise LoRAError(refusal) from error
    tolerance = 16 * torch.finfo(value.dtype).eps
    if not torch.allclose(again, value, rtol=tolerance, atol=tolerance * float(value.abs().max())):
        raise LoRAError(refusal)
    return originals


def _check_finite(weight: Weight, originals: list[Tensor], value: Tensor) -> None:
    if value.is_meta or value.isfinite().all():
        return
    if all(original.isfinite().all() for original in originals):
        raise LoRAError(
            f"{weight.name}: the merged weight would not be finite in {value.dtype}; "
            "the adapter has diverged or overflows this dtype"
        )
