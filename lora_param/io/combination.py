"""New adapters' files out of others: combinations of several, and one with another rank."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..combine import Fit, Method, combine, resized
from ..errors import FileError, LoRAError, shortened
from ..lowrank import Rank, check_rank_or_share
from ..progress import progress
from .formats import AdapterFile, open_adapter, write_adapter
from .outline import Outline, outline_of_tensors
from .tensors import About, AnyPath, check_apart


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
    rank = check_rank_or_share(rank)
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
