"""Safetensors files: a header that is checked, tensors that are mapped, writes that are atomic."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import FileError
from ..frozen import bytes_of

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Dtypes by their names in a header."""

LONGEST_HEADER = 100_000_000  # what safetensors itself accepts
LONGEST_NAME = 1000  # longer ones no module has, and they take long to look up


@dataclass(frozen=True)
class Entry:
    """What a header says about one tensor: its dtype's name, its shape, where its bytes are."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file says about itself.

    Attributes:
        metadata: Its strings.
        tensors: What it says about each tensor, in the order of their bytes.
        fault: Why the file is no safetensors file, or a damaged one; empty where it is whole.
    """

    metadata: Mapping[str, str] = field(default_factory=dict)
    tensors: Mapping[str, Entry] = field(default_factory=dict)
    fault: str = ""


def read_header(file: BinaryIO) -> Header:
    """Read an open file's header, and check it against the file's size."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(LONGEST_HEADER, size - 8):
        return Header(fault="its header would be longer than the file")
    try:
        return _checked(strict_json(file.read(length).decode()), 8 + length, size)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        return Header(fault=f"{error!s:.200}")


def _checked(content: Any, start: int, size: int) -> Header:
    metadata = content.pop("__metadata__", None) or {}
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are no strings")
    entries = {}
    for name, said in content.items():
        if len(name) > LONGEST_NAME:
            raise ValueError(f"a name has more than {LONGEST_NAME} characters")
        begin, end = said["data_offsets"]
        numbers = [*said["shape"], begin, end - begin, size - start - end]
        integers = all(type(n) is int and n >= 0 for n in numbers) and len(numbers) < 64
        if not isinstance(said["dtype"], str) or not integers:
            raise ValueError(f"{name:.80} has no place in it")
        dtype = DTYPES.get(said["dtype"])
        if dtype and math.prod(said["shape"]) * dtype.itemsize != end - begin:
            raise ValueError(f"{name:.80} has bytes of another shape")
        entries[name] = Entry(said["dtype"], tuple(said["shape"]), start + begin, start + end)
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    ends = [start, *(entry.end for entry in entries.values())]
    if ends != [*(entry.begin for entry in entries.values()), size]:
        raise ValueError("its tensors overlap, or leave bytes to nobody")
    return Header(metadata, entries)


def map_tensors(path: Path, header: Header) -> dict[str, Tensor]:
    """Map a safetensors file's tensors into memory: they are read when they are used."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in header.tensors}
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, LookupError) as error:
        raise FileError(f"{path}: a damaged safetensors file: {error!s:.200}") from None


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors of the dtypes in `DTYPES` to a safetensors file, whole or not at all."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    # Readers view the bytes in place, so every tensor has to begin at a multiple of its item size.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    entries = {
        name: Entry(codes[tensor.dtype], tuple(tensor.shape), 0, tensor.nbytes)
        for name, tensor in ordered
    }
    write_blobs(path, entries, metadata, (bytes_of(name, tensor) for name, tensor in ordered))


def write_blobs(
    path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str], blobs: Iterable[Any]
) -> None:
    """Write a safetensors file from its tensors' bytes as they come, whole or not at all."""
    content: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for name, entry in entries.items():
        end = begin + entry.end - entry.begin
        content[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [begin, end]}
        begin = end
    try:
        encoded = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise FileError(f"{path}: can't be written: a name or metadata: {error}") from None
    encoded += b" " * (-len(encoded) % 8)
    if len(encoded) > LONGEST_HEADER:
        raise FileError(
            f"{path}: can't be written: names and metadata take {len(encoded):,} bytes, and "
            f"{LONGEST_HEADER:,} can be read"
        )
    with replace_file(path) as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for blob in blobs:
            file.write(blob)


@contextmanager
def replace_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file in the same folder that takes the path's place when it is complete."""
    try:
        target = path.resolve()  # a link stays one
        if target.exists() and not target.is_file():
            raise OSError(f"{'a folder' if target.is_dir() else 'no regular file'} is there")
        temporary = target.with_name(f".{target.name[:50]}.{secrets.token_hex(4)}")
    except (OSError, RuntimeError, ValueError) as error:
        raise FileError(f"{path}: can't be written: {error}") from error
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    except OSError as error:
        raise FileError(f"{path}: can't be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def strict_json(text: str) -> Any:
    """Parse JSON without duplicate keys, NaN or infinity."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            raise ValueError("a key is there twice")
        return content

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
