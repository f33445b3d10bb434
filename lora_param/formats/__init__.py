"""The formats of adapter files: a row each in one table, tried in order."""

from __future__ import annotations

from .pair import Format, Pair

FORMATS: tuple[Format, ...] = ()
"""Each file is recognised by one row."""
# The helper on foreign formats adds its rows here:
# Format("peft", peft.recognises, peft.read, peft.write), ...

__all__ = ["FORMATS", "Format", "Pair"]
