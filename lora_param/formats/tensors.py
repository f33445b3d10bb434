"""Safetensors files: a header that is checked, tensors that are mapped, writes that are atomic."""

from __future__ import annotations

import ctypes
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import FileError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""The dtypes that a factor can have, by their names in a header."""

LONGEST_HEADER = 100_000_000  # what safetensors itself accepts


@dataclass(frozen=True)
class Header:
    """What a safetensors file says about itself.

    Attributes:
        metadata: Its strings.
        tensors: Per tensor `{"dtype": str, "shape": list, "data_offsets": [begin, end]}`.
        start: Where the tensors' bytes begin.
    """

    metadata: Mapping[str, str]
    tensors: Mapping[str, Mapping[str, Any]]
    start: int


def header(path: Path) -> Header:
    """Read a safetensors file's header; `load_tensors` checks it against the data.

    Args:
        path: The file.

    Returns:
        The header.

    Raises:
        FileError: It is no safetensors file, or its header is damaged.
    """
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(LONGEST_HEADER, path.stat().st_size - 8):
                raise FileError(f"{path}: no safetensors file, or a truncated one")
            content = strict_json(file.read(length).decode())
    except OSError as error:
        raise FileError(f"{path}: can't be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{path}: no safetensors file, or a damaged header: {error}") from None
    metadata = content.pop("__metadata__", {}) if isinstance(content, dict) else None
    if not _is_header(content, metadata):
        raise FileError(f"{path}: no safetensors file, or a damaged header")
    return Header(metadata, content, 8 + length)


def names_in(path: Path) -> frozenset[str]:
    """Return the tensors' names of a safetensors file; none if it isn't one."""
    with suppress(FileError):
        return frozenset(header(path).tensors) if path.is_file() else frozenset()
    return frozenset()


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Map a safetensors file's tensors into memory; they are read when they are used.

    Args:
        path: The file.

    Returns:
        Tensors by name, in the header's order.

    Raises:
        FileError: The file is damaged.
    """
    names = header(path).tensors
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, LookupError) as error:
        raise FileError(f"{path}: a damaged safetensors file: {error}") from None


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, whole or not at all, one tensor in memory at a time.

    Args:
        path: Where to; an older file there stays until the new one is complete.
        tensors: Tensors by name, of the dtypes in `DTYPES`.
        metadata: Strings for the header.
    """
    codes = {dtype: code for code, dtype in DTYPES.items()}
    entries = {name: (codes[each.dtype], tuple(each.shape)) for name, each in tensors.items()}
    sizes = {name: each.numel() * each.element_size() for name, each in tensors.items()}
    with replacing(path) as file:
        file.write(header_bytes(entries, sizes, metadata))
        for tensor in tensors.values():
            file.write(bytes_of(tensor))


def header_bytes(
    entries: Mapping[str, tuple[str, Iterable[int]]],
    sizes: Mapping[str, int],
    metadata: Mapping[str, str],
) -> bytes:
    """Return the header of a file whose tensors follow in the order of `entries`."""
    content: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for name, (dtype, shape) in entries.items():
        end = begin + sizes[name]
        content[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    encoded = json.dumps(content, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # safetensors aligns the data to 8 bytes
    return len(encoded).to_bytes(8, "little") + encoded


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file in the same folder that takes the path's place when it is complete."""
    path = path.resolve()  # a symlink stays one
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, path.stat().st_mode if path.exists() else 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def bytes_of(tensor: Tensor) -> Any:
    """Return a tensor's bytes as something to write, without a copy where it has them in order."""
    tensor = tensor.detach().cpu().contiguous()
    size = tensor.numel() * tensor.element_size()
    buffer = (ctypes.c_char * size).from_address(tensor.data_ptr()) if size else b""
    if size:
        buffer.tensor = tensor  # type: ignore[union-attr]  # keeps the memory
    return buffer


def strict_json(text: str) -> Any:
    """Parse JSON without duplicate keys, NaN or infinity."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key is there twice")
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)


def _is_header(content: Any, metadata: Any) -> bool:
    return (
        isinstance(content, dict)
        and isinstance(metadata, dict)
        and all(isinstance(value, str) for value in metadata.values())
        and all(
            isinstance(entry, dict)
            and isinstance(entry.get("dtype"), str)
            and all(_is_sizes(entry.get(key)) for key in ("shape", "data_offsets"))
            and len(entry["data_offsets"]) == 2
            for entry in content.values()
        )
    )


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is int and each >= 0 for each in value)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
