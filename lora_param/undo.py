"""Steps that can be taken back: each pushes its undo before it acts.

An undo is a `contextlib.ExitStack`: what raises runs it backwards, what succeeds drops it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

GONE: Any = object()
"""The value of an entry that isn't there."""


@contextmanager
def all_or_nothing() -> Iterator[ExitStack]:
    """Give a block an undo, which runs if the block raises."""
    with ExitStack() as undo:
        yield undo
        undo.pop_all()


def change(undo: ExitStack, table: dict[str, Any], key: str, value: Any = GONE) -> None:
    """Set one entry of a table, or take it out; undone, it and the table's order are as before."""
    undo.callback(_put_back, table, key, table.get(key, GONE), tuple(table))
    if value is GONE:
        table.pop(key, None)
    else:
        table[key] = value


def _put_back(table: dict[str, Any], key: str, value: Any, order: Sequence[str]) -> None:
    if value is GONE:
        table.pop(key, None)
    else:
        table[key] = value
    _fill(table, in_order(table, order))


def reorder(undo: ExitStack, table: dict[str, Any], order: Sequence[str]) -> None:
    """Bring a table's entries into an order."""
    before = tuple(table)
    undo.callback(lambda: _fill(table, in_order(table, before)))
    _fill(table, in_order(table, order))


def in_order(table: Mapping[str, Any], order: Sequence[str]) -> dict[str, Any]:
    """Return a table's entries in an order, with those that it doesn't name behind the others."""
    names = [name for name in order if name in table]
    return {name: table[name] for name in [*names, *(each for each in table if each not in names)]}


def rewrite(undo: ExitStack, table: dict[str, Any], content: Mapping[str, Any]) -> None:
    """Give a table another content."""
    undo.callback(_fill, table, dict(table))
    _fill(table, dict(content))


def _fill(table: dict[str, Any], content: dict[str, Any]) -> None:
    table.clear()
    table.update(content)


def set_class(undo: ExitStack, module: nn.Module, cls: type[nn.Module]) -> None:
    """Give a module another class, past a `__setattr__` of its own."""
    undo.callback(object.__setattr__, module, "__class__", type(module))
    object.__setattr__(module, "__class__", cls)


def set_flag(undo: ExitStack, tensor: Tensor, requires_grad: bool) -> None:
    """Say whether a tensor requires a gradient; one that it has is kept for the undo alone."""
    undo.callback(_set_flag, tensor, tensor.requires_grad, tensor.grad)
    _set_flag(tensor, requires_grad, tensor.grad if requires_grad else None)


def _set_flag(tensor: Tensor, requires_grad: bool, grad: Tensor | None) -> None:
    if tensor.requires_grad != requires_grad:
        tensor.requires_grad_(requires_grad)
    tensor.grad = grad


def set_data(undo: ExitStack, tensor: Tensor, value: Tensor) -> None:
    """Put another value in the place of a tensor's, which stays the same object."""
    undo.callback(setattr, tensor, "data", tensor.data)
    tensor.data = value


def copy_into(undo: ExitStack, tensor: Tensor, value: Tensor) -> None:
    """Copy a value into a tensor."""
    undo.callback(_copy, tensor, tensor.detach().clone())
    _copy(tensor, value)


def _copy(tensor: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(value)
