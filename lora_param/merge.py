"""Merging: fold adapters into the weights for good."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from .chains import chains_of, run_through
from .checks import Need, check_unshared, deltas_called, walk
from .deltas import Delta
from .errors import AdapterError, LoRAError
from .quantised import is_quantised, parts_of
from .register import take_off
from .sharding import is_sharded, own_piece, whole
from .undo import all_or_nothing, keep_entries
from .walk import Walk
from .weight import Weight, merged_for_now, without_side_effects


def merge_lora(model: nn.Module, adapter: str | None = None, *, dequantize: bool = False) -> None:
    """Fold adapters into their weights for good, and take them off.

    The new weight is what reading the weight gave; where only some of a weight's adapters are
    merged, within rounding. Statistics that a merged adapter's hid behind its own become the same.
    A quantised weight becomes dense by `dequantize`: quantising the sum anew would change it.

    Raises:
        AdapterError: There is no such adapter, or it is disabled on some weight.
        LoRAError: A merged weight would not be finite; another's parametrization in front of the
            adapter can't take the sum as its value; one adapter of a weight isn't merged in front
            of another that is, and both don't add; or the model is wrapped or sharded.
        TargetError: A weight's Parameter has been tied to another module since.

    Example:
        >>> merge_lora(model)
        >>> type(model)
        <class 'torch.nn.modules.linear.Linear'>

    Source:
        Hu et al., arXiv:2106.09685, section 4.1, "No Additional Inference Latency".
    """
    found = walk(model, "merge_lora", Need.CHANGE)
    pairs = deltas_called(found, adapter)
    for weight, delta in pairs:
        if not delta.enabled:
            reason = f"adapter {delta.adapter!r} is disabled, so merging would change the output"
            raise AdapterError(f"{weight.name}: {reason}; enable it, or remove it")
    weights = {weight.whole.name: weight.whole for weight, _ in pairs}.values()
    check_unshared(found, list(weights), "merging would change it there too")
    _check_dense(weights, dequantize)
    merging = {delta for _, delta in pairs}
    merged = [values for weight in weights for values in _merged(weight, merging)]
    with all_or_nothing() as undo:
        for chain, original, value in merged:
            _replace(chain, original, _as_others(value, original, found), undo)
            increment_version(original)  # a graph that has saved the original must not go on
        take_off(found, pairs, undo)


@contextmanager
def lora_merged(model: nn.Module, *, dequantize: bool = False) -> Iterator[None]:
    """Run a block at the base's own speed: inside, each weight is plain and has its present value.

    After the block, also one that raises, every module has its originals and adapters back, the
    same objects with the same bits. In it other verbs raise a `LoRAError`, and what is done to the
    merged weights, which take memory of their own, is lost. Disabled adapters stay out. With
    `dequantize`, quantised weights are dense there.

    Raises:
        AdapterError: The model has no adapters.
        LoRAError: The model is wrapped or sharded.

    Example:
        >>> with lora_merged(model):
        ...     type(model), model(torch.ones(1, 3)).shape
        (<class 'torch.nn.modules.linear.Linear'>, torch.Size([1, 2]))
    """
    found = walk(model, "lora_merged", Need.STRUCTURE)
    weights = {weight.whole.name: weight.whole for weight, _ in deltas_called(found, None)}.values()
    _check_dense(weights, dequantize)
    values = [_as_others(weight.value, weight.originals[0], found) for weight in weights]
    with ExitStack() as undo:
        for weight, value in zip(weights, values, strict=True):
            module, chains = weight.module, weight.module._modules["parametrizations"]
            undo.callback(_follow, chains, module, module.training)
            undo.callback(merged_for_now.discard, module)
            merged_for_now.add(module)
            chain = chains_of(module)[weight.tensor]
            held = {_memory_of(each) for each in (*chain.parameters(), *chain.buffers())}
            own = value.clone() if _memory_of(value) in held else value
            plain = own if weight.is_buffer else nn.Parameter(own, requires_grad=False)
            weight.make_plain(plain, undo)
        yield


def _memory_of(tensor: Tensor) -> int:
    return parts_of(own_piece(tensor))[0].untyped_storage().data_ptr()


def _check_dense(weights: Iterable[Weight], dequantize: bool) -> None:
    for weight in weights:
        if not dequantize and any(is_quantised(each) for each in weight.originals):
            reason = "it is quantised, and quantising the merged weight anew would change it"
            fix = "pass dequantize=True for a dense one, or keep the adapter"
            raise LoRAError(f"{weight.name}: {reason}; {fix}")


def _as_others(value: Tensor, original: Tensor, walk: Walk) -> Tensor:
    """Give a weight the dtype of the model's others, where bitsandbytes forgot its own."""
    if original.dtype is not torch.int8:
        return value
    dtypes = (tensor.dtype for _, tensor in walk.parameters if type(tensor) is nn.Parameter)
    return value.to(next(dtypes, value.dtype))


def _replace(chain: Any, original: Any, value: Any, undo: ExitStack) -> None:
    if is_quantised(original):
        keep_entries(undo, (chain._parameters, ["original"]))
        chain._parameters["original"] = nn.Parameter(value, requires_grad=False)
    elif is_sharded(original):  # whose data are behind it
        piece = own_piece(original.detach())
        undo.callback(piece.copy_, piece.clone())
        piece.copy_(own_piece(value.redistribute(placements=original.placements)))
    else:
        undo.callback(setattr, original, "data", original.data)
        original.data = value


def _follow(chains: Any, module: nn.Module, training: bool) -> None:
    """Let chains that were away follow what has been done to their module's mode."""
    if module.training != training:
        chains.train(module.training)


def _merged(weight: Weight, merging: set[Delta]) -> list[tuple[Any, Tensor, Tensor]]:
    """List a weight's chain, originals, and the values that make up for the deltas in `merging`."""
    chain, originals = weight.chain, weight.originals
    last = max(index for index, entry in enumerate(chain) if entry in merging)
    applied = [e for e in chain[: last + 1] if e in merging or not isinstance(e, Delta)]
    others = [entry for entry in applied if entry not in merging]
    kept: Any = [entry for entry in chain[:last] if entry not in applied]
    for each in () if weight.is_buffer else kept:
        if fixed := [e for e in applied if e in chain[chain.index(each) :] and _turns(each, e)]:
            reason = f"{type(fixed[-1]).__name__} stands behind adapter {each.adapter!r}"
            fix = "so one can't be merged without the other; merge all"
            raise LoRAError(f"{weight.name}: {reason}, {fix}")
    with without_side_effects(chain):
        value = run_through(applied, originals)
        finite = value.is_meta or whole(value.isfinite().all())
        if not finite and all(whole(each.isfinite().all()) for each in originals):
            rule = f"the merged weight would not be finite in {value.dtype}"
            cause = "the adapter has diverged or overflows this dtype"
            raise LoRAError(f"{weight.name}: {rule}; {cause}")
        new = _inverted(weight, others, value) if others else [value]
    if weight.is_buffer:  # of several copies the last is read: those in front of it become the same
        originals += [each.value(value) for each in kept]
        new = [value.clone() for _ in originals]
    holder = chains_of(weight.module)[weight.tensor]
    return [(holder, original, each) for original, each in zip(originals, new, strict=True)]


def _turns(front: Delta, later: Any) -> bool:
    """Say whether a delta gives something else behind an entry than in front of it."""
    if not isinstance(later, Delta):
        return True
    if not front.enabled or (front.adds and later.adds):
        return False
    return front.rows is None or later.rows is None or front.rows.overlaps(later.rows)


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
        again = run_through(others, originals)
    except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
        raise LoRAError(refusal) from error
    tolerance = 16 * torch.finfo(value.dtype).eps
    if not torch.allclose(again, value, rtol=tolerance, atol=tolerance * float(value.abs().max())):
        raise LoRAError(refusal)
    return originals
