"""The dense kind: `W + D`, an update without a structure, for a tensor of any dimensions."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from .protocol import Delta, Shape


class DenseDelta(Delta):
    """Add a tensor to a weight, `W + D`: training it whole, with the original left alone.

    `D`, a Parameter of the weight's shape, is zero at first. Weight decay on `D` pulls the weight
    towards the original.

    Example:
        >>> layer = torch.nn.Linear(3, 2)
        >>> register_lora(layer, kind="dense", target="bias")
        ['bias']
        >>> layer.parametrizations.bias[0].D
        Parameter containing:
        tensor([0., 0.], requires_grad=True)
    """

    kind = "dense"
    D: nn.Parameter
    options = ("dtype",)
    parts = ("D",), ()
    adds = True

    def __init__(
        self,
        shape: Shape,
        *,
        adapter: str = "default",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(adapter, dtype)
        # Past torch's setter, which accelerate's init_empty_weights replaces.
        self._parameters["D"] = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Make `D` zero."""
        nn.init.zeros_(self.D)

    @classmethod
    def make(cls, weight: Tensor, view: Shape, **options: Any) -> DenseDelta:
        """Build a `D` of zeros on the weight's device and, unless told otherwise, of its dtype."""
        options["dtype"] = options.get("dtype") or weight.dtype
        return cls(tuple(weight.shape), device=weight.device, **options)

    def value(self, weight: Tensor) -> Tensor:
        """Return `W + D`, computed in the wider dtype and rounded once to `W`'s."""
        strength = self.now().strength
        D = self.D if type(strength) is float and strength == 1 else self.D * strength
        return (weight + D).to(weight.dtype)

    def block(self, start: int, stop: int) -> Delta:
        """Return the delta of some of the weight's rows."""
        return self.made_of({"D": self.D[start:stop]}, {})

    def singular_values(self, shape: Shape) -> Tensor:
        """Return those of `D` as a matrix of its first dimension by all the others."""
        matrix = self.D.detach().double() * self.strength
        matrix = matrix.flatten(1) if matrix.ndim > 1 else matrix.reshape(1, -1)
        return cast("Tensor", torch.linalg.svdvals(matrix))
