"""New adapters out of adapters' files, of two checkpoints, or of a model and a tuned one."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from ..checks import Need, walk
from ..combine import Fit, Method, check_options, combined, resized
from ..deltas import Delta
from ..deltas.protocol import FLOATS, check_adapter
from ..errors import FileError, LoRAError
from ..extract import difference, differences
from ..layers import listed_tensors
from ..lowrank import Rank, check_rank_or_share
from ..register import install
from ..targets import Target
from ..weight import Weight, tensor_names
from .bases import open_checkpoint, plain_name
from .formats import AdapterFile, open_adapter, write_adapter
from .outline import Outline, outline_of_tensors
from .progress import progress
from .tensors import About, AnyPath, check_apart, shortened


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
        >>> import copy, torch
        >>> model = torch.nn.Linear(8, 8)
        >>> tuned = copy.deepcopy(model)
        >>> _ = tuned.weight.data.add_(torch.ones(8, 8))
        >>> [(fit.weight, fit.rank) for fit in extract_lora(model, tuned, rank=0.99)]
        [('weight', 1)]
    """
    found = walk(model, "extract_lora", Need.CHANGE)
    check_adapter(adapter)
    check_rank_or_share(rank)
    with ExitStack() as stack:
        if isinstance(tuned, (str, Path)):
            own = stack.enter_context(open_checkpoint(Path(tuned))).tensors
        elif isinstance(tuned, nn.Module):
            own = {weight.name: weight.value for weight, _ in walk(tuned, "extract_lora").tensors}
        else:
            own = _plain(tuned)
        pairs, fits = differences(found, own, rank, adapter, target, exclude)
    install(found, pairs, freeze)
    return fits


def _plain(tensors: Any) -> dict[str, Tensor]:
    if not isinstance(tensors, Mapping) or not all(isinstance(t, Tensor) for t in tensors.values()):
        got = type(tensors).__name__
        raise LoRAError(f"tuned must be a module, a state dict of tensors or a path, got {got}")
    return {plain_name(name): tensor for name, tensor in tensors.items()}


def combine_files(
    files: Mapping[AnyPath, float],
    out: AnyPath,
    *,
    method: Method = "sum",
    rank: Rank | None = None,
    density: float | None = None,
) -> list[Fit]:
    """Combine adapters' files as `combine_lora` does adapters, and write one of our own.

    Each has the strength that is given times that at which it was saved.

    Raises:
        FileError: A file doesn't say what its weights are, or they are of different bases.
        AdapterError: A kind doesn't add.
        LoRAError: An option is out of range.
    """
    check_options(method, rank, density)
    check_apart(Path(out), *map(Path, files))
    with ExitStack() as stack:
        opened = [stack.enter_context(open_adapter(Path(path))) for path in files]
        weights, about = _common(opened)
        terms: dict[str, list[tuple[Delta, float]]] = {}
        for file, strength in zip(opened, files.values(), strict=True):
            for name, delta in file.fit(file.outline).items():
                delta.check_strength(1 if delta.of_buffers else strength)
                terms.setdefault(name, []).append((delta, strength * delta.strength))
        deltas, fits = dict[str, Delta](), list[Fit]()
        for name, own in progress(list(terms.items()), "combining"):
            weight = cast("Weight", weights.weight(name))  # of the files' own outlines
            deltas[name], fit = combined(weight, own, method=method, rank=rank, density=density)
            fits += [] if deltas[name].of_buffers else [fit]
        write_adapter("native", Path(out), deltas, weights, about)
    return fits


def _common(files: list[AdapterFile]) -> tuple[Outline, About]:
    """Return what files say of the one base that they have, or raise a `FileError`."""
    base, shapes, layers = dict[str, str](), dict[str, Any](), dict[str, Any]()
    for file in files:
        if file.outline.unknown:
            raise FileError(f"{file.unsaid}; convert it to native with --base first")
        about = file.about
        if other := [n for n, digest in about.base.items() if base.get(n, digest) != digest]:
            reason = "is of another base than those in front of it"
            raise FileError(f"{file.path}: {reason}: {shortened(other)}")
        base, shapes = {**base, **about.base}, {**shapes, **about.shapes}
        layers |= about.layers
    first = files[0].about
    name = first.model if all(each.about.model == first.model for each in files) else ""
    about = About("combined", name, first.cls, base, shapes, layers)
    return outline_of_tensors(shapes, layers), about


def resize_file(path: AnyPath, out: AnyPath, rank: Rank) -> list[Fit]:
    """Give a file's pairs another rank as `resize_lora` does an adapter's, and write our own file.

    Raises:
        FileError: The file doesn't say what its weights are.
        LoRAError: The rank is out of range, or there is no pair.
    """
    check_rank_or_share(rank)
    check_apart(Path(out), Path(path))
    with open_adapter(Path(path)) as file:
        weights, _ = _common([file])
        deltas, fits = file.fit(weights), list[Fit]()
        for name, delta in progress(list(deltas.items()), "resizing"):
            if "rank" in delta.numbers:
                deltas[name], fit = resized(cast("Weight", weights.weight(name)), delta, rank)
                fits.append(fit)
        if not fits:
            raise LoRAError(f"{path}: there is no pair of factors to resize")
        write_adapter("native", Path(out), deltas, weights, file.about)
    return fits


def extract_checkpoint(
    base: AnyPath, tuned: AnyPath, out: AnyPath, *, rank: Rank = 16
) -> list[Fit]:
    """Write what turns a checkpoint into a tuned one as an adapter's file, a tensor at a time.

    What a layer is, is told from names and shapes: a matrix called `weight` is a linear layer's.

    Raises:
        FileError: A checkpoint can't be read, or they aren't of one model.
        LoRAError: The rank is out of range, or nothing has changed.
    """
    check_rank_or_share(rank)
    check_apart(Path(out), Path(base), Path(tuned))
    with open_checkpoint(Path(base)) as first, open_checkpoint(Path(tuned)) as second:
        old, new = first.tensors, second.tensors
        shapes = [{name: each.shape for name, each in side.items()} for side in (old, new)]
        if other := [name for name in {**old, **new} if len({s.get(name) for s in shapes}) > 1]:
            raise FileError(f"{tuned}: has other tensors than {base}: {shortened(other)}")
        outline = outline_of_tensors(old, {})
        deltas, fits, left = dict[str, Delta](), list[Fit](), list[str]()
        for name, weight in progress(list(outline.weights.items()), "extracting"):
            if old[name].dtype not in FLOATS or not old[name].ndim:
                left += [] if old[name].equal(new[name]) else [name]
                continue
            layer = weight.layer
            own = listed_tensors(layer, tensor_names(weight.module))
            low = layer.default and weight.tensor in own
            view = weight.view if low and old[name].ndim > 1 else None
            if (found := difference(name, old[name], new[name], view, rank)) is not None:
                deltas[name], fit = found
                fits.append(fit)
        if left:
            raise FileError(f"{tuned}: no adapter can hold the change of {shortened(left)}")
        if not deltas:
            raise LoRAError(f"{tuned}: has the tensors of {base}, to the bit")
        write_adapter("native", Path(out), deltas, outline, About())
    return fits
