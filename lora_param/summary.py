"""A table of what is adapted, for a terminal and for numbers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .activation import acts
from .checks import deltas_called
from .weight import walk

NUMERIC = ("rank", "alpha", "parameters")
"""Columns that are aligned to the right."""


@dataclass(frozen=True)
class AdapterSummary:
    """One adapter on one weight; rank and alpha are `None` for a kind that has none."""

    name: str
    rank: int | None
    alpha: float | None
    parameters: int
    enabled: bool
    kind: str


@dataclass(frozen=True)
class WeightSummary:
    """One adapted weight.

    Attributes:
        name: The weight's name in the plain model.
        shape: Its shape.
        space: `"activation"` where its layer never forms the adapted weight, or `"weight"`.
        adapters: Its adapters, in the order in which they were registered.
    """

    name: str
    shape: tuple[int, ...]
    space: str
    adapters: tuple[AdapterSummary, ...]

    def _row(self) -> tuple[str, ...]:
        cells = [
            (
                each.name,
                each.kind,
                "-" if each.rank is None else str(each.rank),
                "-" if each.alpha is None else f"{each.alpha:g}",
                "on" if each.enabled else "off",
            )
            for each in self.adapters
        ]
        columns = map(", ".join, zip(*cells, strict=True))
        size = sum(each.parameters for each in self.adapters)
        return self.name, "x".join(map(str, self.shape)), self.space, *columns, f"{size:,}"


@dataclass(frozen=True)
class LoRASummary:
    """What `lora_summary` returns; `print` it for the table.

    Attributes:
        weights: One entry per adapted weight, in model order.
        base_parameters: Number of elements of the model without adapters, shared ones once.
        lora_parameters: Number of elements of all adapters.
        trainable_parameters: Number of elements that require a gradient, of both.
    """

    weights: tuple[WeightSummary, ...]
    base_parameters: int
    lora_parameters: int
    trainable_parameters: int

    @property
    def total_parameters(self) -> int:
        """Elements of the base and of the adapters together."""
        return self.base_parameters + self.lora_parameters

    @property
    def percentage(self) -> float:
        """Elements of the adapters in percent of the base's."""
        return 100 * self.lora_parameters / self.base_parameters

    def __str__(self) -> str:
        """Return the table: a header, a line per weight, the totals."""
        header = ("weight", "shape", "space", "adapter", "kind", *NUMERIC[:2], "state", NUMERIC[2])
        rows = [header, *(weight._row() for weight in self.weights)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for row in rows:
            cells = zip(header, row, widths, strict=True)
            padded = [
                text.rjust(w) if title in NUMERIC else text.ljust(w) for title, text, w in cells
            ]
            lines.append("  ".join(padded).rstrip())
        rule = "-" * max(map(len, lines))
        totals = (
            f"base {self.base_parameters:,} + LoRA {self.lora_parameters:,} = "
            f"{self.total_parameters:,} parameters; LoRA is {self.percentage:.3f} % of the base; "
            f"{self.trainable_parameters:,} trainable"
        )
        return "\n".join([lines[0], rule, *lines[1:], rule, totals])


def lora_summary(model: nn.Module) -> LoRASummary:
    """List the adapted weights of a model, and count its parameters.

    Raises:
        AdapterError: The model has no adapters.

    Example:
        >>> import torch
        >>> from lora_param import register_lora
        >>> model = torch.nn.Sequential(torch.nn.Linear(20, 10), torch.nn.Linear(10, 4))
        >>> _ = register_lora(model, rank=2)
        >>> print(lora_summary(model))
        weight    shape  space       adapter  kind  rank  alpha  state  parameters
        --------------------------------------------------------------------------
        0.weight  10x20  activation  default  lora     2      2  on             60
        1.weight  4x10   activation  default  lora     2      2  on             28
        --------------------------------------------------------------------------
        base 254 + LoRA 88 = 342 parameters; LoRA is 34.646 % of the base; 88 trainable
        >>> lora_summary(model).lora_parameters
        88
    """
    found = walk(model, "lora_summary")
    pairs = deltas_called(found, None)
    adapters: dict[str, list[AdapterSummary]] = {}
    for weight, delta in pairs:
        size = sum(parameter.numel() for parameter in delta.parameters())
        rank, alpha = map(delta.numbers.get, ("rank", "alpha"))
        summary = AdapterSummary(delta.adapter, rank, alpha, size, delta.enabled, delta.kind)
        adapters.setdefault(weight.name, []).append(summary)
    weights = {weight.name: weight for weight, _ in pairs}
    base = {id(tensor): tensor.numel() for _, tensor in found.parameters}
    return LoRASummary(
        tuple(
            WeightSummary(
                name,
                tuple(weight.like.shape),
                "activation" if acts(weight.module, weight.tensor) else "weight",
                tuple(adapters[name]),
            )
            for name, weight in weights.items()
        ),
        sum(base.values()),
        sum(each.parameters for several in adapters.values() for each in several),
        sum(each.numel() for each in model.parameters() if each.requires_grad),
    )
