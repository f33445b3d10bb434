"""Safetensors files: a header that is checked, tensors that are mapped, writes that are atomic."""

from __future__ import annotations

import json
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

AnyPath = str | os.PathLike[str]

CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
"""What a header calls the dtypes that are written."""

DAMAGE = (SafetensorError, OSError, ValueError, RuntimeError, TypeError, LookupError)
"""What opening a damaged file can raise, by release and platform."""

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
    """What a safetensors file says about itself, or the fault for which it is none."""

    metadata: Mapping[str, str] = field(default_factory=dict)
    tensors: Mapping[str, Entry] = field(default_factory=dict)
    fault: str = ""


def read_header(path: Path, file: BinaryIO) -> Header:
    """Read an open file's header, its tensors in the order of their bytes."""
    try:
        with safe_open(path, "pt"):  # holds sizes, shapes and places against the file
            start = 8 + int.from_bytes(file.read(8), "little")
            content = strict_json(file.read(start - 8).decode())
    except DAMAGE as error:
        return Header(fault=f"{error!s:.200}")
    metadata = content.pop("__metadata__", None) or {}
    if any(len(name) > LONGEST_NAME for name in content):
        return Header(fault=f"a name has more than {LONGEST_NAME} characters")
    entries = {}
    for name, said in sorted(content.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = said["data_offsets"]
        entries[name] = Entry(said["dtype"], tuple(said["shape"]), start + begin, start + end)
    return Header(metadata, entries)


def map_tensors(path: Path, header: Header) -> dict[str, Tensor]:
    """Map a safetensors file's tensors into memory: they are read when they are used."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in header.tensors}
    except DAMAGE as error:
        raise FileError(f"{path}: a damaged safetensors file: {error!s:.200}") from None


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors of the dtypes in `CODES` to a safetensors file, whole or not at all."""
    # Readers view the bytes in place, so every tensor has to begin at a multiple of its item size.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    entries = {
        name: Entry(CODES[tensor.dtype], tuple(tensor.shape), 0, tensor.nbytes)
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
