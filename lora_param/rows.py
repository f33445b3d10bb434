"""Blocks of rows: which output features of a weight a delta changes."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from .errors import TargetError

Numbers: TypeAlias = Iterable[int] | Tensor
Said: TypeAlias = str | slice | Numbers | Callable[[int], Numbers]
"""How rows can be given: as text, a slice, numbers or a function from how many there are."""

PART = re.compile(r"(-?\d+)?:(-?\d+)?(?::(\d+)(?:\+(\d+))?)?")
MOST = 2**22  # of rows: none of a model's are so many, and a file may say anything
RULE = "rows are start:stop, start:stop:step or start:stop:step+width, several with commas"


@dataclass(frozen=True)
class Rows:
    """Some output features of a weight, or tokens of an embedding, whichever dimension counts them.

    Each of its `parts` is `(start, stop, step, width)`: of `width` neighbours the first is at
    `start` or any number of steps behind that, in front of `stop`.
    """

    parts: tuple[tuple[int, int, int, int], ...]

    @classmethod
    def of(cls, said: Said, features: int) -> Rows:
        """Resolve rows against the number of features that there are, or raise a `TargetError`."""
        if isinstance(said, slice):
            ends = ("" if end is None else end for end in (said.start, said.stop, said.step or 1))
            said = ":".join(map(str, ends))
        if isinstance(said, str):
            return _written(said, features)
        shown = getattr(said, "__qualname__", repr(said))
        return _checked(shown, _called(said, features), features)

    def __str__(self) -> str:
        """Return the text that `of` takes."""
        texts = [f"{a}:{b}" + f":{n}" * (n > 1) + f"+{w}" * (w > 1) for a, b, n, w in self.parts]
        return ",".join(texts)

    def __iter__(self) -> Iterator[int]:
        """Yield the rows' numbers, rising."""
        for start, stop, step, width in self.parts:
            for first in range(start, stop, step):
                yield from range(first, first + width)

    def overlaps(self, other: Rows) -> bool:
        """Say whether both have a row in common."""
        return not set(self).isdisjoint(other)

    def take(self, tensor: Tensor, dim: int) -> Tensor:
        """Return these rows of a tensor that counts features in `dim`; a view if they adjoin."""
        if (block := self._block) is not None:
            return tensor.narrow(dim, *block)
        return tensor.index_select(dim, self._index(tensor.device))

    def put(self, tensor: Tensor, block: Tensor, dim: int) -> Tensor:
        """Return a tensor with a block in the place of these rows."""
        if (own := self._block) is None:
            return tensor.index_copy(dim, self._index(tensor.device), block)
        return tensor.slice_scatter(block, dim, own[0], sum(own))

    def spread(self, block: Tensor, dim: int, features: int) -> Tensor:
        """Return the block among zeros for all other rows."""
        shape = *block.shape[:dim], features, *block.shape[dim + 1 :]
        return self.put(block.new_zeros(shape), block, dim)

    @property
    def _block(self) -> tuple[int, int] | None:
        """Where they begin and how many there are; `None` unless they adjoin."""
        start, stop, step, _ = self.parts[0]
        return (start, stop - start) if len(self.parts) == step == 1 else None

    def _index(self, device: torch.device) -> Tensor:
        firsts = [torch.arange(*part[:3], device=device)[:, None] for part in self.parts]
        widths = [torch.arange(part[3], device=device) for part in self.parts]
        return torch.cat([(a + b).flatten() for a, b in zip(firsts, widths, strict=True)])


def split_rows(pattern: str) -> tuple[str, str | None]:
    """Split a pattern from the rows at its end: a bracket with a colon in it."""
    match = re.fullmatch(r"(.+)\[([^][]*:[^][]*)\]", pattern, re.DOTALL)
    return (match[1], match[2]) if match else (pattern, None)


@functools.lru_cache(maxsize=256)  # a model's layers are alike
def _written(text: str, features: int) -> Rows:
    parts = text.split(",")
    return _checked(f"[{text}]", [row for p in parts for row in _numbers(p, features)], features)


def _checked(shown: str, indices: Sequence[int], features: int) -> Rows:
    if not indices:
        raise TargetError(f"rows {shown} are none; give one at least")
    if not 0 <= min(indices) <= max(indices) < features:
        got = f"got {min(indices)} to {max(indices)}"
        raise TargetError(f"rows {shown} must lie within 0:{features}, {got}")
    if len(set(indices)) < len(indices):
        raise TargetError(f"rows {shown} name a row twice; name each once")
    return Rows(tuple(_parts(sorted(indices), features)))


def _numbers(part: str, features: int) -> Iterable[int]:
    """Yield the rows of one part of a text, as far as they are any."""
    match = PART.fullmatch(part.replace(" ", ""))
    if not match or match[3] == "0" or int(match[4] or 1) not in range(1, int(match[3] or 1) + 1):
        raise TargetError(f"{RULE}, got [{part}]")
    first, last, step, width = (None if each is None else int(each) for each in match.groups())
    start, stop = first or 0, features if last is None else last
    start, stop = (end + features if end < 0 else end for end in (start, stop))
    if stop > features or start < 0:
        raise TargetError(f"rows [{part}] must lie within 0:{features}; give others")
    firsts = range(start, stop, step or 1)
    if len(firsts) * (width or 1) > MOST:
        raise TargetError(f"rows [{part}] are more than {MOST:,}; adapt the whole tensor")
    rows = [first + k for first in firsts for k in range(width or 1)]
    if rows and rows[-1] >= stop:
        raise TargetError(f"rows [{part}] end within {width} that belong together; mend the stop")
    return rows


def _called(said: Numbers | Callable[[int], Numbers], features: int) -> list[int]:
    try:
        rows = said(features) if callable(said) else said
        indices = rows.tolist() if isinstance(rows, Tensor) else list(rows)
    except Exception as error:
        fix = "a function takes how many rows there are and returns the numbers of some"
        raise TargetError(f"rows: {said!r:.60} failed with {error!r}; {fix}") from error
    if wrong := [each for each in indices if type(each) is not int]:
        raise TargetError(f"rows: {said!r:.60} must be integers, got {wrong[0]!r:.60}")
    return indices


def _parts(indices: Sequence[int], features: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield the fewest parts that have these rows, in the one way in which they are written."""
    breaks = [i for i in range(1, len(indices)) if indices[i] != indices[i - 1] + 1]
    firsts = [indices[i] for i in (0, *breaks)]
    stops = [indices[i - 1] + 1 for i in (*breaks, len(indices))]
    widths = {stop - first for first, stop in zip(firsts, stops, strict=True)}
    steps = {b - a for a, b in itertools.pairwise(firsts)}
    if len(widths) == len(steps) == 1 and (len(firsts) > 2 or widths == {1}):
        [width], [step] = widths, steps
        yield firsts[0], min(firsts[0] + len(firsts) * step, features), step, width
    else:
        yield from ((first, stop, 1, 1) for first, stop in zip(firsts, stops, strict=True))
