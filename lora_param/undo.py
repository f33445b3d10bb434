"""Steps that can be taken back: each pushes its undo before it acts.

An undo is a `contextlib.ExitStack`: what raises runs it backwards, what succeeds drops it.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor


@contextmanager
def all_or_nothing() -> Iterator[ExitStack]:
    """Give a block an undo, which runs if the block raises."""
    with ExitStack() as undo:
        yield undo
        undo.pop_all()


def keep_entries(undo: ExitStack, *places: tuple[dict[str, Any], Collection[str]]) -> None:
    """Note tables' entries of some names, there or not, and the tables' order: they may change."""
    kept = [(table, dict(table), names) for table, names in places]

    def put_back() -> None:
        for table, before, names in kept:
            for name in names:
                table.pop(name, None)
                if name in before:
                    table[name] = before[name]
            if "_parameters" not in table:  # a module's own attributes have no order
                for name in in_order(table, before):
                    table[name] = table.pop(name)

    undo.callback(put_back)


def in_order(table: Mapping[str, Any], order: Iterable[str]) -> dict[str, Any]:
    """Return a table's entries in an order, with those that it doesn't name behind the others."""
    first = {name: table[name] for name in order if name in table}
    return first | {name: table[name] for name in table if name not in first}


def set_flags(undo: ExitStack, tensors: Sequence[Tensor], requires_grad: bool) -> None:
    """Say whether tensors require gradients; those that they have are kept for the undo alone."""
    undo.callback(_set_flags, [(each, each.requires_grad, each.grad) for each in tensors])
    _set_flags([(each, requires_grad, each.grad if requires_grad else None) for each in tensors])


def _set_flags(states: Iterable[tuple[Tensor, bool, Tensor | None]]) -> None:
    for tensor, requires_grad, grad in states:
        if tensor.requires_grad != requires_grad:
            tensor.requires_grad_(requires_grad)
        tensor.grad = grad
