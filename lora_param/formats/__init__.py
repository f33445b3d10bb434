"""The formats of adapter files: a row each in one table, tried in order."""

from __future__ import annotations

from . import native, peft
from .pair import About, Format, Pair

FORMATS: tuple[Format, ...] = (
    Format("native", native.recognises, native.read, native.write, native.about),
    Format("peft", peft.recognises, peft.read, peft.write, peft.about),
)
"""A file is recognised by one row."""

__all__ = ["FORMATS", "About", "Format", "Pair"]
