"""Progress on long work, where tqdm is installed and someone is looking."""

from collections.abc import Collection, Iterable
from typing import TypeVar

T = TypeVar("T")


def progress(items: Collection[T], label: str) -> Iterable[T]:
    """Show a bar while the items are gone through, on a terminal, once it takes longer than 1 s."""
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ImportError:
        return items
    bar: Iterable[T] = tqdm(items, label, len(items), leave=False, disable=None, delay=1)
    return bar
