"""The formats of adapter files: a row each in one table, tried in order."""

from __future__ import annotations

from . import diffusers, kohya, loralib, native, peft
from .pair import About, Format, Pair

FORMATS: tuple[Format, ...] = (
    Format("native", native.recognises, native.read, native.write, native.about),
    Format("peft", peft.recognises, peft.read, peft.write, peft.about),
    Format("kohya", kohya.recognises, kohya.read, kohya.write),
    Format("diffusers", diffusers.recognises, diffusers.read),
    Format("loralib", loralib.recognises, loralib.read),
)
"""A file is recognised by one row."""

__all__ = ["FORMATS", "About", "Format", "Pair"]
