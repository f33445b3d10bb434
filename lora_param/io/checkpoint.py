"""Adapters and checkpoints, both as files: whether they belong together, their sum, conversion."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Mapping, Set
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..deltas import Delta
from ..errors import FileError
from ..frozen import bytes_of, digest, digest_of
from ..rows import Rows
from ..walk import WRAPPERS
from ..weight import join
from .formats import AdapterFile, open_adapter, write_adapter
from .outline import Outline, outline_of_tensors
from .progress import progress
from .tensors import About, AnyPath, Entry, OpenFile, check_apart, open_file, shortened, write_blobs

BLOCK = 2**22
"""Bytes of a tensor that are merged at a time."""

OTHER_BASE = "give the base that the adapter was trained on, or --any-base"


def plain_name(key: str) -> str:
    """Return the plain model's name of a key of a state dict."""
    plain = join(*(part for part in key.split(".") if part not in WRAPPERS))
    return re.sub(r"parametrizations\.([^.]+)\.original$", r"\1", plain)


def _outline(checkpoint: OpenFile, file: AdapterFile) -> Outline:
    """Take a checkpoint's outline, with what an adapter's file knows of the layers."""
    tensors: dict[str, Tensor] = {}
    for key, tensor in checkpoint.tensors.items():
        if (name := plain_name(key)) in tensors:
            raise FileError(f"{checkpoint.path}: more than one tensor is {name}; keep one of them")
        tensors[name] = tensor
    return outline_of_tensors(tensors, file.about.layers)


def check_checkpoint(path: AnyPath, base: AnyPath, /, **options: Any) -> int:
    """Compare a checkpoint with the base that an adapter's file was trained on, bit for bit.

    Args:
        path: The adapter's file, in any format.
        base: The checkpoint, safetensors or a pickled state dict.
        **options: What the adapter's format takes.

    Returns:
        The number of parameters.

    Raises:
        FileError: Not all are equal, or the file doesn't say its base's bits.

    Example:
        >>> import tempfile, torch
        >>> from lora_param import base_state_dict, register_lora, save_lora
        >>> model = torch.nn.Linear(3, 2)
        >>> _ = register_lora(model, rank=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_lora(model, f"{folder}/adapter.safetensors")
        ...     torch.save(base_state_dict(model), f"{folder}/base.pt")
        ...     check_checkpoint(f"{folder}/adapter.safetensors", f"{folder}/base.pt")
        2
    """
    with open_adapter(Path(path)) as file, open_file(Path(base)) as checkpoint:
        weights = _outline(checkpoint, file)
        file.fit(weights, **options)
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
    **options: Any,
) -> tuple[int, int]:
    """Fold a file's adapter into a checkpoint, to the bits that `merge_lora` gives.

    Some rows of one tensor are in memory at a time, and `out` takes its place when it is complete.

    Args:
        path: The adapter's file, in any format.
        base: The checkpoint, a safetensors file.
        out: The safetensors file to write.
        any_base: Merge even if the adapter was trained on another base.
        **options: What the adapter's format takes.

    Returns:
        How many tensors have changed, and how many there are.

    Raises:
        FileError: The files don't belong together, or a merged weight would not be finite.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> from lora_param import base_state_dict, register_lora, save_lora
        >>> model = torch.nn.Linear(3, 2)
        >>> _ = register_lora(model, rank=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     adapter, base, out = (f"{folder}/{name}.safetensors" for name in "abc")
        ...     save_lora(model, adapter)
        ...     save_file(base_state_dict(model), base)
        ...     merge_checkpoint(adapter, base, out)
        (1, 2)
    """
    check_apart(Path(out), Path(path), Path(base))
    with open_adapter(Path(path)) as file, open_file(Path(base)) as checkpoint:
        checkpoint.check_whole()
        weights, header = _outline(checkpoint, file), checkpoint.header
        deltas: defaultdict[str, list[Delta]] = defaultdict(list)
        for name, delta in file.fit(weights, **options).items():
            deltas[name.rpartition("[")[0] if delta.rows else name].append(delta)
        hidden = {plain_name(key) for key in header.tensors if "parametrizations." in key}
        if hidden := hidden & deltas.keys():
            names = shortened(sorted(hidden))
            raise FileError(f"{base}: parametrized: {names}; load both, and call merge_lora")
        digests = {} if any_base else file.about.base
        if missing := _missing(digests, weights.tensors):
            raise FileError(f"{base}: lacks {shortened(missing)}; {OTHER_BASE}")
        if twins := [] if any_base else _twins(weights.tensors, deltas.keys(), file.about):
            raise FileError(
                f"{base}: {shortened(twins)} may be adapted weights by other names, having their "
                "bits, and would not change; take them out, or give --any-base if they aren't"
            )
        blocks = (
            block
            for key, entry in progress(list(header.tensors.items()), "merging")
            for name in [plain_name(key)]
            for block in merged_blocks(
                *(checkpoint.file, name, entry, weights.tensors[name].dtype),
                *(deltas.get(name, []), digests),
            )
        )
        write_blobs(Path(out), header.tensors, header.metadata, blocks)
    return len(deltas), len(header.tensors)


def convert_file(
    path: AnyPath,
    out: AnyPath,
    format: str,
    base: AnyPath | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    write_options: Mapping[str, Any] | None = None,
) -> list[str]:
    """Write an adapter's file again in another format; what can't be known is an error.

    Args:
        path: The file, in any format.
        out: What to write: a file, for PEFT a folder.
        format: The format to write: `"native"`, `"peft"` or `"kohya"`.
        base: The checkpoint that it was trained on; needed unless the file is our own.
        options: What the file's own format takes, such as `{"alpha": 16}`.
        write_options: What the new format takes, see `save_lora`.

    Returns:
        The names of the weights, in model order.

    Raises:
        FileError: The file doesn't say enough, doesn't fit the checkpoint, or can't be held.
        LoRAError: A format doesn't know an option.

    Example:
        >>> import tempfile, torch
        >>> from lora_param import register_lora, save_lora
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2))
        >>> _ = register_lora(model, rank=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_lora(model, f"{folder}/adapter.safetensors")
        ...     convert_file(f"{folder}/adapter.safetensors", f"{folder}/for_peft", "peft")
        ['0.weight']
    """
    check_apart(Path(out), *(Path(each) for each in (path, base) if each))
    with ExitStack() as stack:
        file = stack.enter_context(open_adapter(Path(path)))
        weights = file.outline
        if base:
            weights = _outline(stack.enter_context(open_file(Path(base))), file)
        if weights.unknown:
            raise FileError(
                f"{path}: the format {file.format.name} doesn't say what its weights are; give the "
                "checkpoint that it was trained on with --base"
            )
        deltas = file.fit(weights, **options or {})
        write_adapter(format, Path(out), deltas, weights, file.about, **write_options or {})
    return list(deltas)


def _twins(tensors: Mapping[str, Tensor], adapted: Set[str], about: About) -> list[str]:
    """List the tensors that have the bits of an adapted one, and aren't known for others."""
    # A file that knows its base's class was saved beside the model, and has all its names.
    others = tensors.keys() - adapted - (about.shapes.keys() if about.cls else set())

    def is_same(a: Tensor, b: Tensor) -> bool:  # their beginnings tell nearly all apart
        begins = a.shape == b.shape and torch.equal(a.flatten()[:64], b.flatten()[:64])
        return begins and torch.equal(a, b)

    return [one for one in others if any(is_same(tensors[one], tensors[each]) for each in adapted)]


def merged_blocks(
    file: BinaryIO,
    name: str,
    entry: Entry,
    dtype: torch.dtype,
    deltas: list[Delta],
    base: Mapping[str, str],
) -> Iterator[Any]:
    """Yield a tensor's bytes in blocks of whole rows, with its updates added."""
    digested, size = digest(dtype, entry.shape), entry.end - entry.begin
    row = size // (*entry.shape, 1)[0] if deltas else 1
    rows = max(1, BLOCK // row)
    file.seek(entry.begin)
    for begin in range(0, size // row, rows):
        wanted = min(rows * row, size - begin * row)
        content: Any = bytearray(file.read(wanted))
        if len(content) < wanted:
            raise FileError(f"{file.name}: has become shorter while it was read")
        digested.update(content)
        if deltas:
            weight = torch.frombuffer(content, dtype=dtype).view(-1, *entry.shape[1:])
            value = _with_updates(weight, begin, deltas)
            if not value.isfinite().all() and weight.isfinite().all():
                raise FileError(f"{file.name}: {name} would not be finite in {dtype}")
            content = bytes_of(name, value)
        yield content
    if base.get(name, digested.hexdigest()) != digested.hexdigest():
        raise FileError(f"{file.name}: {name} has other bits; {OTHER_BASE}")


@torch.no_grad()
def _with_updates(weight: Tensor, begin: int, deltas: list[Delta]) -> Tensor:
    """Add to a tensor's rows from row `begin` on what each update has for them."""
    end = begin + len(weight)
    for delta in deltas:
        rows, first, last = delta.rows, begin, end
        if rows is not None and delta.dim == 0:
            numbers = [*rows]
            first, last = bisect_left(numbers, begin), bisect_left(numbers, end)
            inside = [number - begin for number in numbers[first:last]]
            if not inside:
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
