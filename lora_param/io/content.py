"""Files as they lie on a disk: opened and read once, and written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import FileError, LoRAError
from .tensors import LONGEST_NAME, Header, map_tensors, read_header, replace_file, save_tensors

Config = Mapping[str, Any]
Content = tuple[Mapping[str, Tensor], Mapping[str, str], Config | None]
"""What a file is going to hold: tensors, strings, and for a folder of PEFT's a config."""

CONFIG, SAFE, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
"""What the files in a folder of PEFT's are called."""


@dataclass(frozen=True)
class About:
    """What a file says besides its deltas, as far as its format has a place for it."""

    adapter: str = "default"
    model: str = ""  # what the base is called on a hub
    cls: str = ""  # the base's class
    base: Mapping[str, str] = field(default_factory=dict)  # its fingerprint
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # its parameters'
    layers: Mapping[str, Config] = field(default_factory=dict)  # facts of the adapted modules
    metadata: Mapping[str, str] = field(default_factory=dict)  # strings of whoever saved it

    @property
    def base_name(self) -> str:
        """What to call the base; empty if that isn't known."""
        return self.model or self.cls


@dataclass
class OpenFile:
    """An open file, whose header has been read; `folder` is PEFT's, where that was named."""

    path: Path
    folder: Path | None
    file: BinaryIO
    header: Header

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """Its tensors: a safetensors file's, mapped, or those in a pickled state dict."""
        if self.path.suffix == ".safetensors":
            self.check_whole()
        if self.header.fault:
            return _unpickled(self.path, self.file)
        return map_tensors(self.path, self.header)

    def check_whole(self) -> None:
        """Raise a `FileError` unless it is a whole safetensors file."""
        if fault := self.header.fault:
            raise FileError(f"{self.path}: no safetensors file, or a damaged one: {fault}")


@contextmanager
def open_file(path: Path) -> Iterator[OpenFile]:
    """Open a file, or the file of tensors in a folder of PEFT's, for a block."""
    try:
        if folder := path if path.is_dir() else None:
            path = next((p for n in (SAFE, PICKLED) if (p := folder / n).exists()), folder)
        if path == folder:
            raise FileError(f"{path}: is of no known format: it has no {SAFE}")
        check_regular(path)
        file = open(path, "rb")  # noqa: SIM115, because the block's errors aren't the file's
    except FileError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise FileError(f"{path}: can't be read: {reason}") from None
    with file:
        yield OpenFile(path, folder, file, read_header(path, file))


def check_regular(path: Path) -> None:
    """Raise for what can't be read, or could be waited for without end, such as a pipe."""
    if path.exists() and not path.is_file():
        raise FileError(f"{path}: can't be read: no regular file")


def _unpickled(path: Path, file: BinaryIO) -> dict[str, Tensor]:
    """Load a state dict with `weights_only=True`: tensors and plain containers, no code."""
    file.seek(0)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # damage can make anything of a pickle
        raise FileError(
            f"{path}: no state dict that can be read safely: damaged, or more than tensors"
        ) from None
    if isinstance(content, dict) and set(content) == {"model_state_dict"}:
        content = content["model_state_dict"]  # as microsoft/LoRA's own example saves it
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and len(key) <= LONGEST_NAME and isinstance(value, Tensor)
        for key, value in content.items()
    ):
        raise FileError(
            f"{path}: a state dict must hold tensors by names of up to {LONGEST_NAME} characters"
        )
    return content


def write_content(path: Path, content: Content) -> None:
    """Write a file, or with a config a folder, which is made if it isn't there."""
    tensors, metadata, config = content
    if config is None:
        save_tensors(path, tensors, metadata)
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FileError(f"{path}: no folder can be made: {reason}") from None
    with replace_file(path / CONFIG) as file:  # takes its place after the tensors have taken theirs
        file.write(json.dumps(config, indent=2).encode())
        file.flush()
        save_tensors(path / SAFE, tensors, metadata)


def check_apart(out: Path, *inputs: Path) -> None:
    """Raise if what is going to be written is also read, itself or beside it."""
    written = [out, *out.iterdir()] if out.is_dir() else [out] * out.exists()
    for path in inputs:
        inside = [*path.iterdir()] if path.is_dir() else []
        for read in [path, path.parent / CONFIG, *inside]:
            if read.exists() and any(map(read.samefile, written)):
                raise FileError(f"{out}: would be read and written; name another")


def check_strings(name: str, given: Any) -> Mapping[str, str]:
    """Return what maps strings to strings, all of them fit for a file, or raise."""
    texts = [t for item in given.items() for t in item] if isinstance(given, Mapping) else [None]
    # A lone half of a surrogate pair has no bytes.
    if any(type(t) is not str or t.encode("utf-8", "ignore").decode() != t for t in texts):
        raise LoRAError(f"{name} must map strings to strings, got {given!r:.80}")
    return dict(given)


def shortened(items: Sequence[str]) -> str:
    """Join the first few of many."""
    more = f"; and {len(items) - 8:,} more" if len(items) > 8 else ""
    return "; ".join(items[:8]) + more
