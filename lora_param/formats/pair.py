"""What every file of adapters comes down to, and what a format has to be able to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn


@dataclass(frozen=True)
class Pair:
    """One weight's update, in the weight's matrix view: its first dimension by all the others.

    Attributes:
        weight: The parameter's full name in the plain model, `"encoder.0.linear1.weight"`.
        lora_A: `[*batch, rank, fan_in]`.
        lora_B: `[*batch, fan_out, rank]`.
        alpha: The scale is `alpha / rank`; an rsLoRA alpha comes multiplied by `sqrt(rank)`.
    """

    weight: str
    lora_A: Tensor
    lora_B: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Columns of `lora_B`."""
        return self.lora_B.shape[-1]


@dataclass(frozen=True)
class Format:
    """One row of the table.

    Attributes:
        name: What `save_lora(..., format=name)` takes.
        recognises: `(path) -> bool`, from names, suffixes and header keys; unpickles nothing.
        read: `(path, model, *, options) -> list[Pair]`. Names are resolved against the model's own
            modules; with `None` for a model, they are what the file has, module type unknown.
            Raises a `FileError` that lists all that is wrong. Shapes are checked by the caller.
        write: `(path, pairs, model, *, options) -> None`, or `None` where it isn't written.
    """

    name: str
    recognises: Callable[[Path], bool]
    read: Callable[..., list[Pair]]
    write: Callable[..., None] | None = None

    def __str__(self) -> str:
        """The name."""
        return self.name
