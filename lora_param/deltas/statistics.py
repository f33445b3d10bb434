"""The statistics kind: a copy of a buffer, which training moves in the original's place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .protocol import Delta, Shape


class StatisticsDelta(Delta):
    """Read and move a copy in a buffer's place: a batch norm's running mean, its counts.

    `S`, a buffer, begins as what was read before. It is nobody's sum: of several on one buffer the
    last one that is on is read and moved. With none on, training reads a copy of the base's own,
    which stays as it is. A base that is loaded before `S` has moved is copied anew.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
        >>> register_lora(model, rank=1)
        ['0.weight']
        >>> _ = model(torch.randn(8, 3))
        >>> model[1].num_batches_tracked, model[1].parametrizations.num_batches_tracked.original
        (tensor(1), tensor(0))
    """

    kind = "statistics"
    of_buffers = True
    parts = (), ("S",)

    def __init__(self, value: Tensor, *, adapter: str = "default") -> None:
        super().__init__(adapter, None)
        self.register_buffer("S", value.detach().clone())

    @classmethod
    def make(cls, weight: Tensor, view: Shape, **options: Any) -> StatisticsDelta:
        """Build a copy of a buffer."""
        return cls(weight, **options)

    def value(self, weight: Tensor) -> Tensor:
        """Return the copy itself, for a layer to move."""
        return self._buffers["S"]  # type: ignore[return-value]

    def reset_parameters(self) -> None:
        """Wait for the base that is to be copied."""
        self.__dict__["_waits"] = True

    def rebased(self, old: Tensor, new: Tensor) -> dict[str, Tensor]:
        """Return a copy of the new buffer, if training has not moved that of the old one."""
        S = self.value(old)
        fresh = self.__dict__.pop("_waits", False) or S.is_meta or torch.equal(S, old)
        return {"S": new.clone()} if fresh else {}

    def block(self, start: int, stop: int) -> Delta:
        """Return the copy of some of the entries."""
        S = self.value(torch.empty(0))
        return self.made_of({"S": (S if S.ndim else S.view(1))[start:stop]}, {})
