"""Checkpoints as they lie on a disk: one file or many, by the names that the model has."""

import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import FileError, LoRAError
from ..walk import WRAPPERS
from ..weight import join
from .formats import AdapterFile, Deltas, open_adapter
from .outline import UNKNOWN, Outline, outline_of_tensors
from .tensors import AnyPath, OpenFile, open_file, read_json, shortened

INDEX = ".index.json"
FILES = (f"*{INDEX}", "*.safetensors", "*.bin", "*.pt")
"""What a folder's checkpoint can be called, the first kind of which there is one."""


@dataclass(frozen=True)
class Base:
    """An open checkpoint: in which file each tensor is, and the model's name for it, by its key."""

    files: Mapping[str, OpenFile]
    names: Mapping[str, str]

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by the model's names, read when they are used."""
        return {name: self.files[key].tensors[key] for key, name in self.names.items()}

    @property
    def metadata(self) -> Mapping[str, str]:
        """The strings of its first file, of a pickle those that transformers asks for."""
        first = next(iter(self.files.values()), None)
        return first.metadata if first and not first.fault else {"format": "pt"}


@contextmanager
def open_checkpoint(path: Path) -> Iterator[Base]:
    """Open a checkpoint for a block: a file, an index of shards, or a folder with one of these."""
    with ExitStack() as stack:
        files: dict[str, OpenFile] = {}
        for shard in _shards(path):
            opened = stack.enter_context(open_file(shard))
            names = opened.tensors if opened.fault else opened.entries
            files |= dict.fromkeys(names, opened)
        yield Base(files, _each_once(path, {key: plain_name(key) for key in files}))


@contextmanager
def open_both(
    path: AnyPath, base: AnyPath | None, prefix: str | None, options: Mapping[str, Any]
) -> Iterator[tuple[AdapterFile, Base, Outline, Deltas]]:
    """Open an adapter's file and the base that it was trained on; yield the deltas as they fit it.

    Where the model's names begin with a `prefix` that the checkpoint's lack, or the other way
    round, it is found or given. Without a base an outline is what the file itself says.
    """
    with ExitStack() as stack:
        file, found = stack.enter_context(open_adapter(Path(path))), Base({}, {})
        weights = file.outline
        if base is not None:
            plain = stack.enter_context(open_checkpoint(Path(base)))
            if prefix is None:
                prefix = _prefix(plain.names, _adapted(file, options))
            names = _with_prefix(plain.names, prefix)
            found = Base(plain.files, _each_once(Path(base), names))
            weights = outline_of_tensors(found.tensors, file.about.layers)
        yield file, found, weights, file.fit(weights, **options)


def _each_once(path: Path, names: dict[str, str]) -> dict[str, str]:
    """Return names by keys, or raise where two keys have the same."""
    if twice := [name for name, count in Counter(names.values()).items() if count > 1]:
        raise FileError(f"{path}: more than one tensor is {shortened(twice)}; keep one of them")
    return names


def plain_name(key: str) -> str:
    """Return the plain model's name of a key of a state dict."""
    plain = join(*(part for part in key.split(".") if part not in WRAPPERS))
    return re.sub(r"parametrizations\.([^.]+)\.original$", r"\1", plain)


def _shards(path: Path) -> list[Path]:
    """List the files of a checkpoint."""
    if path.is_dir():
        found = next(filter(None, (sorted(path.glob(pattern)) for pattern in FILES)), [])
        if len(found) != 1:
            listed = ", ".join(each.name for each in found) or ", ".join(FILES)
            count = "several" if found else "none"
            raise FileError(f"{path}: has {count} of {listed}; name a file")
        path = found[0]
    if not path.name.endswith(INDEX):
        return [path]
    names = read_json(path).get("weight_map")
    if not isinstance(names, dict) or {*map(type, names.values())} != {str}:
        raise FileError(f"{path}: no index of shards")
    if strange := [name for name in names.values() if Path(name).name != name]:
        raise FileError(f"{path}: {strange[0]!r:.80} is no file beside it")
    return [path.with_name(name) for name in dict.fromkeys(names.values())]


def _prefix(plain: Mapping[str, str], adapted: Set[str]) -> str:
    """Return the prefix with which, or without, most adapted weights are a checkpoint's."""
    names, first = plain.values(), next(iter(adapted), "")
    prefixes = {first.removesuffix(name) for name in names if first.endswith(f".{name}")}
    prefixes |= {name.removesuffix(first) for name in names if first and name.endswith(f".{first}")}
    choices = ["", *sorted(prefixes)]
    return max(choices, key=lambda each: len(adapted & {*_with_prefix(plain, each).values()}))


def _with_prefix(plain: Mapping[str, str], prefix: str) -> dict[str, str]:
    """Take a prefix from the names that have it, or where none has it give it to all."""
    if any(name.startswith(prefix) for name in plain.values()):
        return {key: name.removeprefix(prefix) for key, name in plain.items()}
    return {key: prefix + name for key, name in plain.items()}


def _adapted(file: AdapterFile, options: Mapping[str, Any]) -> Set[str]:
    """Return the adapted weights' names, as far as a file says them without a model."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the same are given when it is read for good
            names = file.parse(UNKNOWN, **options)
    except LoRAError:
        return set()
    return {re.sub(r"\[\d+:\d+\]$", "", name) for name in names}
