"""New adapters out of adapters' files, of two checkpoints, or of a model and a tuned one."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..checks import Need, walk
from ..combine import Fit, Method, combine, resized
from ..deltas.protocol import check_adapter
from ..errors import FileError, LoRAError
from ..extract import differences
from ..lowrank import Rank, check_rank_or_share
from ..progress import progress
from ..register import install
from ..targets import Target
from .formats import AdapterFile, open_adapter, write_adapter
from .outline import Outline, open_checkpoint, outline_of_tensors, plain_name
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
        >>> import copy
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
        elif isinstance(tuned, Mapping) and all(isinstance(t, Tensor) for t in tuned.values()):
            own = {plain_name(name): tensor for name, tensor in tuned.items()}
        else:
            rule = "tuned must be a module, a state dict of tensors or a path"
            raise LoRAError(f"{rule}, got {type(tuned).__name__}")
        pairs, fits = differences(found, own, rank, adapter, target, exclude)
    install(found, pairs, freeze)
    return fits


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
    check_apart(Path(out), *map(Path, files))
    with ExitStack() as stack:
        opened = [stack.enter_context(open_adapter(Path(path))) for path in files]
        weights, about = _common(opened)
        terms = [
            (weight, delta, strength * delta.strength)
            for file, strength in zip(opened, files.values(), strict=True)
            for weight, delta in file.fit(weights).items()
        ]
        deltas, fits = combine(terms, method, rank, density)
        write_adapter("native", Path(out), deltas, weights, about)
    return fits


def _common(files: list[AdapterFile]) -> tuple[Outline, About]:
    """Return what files say of the one base that they have, or raise a `FileError`."""
    base, shapes, layers = dict[str, str](), dict[str, Any](), dict[str, Any]()
    for file in files:
        file.check_said(file.outline, "convert it to native with --base first")
        about = file.about
        if other := [n for n, digest in about.base.items() if base.get(n, digest) != digest]:
            reason = "is of another base than those in front of it"
            raise FileError(f"{file.path}: {reason}: {shortened(other)}")
        base |= about.base
        shapes |= about.shapes
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
        for weight, delta in progress(list(deltas.items()), "resizing"):
            if "rank" in delta.numbers:
                deltas[weight], fit = resized(weight, delta, rank)
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
    What has changed and no adapter can hold is named in a warning.

    Raises:
        FileError: A checkpoint can't be read, they aren't of one model, or nothing has changed.
        LoRAError: The rank is out of range.
    """
    check_rank_or_share(rank)
    check_apart(Path(out), Path(base), Path(tuned))
    with open_checkpoint(Path(base)) as first, open_checkpoint(Path(tuned)) as second:
        outline = outline_of_tensors(first.tensors, {})
        try:
            pairs, fits = differences(outline.walk, second.tensors, rank)
        except LoRAError as error:
            raise FileError(f"{tuned}: held against {base}: {error}") from None
        write_adapter("native", Path(out), dict(pairs), outline, About())
    return fits
