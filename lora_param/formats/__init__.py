"""The formats of adapter files: a row each in one table."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import FileError, LoRAError
from . import diffusers, kohya, layout, loralib, native, peft
from .pair import About, Format, Pair, faults, shortened
from .tensors import header

FORMATS: tuple[Format, ...] = (
    Format("native", native.recognises, native.read, native.write, native.about),
    Format("peft", peft.recognises, peft.read, peft.write, peft.about),
    Format("kohya", kohya.recognises, kohya.read, kohya.write, layout.about),
    Format("diffusers", diffusers.recognises, diffusers.read, None, layout.about),
    Format("loralib", loralib.recognises, loralib.read),
)
"""A file is recognised by one row."""

__all__ = ["FORMATS", "About", "Format", "Pair", "read", "recognised", "write"]


def recognised(path: Path) -> Format:
    """Return the row of a file's format, or raise a `FileError`."""
    try:
        rows = [each for each in FORMATS if each.recognises(path)]
    except (OSError, ValueError) as error:  # a name that no file can have
        raise FileError(f"{path}: can't be read: {error}") from None
    if len(rows) == 1:
        return rows[0]
    if path.suffix == ".safetensors" or not path.exists():
        header(path)  # says what is wrong with it
    known = ", ".join(each.name for each in rows or FORMATS)
    raise FileError(f"{path}: {'could be any of' if rows else 'is of no known format:'} {known}")


def read(row: Format, path: Path, model: nn.Module | None, /, **options: Any) -> list[Pair]:
    """Read a file's pairs; each is whole in itself, whether it fits the model isn't known."""
    _check_options(row, row.read, options)
    try:
        pairs = row.read(path, model, **options)
        complaints = list(faults(pairs))
    except LoRAError:
        raise
    except (ArithmeticError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise FileError(f"{path}: can't be read as {row.name}'s: {reason:.200}") from error
    if complaints:
        raise FileError(f"{path}: {shortened(complaints)}")
    return pairs


def write(
    format: str, path: Path, pairs: list[Pair], model: nn.Module, about: About, /, **options: Any
) -> None:
    """Write pairs in the format of that name, and what else it has a place for."""
    row = next((each for each in FORMATS if each.write and each.name == format), None)
    if row is None or row.write is None:
        known = sorted(each.name for each in FORMATS if each.write)
        raise LoRAError(f"format must be one of {known}, got {format!r}")
    _check_options(row, row.write, options)
    taken = {native.KEY, "format", layout.CONFIG} & about.metadata.keys()
    if taken and (taken != {"format"} or about.metadata["format"] != "pt"):
        raise LoRAError(f"metadata can't have the key {min(taken)!r}, which files have themselves")
    row.write(path, pairs, model, about, **options)


def _check_options(row: Format, call: Callable[..., Any], options: Mapping[str, Any]) -> None:
    parameters = inspect.signature(call).parameters.values()
    known = {each.name for each in parameters if each.kind is each.KEYWORD_ONLY}
    if unknown := sorted(options.keys() - known):
        raise LoRAError(f"the format {row.name} takes {sorted(known)}, got {', '.join(unknown)}")
    if not isinstance(options.get("prefix", ""), str):
        raise LoRAError(f"prefix must be a string, got {options['prefix']!r}")
