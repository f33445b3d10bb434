"""Adapters and checkpoints, both as files: held together, merged, converted, combined, resized."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Set
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..combine import Fit, Method, combine, resized
from ..deltas import Delta
from ..errors import FileError, LoRAError, shortened
from ..frozen import bytes_of, digest, digest_of
from ..lowrank import Rank, check_rank_or_share
from ..progress import progress
from ..rows import Rows
from .formats import AdapterFile, open_adapter, open_both, write_adapter
from .outline import Outline, outline_of_tensors
from .tensors import About, AnyPath, OpenFile, check_apart, check_name, write_blobs

BLOCK = 2**22
"""Bytes of a tensor that are merged at a time."""

NATIVE = "convert it to native with --base first"
OTHER_BASE = "give the base that the adapter was trained on, or --any-base"


def check_checkpoint(
    path: AnyPath, base: AnyPath, /, *, base_prefix: str | None = None, **options: Any
) -> int:
    """Compare a checkpoint with the base that an adapter's file was trained on, bit for bit.

    Args:
        path: The adapter's file, in any format.
        base: The checkpoint: safetensors or a pickled state dict, an index of shards, or a folder
            with one of these.
        base_prefix: What the model's names begin with and the checkpoint's don't, such as
            `"bert."`, or the other way round; `None` for what can be seen.
        **options: What the adapter's format takes.

    Returns:
        The number of parameters.

    Raises:
        FileError: Not all are equal, or the file doesn't say its base's bits.

    Example:
        >>> check_checkpoint("adapter.safetensors", "base.pt")
        2
    """
    with open_both(path, base, base_prefix, options) as (file, _, weights, _):
        digests, tensors = file.about.base, weights.tensors
        if not digests:
            raise FileError(
                f"{path}: fits by names and shapes; it holds no fingerprint of its base, so "
                "whether it was trained on these very bits can't be said"
            )
        present = progress([name for name in digests if name in tensors], "digesting")
        differing = [name for name in present if digest_of(name, tensors[name]) != digests[name]]
        if differing := [*_missing(digests, tensors), *differing]:
            raise FileError(
                f"{path}: {len(differing)} of {len(digests)} parameters of its base aren't "
                f"those of {base}: {shortened(differing)}"
            )
    return len(digests)


def merge_checkpoint(
    path: AnyPath,
    base: AnyPath,
    out: AnyPath,
    /,
    *,
    any_base: bool = False,
    base_prefix: str | None = None,
    **options: Any,
) -> tuple[int, int]:
    """Fold a file's adapter into a checkpoint, to the bits that `merge_lora` gives.

    Some rows of one tensor are in memory at a time, and `out` takes its place when it is complete.

    Args:
        path: The adapter's file, in any format.
        base: The checkpoint, as for `check_checkpoint`; of several files one is made.
        out: The safetensors file to write.
        any_base: Merge even if the adapter was trained on another base.
        base_prefix: As for `check_checkpoint`.
        **options: What the adapter's format takes.

    Returns:
        How many tensors have changed, and how many there are.

    Raises:
        FileError: The files don't belong together, or a merged weight would not be finite.

    Example:
        >>> merge_checkpoint("adapter.safetensors", "base.pt", "merged.safetensors")
        (1, 2)
    """
    check_apart(Path(out), Path(path), Path(base))
    check_name(Path(out))
    with open_both(path, base, base_prefix, options) as (file, checkpoint, weights, found):
        files, names = checkpoint.files, checkpoint.names
        check_apart(Path(out), *(opened.path for opened in {*files.values()}))
        deltas: defaultdict[str, list[Delta]] = defaultdict(list)
        for weight, delta in found.items():
            deltas[weight.whole.name].append(delta)
        hidden = {name for key, name in names.items() if "parametrizations." in key}
        if hidden := hidden & deltas.keys():
            listed = shortened(sorted(hidden))
            raise FileError(f"{base}: parametrized: {listed}; load both, and call merge_lora")
        digests = {} if any_base else file.about.base
        if missing := _missing(digests, weights.tensors):
            raise FileError(f"{base}: lacks {shortened(missing)}; {OTHER_BASE}")
        if twins := [] if any_base else _twins(weights.tensors, deltas.keys(), file.about):
            raise FileError(
                f"{base}: {shortened(twins)} may be adapted weights by other names, having their "
                "bits, and would not change; take them out, or give --any-base if they aren't"
            )

        def blocks() -> Iterator[Any]:
            for key, name in progress(list(names.items()), "merging"):
                yield from merged_blocks(files[key], key, name, deltas.get(name, []), digests)

        entries = {key: opened.entry(key) for key, opened in files.items()}
        write_blobs(Path(out), entries, checkpoint.metadata, blocks())
    return len(deltas), len(names)


def convert_file(
    path: AnyPath,
    out: AnyPath,
    format: str,
    base: AnyPath | None = None,
    *,
    base_prefix: str | None = None,
    options: Mapping[str, Any] | None = None,
    write_options: Mapping[str, Any] | None = None,
) -> list[str]:
    """Write an adapter's file again in another format; what can't be known is an error.

    Args:
        path: The file, in any format.
        out: What to write: a file, for PEFT a folder.
        format: The format to write: `"native"`, `"peft"` or `"kohya"`.
        base: The checkpoint that it was trained on, as for `check_checkpoint`; needed unless the
            file is our own and PEFT isn't to hold what was trained whole.
        base_prefix: As for `check_checkpoint`.
        options: What the file's own format takes, such as `{"alpha": 16}`.
        write_options: What the new format takes, see `save_lora`.

    Returns:
        The names of the weights, in model order.

    Raises:
        FileError: The file doesn't say enough, doesn't fit the checkpoint, or can't be held.
        LoRAError: A format doesn't know an option.

    Example:
        >>> convert_file("adapter.safetensors", "for_peft", "peft")
        ['0.weight']
    """
    check_apart(Path(out), *(Path(each) for each in (path, base) if each))
    with open_both(path, base, base_prefix, options or {}) as (file, _, weights, deltas):
        file.check_said(weights, "give the checkpoint that it was trained on with --base")
        write_adapter(format, Path(out), deltas, weights, file.about, **write_options or {})
    return [weight.name for weight in deltas]


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
        file.check_said(file.outline, NATIVE)
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
        file.check_said(file.outline, NATIVE)
        deltas, fits = file.fit(file.outline), list[Fit]()
        for weight, delta in progress(list(deltas.items()), "resizing"):
            if "rank" in delta.numbers:
                deltas[weight], fit = resized(weight, delta, rank)
                fits.append(fit)
        if not fits:
            raise LoRAError(f"{path}: there is no pair of factors to resize")
        write_adapter("native", Path(out), deltas, file.outline, file.about)
    return fits


def _twins(tensors: Mapping[str, Tensor], adapted: Set[str], about: About) -> list[str]:
    """List the tensors that have the bits of an adapted one, and aren't known for others."""
    # A file that knows its base's class was saved beside the model, and has all its names.
    others = sorted(tensors.keys() - adapted - (about.shapes.keys() if about.cls else set()))

    def is_same(a: Tensor, b: Tensor) -> bool:  # their beginnings tell nearly all apart
        begins = a.shape == b.shape and torch.equal(a.flatten()[:64], b.flatten()[:64])
        return begins and torch.equal(a, b)

    return [one for one in others if any(is_same(tensors[one], tensors[each]) for each in adapted)]


def merged_blocks(
    file: OpenFile, key: str, name: str, deltas: list[Delta], base: Mapping[str, str]
) -> Iterator[Any]:
    """Yield a tensor's bytes in blocks of whole rows, with its updates added."""
    entry, dtype = file.entry(key), file.tensors[key].dtype
    digested, size = digest(dtype, entry.shape), entry.end - entry.begin
    row = size // (*entry.shape, 1)[0] if deltas else 1
    rows = max(1, BLOCK // row)
    if not all(delta.by_rows for delta in deltas):
        rows = (*entry.shape, 1)[0]
    for index, content in enumerate(file.blocks(key, rows * row)):
        digested.update(content)
        if deltas:
            weight = torch.frombuffer(content, dtype=dtype).view(-1, *entry.shape[1:])
            value = _with_updates(weight, index * rows, deltas)
            if not value.isfinite().all() and weight.isfinite().all():
                raise FileError(f"{file.path}: {name} would not be finite in {dtype}")
            content = bytes_of(name, value)
        yield content
    if base.get(name, digested.hexdigest()) != digested.hexdigest():
        raise FileError(f"{file.path}: {name} has other bits; {OTHER_BASE}")


@torch.no_grad()
def _with_updates(weight: Tensor, begin: int, deltas: list[Delta]) -> Tensor:
    """Add to a tensor's rows from row `begin` on what each update has for them."""
    end = begin + len(weight)
    for delta in deltas:
        rows, first, last = delta.rows, begin, end
        if rows is not None and delta.dim == 0:
            first, last = (sum(row < place for row in rows) for place in (begin, end))
            if not (inside := [row - begin for row in rows if begin <= row < end]):
                continue
            rows = Rows.of(inside, len(weight))
        block = delta.block(first, last)
        block.rows, block.dim = rows, delta.dim
        weight = block(weight)
    return weight


def _missing(base: Mapping[str, str], tensors: Mapping[str, Tensor]) -> list[str]:
    """List the parameters of a base that a checkpoint lacks, and doesn't hold by another name."""
    # A checkpoint may hold tied weights once; equal biases are no sign of that.
    tied = {base[name] for name in base.keys() & tensors.keys() if tensors[name].dim() > 1}
    return [name for name, digest in base.items() if name not in tensors and digest not in tied]
