"""What a tuning has changed, as an adapter: of a model and its twin, or of two checkpoints."""

import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checks import Need, check_weights, walk
from ..combine import Fit, pair_of
from ..deltas import Delta, DenseDelta, StatisticsDelta
from ..deltas.protocol import FLOATS, Shape, check_adapter
from ..errors import FileError, LoRAError, TargetError, shortened
from ..lowrank import LARGE, Rank, check_rank_or_share, factorised
from ..progress import progress
from ..register import install
from ..targets import Target, named, resolve
from ..walk import Walk
from ..weight import Weight
from .formats import write_adapter
from .outline import open_checkpoint, outline_of_tensors, plain_name
from .tensors import About, AnyPath, check_apart


def extract_lora(
    model: nn.Module,
    tuned: nn.Module | Mapping[str, Tensor] | AnyPath,
    *,
    rank: Rank = 16,
    adapter: str = "default",
    target: Target | None = None,
    exclude: Target | None = None,
    freeze: bool = True,
) -> list[Fit]:
    """Register on a model, as an adapter, what turns its weights into those of a tuned twin.

    Of weights that multiply activations the nearest update of a rank, by SVD, of large ones within
    1 %; of biases, norms and embeddings all of the change, as dense deltas. What is the same in
    both is left out.

    Args:
        model: The base, as it was before the tuning.
        tuned: A model of the same structure, its state dict, or the path of a checkpoint: a
            file, an index of shards or a folder, of which safetensors are read one at a time.
        rank: A number, or a share below 1 of each change's squared norm for the least to hold it.
        adapter: The new adapter's name.
        target: As for `register_lora`: the only weights to extract. What else has changed is named
            in a warning. `None` means all.
        exclude: The same, for what is left out.
        freeze: Freeze the base, as `register_lora` does.

    Returns:
        Each changed weight's rank, `None` for a dense delta, and relative error, in model order.

    Raises:
        LoRAError: The twin has other parameters, nothing has changed, or an option is out of range.
        AdapterError: The name is taken on one of the weights.
        FileError: The checkpoint can't be read.

    Example:
        >>> import copy
        >>> model = torch.nn.Linear(8, 8)
        >>> tuned = copy.deepcopy(model)
        >>> _ = tuned.weight.data.add_(torch.ones(8, 8))
        >>> [(fit.weight, fit.rank) for fit in extract_lora(model, tuned, rank=0.99)]
        [('weight', 1)]
    """
    found = walk(model, "extract_lora", Need.CHANGE)
    check_adapter(adapter)
    rank = check_rank_or_share(rank)
    with ExitStack() as stack:
        if isinstance(tuned, (str, Path)):
            own = stack.enter_context(open_checkpoint(Path(tuned))).tensors
        elif isinstance(tuned, nn.Module):
            own = {weight.name: weight.value for weight, _ in walk(tuned, "extract_lora").tensors}
        elif isinstance(tuned, Mapping) and all(isinstance(t, Tensor) for t in tuned.values()):
            own = {plain_name(name): tensor for name, tensor in tuned.items()}
        else:
            rule = "tuned must be a module, a state dict of tensors or a path"
            raise LoRAError(f"{rule}, got {type(tuned).__name__}")
        pairs, fits = _differences(found, own, rank, adapter, target, exclude)
    install(found, pairs, freeze)
    return fits


def extract_checkpoint(
    base: AnyPath, tuned: AnyPath, out: AnyPath, *, rank: Rank = 16
) -> list[Fit]:
    """Write what turns a checkpoint into a tuned one as an adapter's file, a tensor at a time.

    What a layer is, is told from names and shapes: a matrix called `weight` is a linear layer's.
    What has changed and no adapter can hold is named in a warning.

    Raises:
        FileError: A checkpoint can't be read, they aren't of one model, or nothing has changed.
        LoRAError: The rank is out of range.
    """
    rank = check_rank_or_share(rank)
    check_apart(Path(out), Path(base), Path(tuned))
    with open_checkpoint(Path(base)) as first, open_checkpoint(Path(tuned)) as second:
        outline = outline_of_tensors(first.tensors, {})
        try:
            pairs, fits = _differences(outline.walk, second.tensors, rank)
        except LoRAError as error:
            raise FileError(f"{tuned}: held against {base}: {error}") from None
        write_adapter("native", Path(out), dict(pairs), outline, About())
    return fits


def _differences(
    walk: Walk,
    tuned: Mapping[str, Tensor],
    rank: Rank,
    adapter: str = "default",
    target: Target | None = None,
    exclude: Target | None = None,
) -> tuple[list[tuple[Weight, Delta]], list[Fit]]:
    """Pair a model's weights with what turns them into a tuned model's, one at a time."""
    tensors = {weight.name: (weight, tensor) for weight, tensor in walk.tensors}
    _check_same(tensors, tuned, walk)
    excluded = set() if exclude is None else {w.name for w in named(walk, "exclude", exclude)}
    try:
        low_rank = {weight.name for weight in resolve(walk, target)[0]}
    except TargetError:
        if target is not None:
            raise
        low_rank = set()  # a model without such layers has dense deltas alone
    moving = {weight.name for weight in walk.moving}
    pairs, fits, left = list[tuple[Weight, Delta]](), list[Fit](), list[str]()
    for name, (weight, base) in progress(tensors.items(), "extracting"):
        if name in excluded or name not in tuned:
            continue
        wanted = target is None or name in low_rank
        if wanted and not weight.is_buffer and base.dtype in FLOATS and base.ndim:
            view = weight.view if name in low_rank else None
            if found := _difference(name, base, tuned[name], view, rank):
                pairs.append((weight, found[0]))
                fits.append(found[1])
        elif not torch.equal(base, value := tuned[name].to(base)):
            if name in moving and target is None:
                pairs.append((weight, StatisticsDelta(value)))
            else:
                left.append(name)
    if not pairs:
        raise LoRAError("there is no difference: the tuned weights are the model's own")
    check_weights([weight for weight, _ in pairs if not weight.is_buffer], adapter)
    if left:
        warnings.warn(f"changed, and not extracted: {shortened(left, 5, ', ')}", stacklevel=3)
    for _, delta in pairs:
        delta.adapter = adapter
    return pairs, fits


def _difference(
    name: str, base: Tensor, tuned: Tensor, view: Shape | None, rank: Rank
) -> tuple[Delta, Fit] | None:
    """Return what turns a base's weight into a tuned one's: a pair, or without a view dense."""
    tuned = tuned.detach().to(base.device)
    if base.dtype == tuned.dtype and torch.equal(base, tuned):
        return None
    dtype = torch.promote_types(torch.promote_types(base.dtype, tuned.dtype), torch.float32)
    wide = dtype if view and min(view[-2:]) >= LARGE else torch.float64
    change = tuned.to(wide) - base.detach().to(wide)
    if not change.any():
        return None
    if not change.isfinite().all():
        raise LoRAError(f"{name}: the difference isn't finite; the checkpoint is damaged")
    if view is None:
        return DenseDelta.restore({"D": change.to(dtype)}, {}), Fit(name, None, 0.0)
    product = factorised(change.reshape(view), rank)
    return pair_of(product, dtype), Fit(name, product.A.shape[-2], product.error)


def _check_same(
    tensors: Mapping[str, tuple[Weight, Tensor]], tuned: Mapping[str, Tensor], walk: Walk
) -> None:
    """Raise unless both have the same parameters, of which tied ones need be there once."""
    faults = [f"unexpected: {name}" for name in tuned if name not in tensors]
    for name, (weight, base) in tensors.items():
        if name in tuned and tuned[name].shape != base.shape:
            got = tuple(tuned[name].shape)
            faults.append(f"misshapen: {name} is {got}, should be {tuple(base.shape)}")
        absent = name not in tuned and not weight.is_buffer
        if absent and not any(other.name in tuned for other in walk.partners(weight)):
            faults.append(f"missing: {name}")
    if faults:
        raise LoRAError(f"the tuned weights aren't of this model: {shortened(faults)}")
