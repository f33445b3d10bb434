"""Adapters and checkpoints, both as files: whether they belong together, and their sum."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..deltas import Delta
from ..errors import FileError
from ..frozen import bytes_of, digest, digest_of
from ..weight import WRAPPERS, join
from .content import OpenFile, check_apart, open_file, shortened
from .formats import Deltas, open_adapter
from .outline import outline_of_tensors
from .progress import progress
from .tensors import Entry, write_blobs

BLOCK = 2**22
"""Bytes of a tensor that are merged at a time."""

OTHER_BASE = "give the base that the adapter was trained on, or --any-base"


def plain_name(key: str) -> str:
    """Return the plain model's name of a key of a state dict."""
    plain = join(*(part for part in key.split(".") if part not in WRAPPERS))
    return re.sub(r"parametrizations\.([^.]+)\.original$", r"\1", plain)


def plain_tensors(file: OpenFile) -> dict[str, Tensor]:
    """Return a checkpoint's tensors by their names in the plain model, or raise a `FileError`."""
    times = Counter(map(plain_name, file.tensors))
    if twice := [name for name in times if times[name] > 1]:
        raise FileError(
            f"{file.path}: more than one tensor is {shortened(twice)}; keep one of them"
        )
    return {plain_name(name): tensor for name, tensor in file.tensors.items()}


def check_checkpoint(
    path: str | os.PathLike[str], base: str | os.PathLike[str], /, **options: Any
) -> int:
    """Compare a checkpoint with the base that an adapter's file was trained on, bit for bit.

    Args:
        path: The adapter's file, in any format.
        base: The checkpoint, safetensors or a pickled state dict.
        **options: What the adapter's format takes.

    Returns:
        The number of parameters, all of which are equal.

    Raises:
        FileError: Another base, which is named, or a file that doesn't say its base's bits.

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
        tensors = plain_tensors(checkpoint)
        file.fit(outline_of_tensors(tensors, file.about.layers), **options)
        digests = file.about.base
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
    path: str | os.PathLike[str],
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    /,
    *,
    any_base: bool = False,
    **options: Any,
) -> tuple[int, int]:
    """Fold a file's adapter into a checkpoint, some rows of one tensor in memory at a time.

    The bits are those that `merge_lora` gives, and `out` takes its place when it is complete.

    Args:
        path: The adapter's file, in any format.
        base: The checkpoint, a safetensors file.
        out: The safetensors file to write.
        any_base: Merge even if the adapter was trained on another base.
        **options: What the adapter's format takes.

    Returns:
        How many tensors have changed, and how many there are.

    Raises:
        FileError: The files don't belong together, a merged weight would not be finite, or `out`
            would be read and written.

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
        tensors = plain_tensors(checkpoint)
        header = checkpoint.header
        deltas = _by_tensor(file.fit(outline_of_tensors(tensors, file.about.layers), **options))
        digests = {} if any_base else file.about.base
        _check_mergeable(checkpoint, tensors, deltas, digests)
        # A file that knows its base's class was saved beside the model, and has all its names.
        known = file.about.shapes if file.about.cls else {}
        if not any_base and (twins := _twins(tensors, deltas, known)):
            raise FileError(
                f"{base}: {shortened(twins)} may be adapted weights by other names, having their "
                "bits, and would not change; take them out, or give --any-base if they aren't"
            )
        blocks = (
            block
            for place, entry in progress(list(header.tensors.items()), "merging")
            for name in [plain_name(place)]
            for block in merged_blocks(
                checkpoint.file, name, entry, tensors[name].dtype, deltas.get(name, []), digests
            )
        )
        write_blobs(Path(out), header.tensors, header.metadata, blocks)
    return len(deltas), len(header.tensors)


def _check_mergeable(
    checkpoint: OpenFile,
    tensors: Mapping[str, Tensor],
    deltas: Mapping[str, list[Delta]],
    digests: Mapping[str, str],
) -> None:
    """Raise for weights beneath parametrizations, and for a base that lacks some of its tensors."""
    keys = {plain_name(key): key for key in checkpoint.header.tensors}
    if hidden := [name for name in deltas if "parametrizations." in keys[name]]:
        names = shortened(hidden)
        raise FileError(f"{checkpoint.path}: parametrized: {names}; load both, and call merge_lora")
    if missing := _missing(digests, tensors):
        raise FileError(f"{checkpoint.path}: lacks {shortened(missing)}; {OTHER_BASE}")


def _by_tensor(deltas: Deltas) -> dict[str, list[Delta]]:
    """Sort deltas by the names of whole tensors."""
    tensors: dict[str, list[Delta]] = {}
    for name, delta in deltas.items():
        block = f"[{delta.rows.start}:{delta.rows.stop}]" if delta.rows else ""
        tensors.setdefault(name.removesuffix(block), []).append(delta)
    return tensors


def _twins(
    tensors: Mapping[str, Tensor], adapted: Mapping[str, Any], known: Mapping[str, Any]
) -> list[str]:
    """List the tensors that have the bits of an adapted one, and aren't known for others."""
    changing = [tensors[name] for name in adapted]
    others = tensors.keys() - known.keys() - adapted.keys()
    return [name for name in others if any(_is_same(tensors[name], each) for each in changing)]


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Compare two tensors, their beginnings first, because these tell nearly all apart."""
    begins = a.shape == b.shape and torch.equal(a.flatten()[:64], b.flatten()[:64])
    return begins and torch.equal(a, b)


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
    row = size // entry.shape[0] if deltas else 1
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
        first, last = (delta.rows.start, delta.rows.stop) if delta.rows else (0, end)
        low, high = max(begin, first), min(end, last)
        if low < high:
            inside = slice(low - begin, high - begin)
            value = delta.block(low - first, high - first).value(weight[inside])
            weight = torch.cat([weight[: inside.start], value, weight[inside.stop :]])
    return weight


def _missing(base: Mapping[str, str], tensors: Mapping[str, Tensor]) -> list[str]:
    """List the parameters of a base that a checkpoint lacks, and doesn't hold by another name."""
    # A checkpoint may hold tied weights once; equal biases are no sign of that.
    held = {name: digest for name, digest in base.items() if name in tensors}
    tied = {digest for name, digest in held.items() if tensors[name].dim() > 1}
    return [name for name, digest in base.items() if name not in held and digest not in tied]
