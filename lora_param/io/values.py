"""A tensor's new values, as files hold them that don't say what is added, and what that is."""

from __future__ import annotations

import torch
from torch import Tensor

from ..deltas import Delta, DenseDelta, StatisticsDelta
from ..deltas.protocol import Shape
from ..rows import Rows


class NewValues(Delta):
    """What a tensor or a block of its rows becomes, `V`: a delta once the tensor is known."""

    kind = "values"
    options = ()
    V: Tensor

    def __init__(self, values: Tensor, rows: Rows | None = None) -> None:
        super().__init__("default", None)
        self.register_buffer("V", values.detach())
        self.__dict__.update(rows=rows, of_buffers=not values.is_floating_point())  # of any dtype

    def misfit(self, shape: Shape, view: Shape) -> str | None:
        """Say that they are of another shape, if they are."""
        got = tuple(self.V.shape)
        return None if got == shape else f"its new values are {got}, should be {shape}"

    def singular_values(self, shape: Shape) -> Tensor:
        """Return none: what is added isn't known."""
        return torch.zeros(0)

    def added_to(self, tensor: Tensor, is_buffer: bool) -> Delta:
        """Return what is added to the tensor, of a buffer what stands in its place."""
        if is_buffer:
            return StatisticsDelta.restore({"S": self.V.to(tensor.dtype)}, {})
        delta = DenseDelta.restore({"D": difference(self.V, tensor)}, {})
        delta.rows = self.rows
        return delta


def difference(new: Tensor, old: Tensor) -> Tensor:
    """Return `D` in the narrowest dtype in which `(old + D).to(old.dtype)` is `new`, to the bit.

    Where a float64 can't say it, because `new` is smaller than `old` by some 2**29, it is the
    nearest that there is.
    """
    old = old.detach().to(new.device)
    for dtype in (old.dtype, torch.float32, torch.float64):
        wide = torch.promote_types(torch.promote_types(old.dtype, new.dtype), dtype)
        added = new.to(wide) - old
        if torch.equal((old + added).to(old.dtype), new.to(old.dtype)):
            break
    return added
