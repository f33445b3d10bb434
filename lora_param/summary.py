"""A table of what is adapted, for a terminal and for numbers."""

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import nn

from .activation import space_of
from .checks import deltas_called, walk
from .deltas import Delta
from .weight import Weight

NUMERIC = ("rank", "alpha", "parameters")
"""Columns that are aligned to the right."""


@dataclass(frozen=True)
class AdapterSummary:
    """One adapter on one weight; rank, alpha and scaling are `None` for a kind without them."""

    name: str
    rank: int | None
    alpha: float | None
    scaling: str | None
    parameters: int
    enabled: bool
    kind: str
    strength: float = 1.0

    def _cells(self) -> tuple[str, ...]:
        on = "on" if self.strength == 1 else f"x {self.strength:g}"
        rank = "-" if self.rank is None else str(self.rank)
        alpha = show_alpha(self.alpha, self.scaling)
        return self.name, self.kind, rank, alpha, on if self.enabled else "off"


@dataclass(frozen=True)
class WeightSummary:
    """One adapted weight, with its adapters in their order.

    Its space is `"activation"`, `"weight"`, or `"activation or weight, by cost"` of each input.
    """

    name: str
    shape: tuple[int, ...]
    space: str
    adapters: tuple[AdapterSummary, ...]

    def _row(self) -> tuple[str, ...]:
        columns = map(", ".join, zip(*(each._cells() for each in self.adapters), strict=True))
        size = sum(each.parameters for each in self.adapters)
        return self.name, "x".join(map(str, self.shape)), self.space, *columns, f"{size:,}"


@dataclass(frozen=True)
class LoRASummary:
    """What `lora_summary` returns; `print` it for the table.

    `statistics` are the buffers that are moved in copies. The base's shared tensors count once.
    """

    weights: tuple[WeightSummary, ...]
    statistics: tuple[WeightSummary, ...]
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
        lines = aligned([header, *(weight._row() for weight in self.weights)], NUMERIC)
        rule = "-" * max(map(len, lines))
        totals = (
            f"base {self.base_parameters:,} + LoRA {self.lora_parameters:,} = "
            f"{self.total_parameters:,} parameters; LoRA is {self.percentage:.3f} % of the base; "
            f"{self.trainable_parameters:,} trainable"
        )
        if self.statistics:
            totals += f"; {len(self.statistics)} buffers are moved in copies"
        return "\n".join([lines[0], rule, *lines[1:], rule, totals])


def aligned(rows: Sequence[Sequence[str]], right: Collection[str]) -> list[str]:
    """Return lines of columns, of which those with these titles are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [">" if title in right else "<" for title in rows[0]]
    columns = [f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True)]
    return ["  ".join(columns).format(*row).rstrip() for row in rows]


def show_alpha(alpha: float | None, scaling: str | None) -> str:
    """Return an alpha, and what divides it if that isn't the rank."""
    said = "-" if alpha is None else f"{alpha:g}"
    return said if scaling in (None, "lora") else f"{said} {scaling}"


def lora_summary(model: nn.Module) -> LoRASummary:
    """List the adapted weights of a model, and count its parameters.

    Raises:
        AdapterError: The model has no adapters.

    Example:
        >>> model = torch.nn.Linear(20, 10)
        >>> _ = register_lora(model, rank=2)
        >>> print(lora_summary(model))
        weight  shape  space                          adapter  kind  rank  alpha  state  parameters
        -------------------------------------------------------------------------------------------
        weight  10x20  activation or weight, by cost  default  lora     2      2  on             60
        -------------------------------------------------------------------------------------------
        base 210 + LoRA 60 = 270 parameters; LoRA is 28.571 % of the base; 60 trainable
        >>> lora_summary(model).lora_parameters
        60
    """
    found = walk(model, "lora_summary")
    adapted: defaultdict[Weight, list[Delta]] = defaultdict(list)
    for weight, delta in deltas_called(found, None):
        adapted[weight].append(delta)
    weights, statistics = (
        tuple(_summarised(w, deltas) for w, deltas in adapted.items() if w.is_buffer == buffers)
        for buffers in (False, True)
    )
    base = {id(tensor): tensor.numel() for _, tensor in found.parameters}
    return LoRASummary(
        weights,
        statistics,
        sum(base.values()),
        sum(adapter.parameters for weight in weights for adapter in weight.adapters),
        sum(each.numel() for each in model.parameters() if each.requires_grad),
    )


def _summarised(weight: Weight, deltas: list[Delta]) -> WeightSummary:
    adapters = []
    for delta in deltas:
        size = sum(parameter.numel() for parameter in delta.parameters())
        rank, alpha, scaling = map(delta.numbers.get, ("rank", "alpha", "scaling"))
        state = size, delta.enabled, delta.kind, delta.strength
        adapters.append(AdapterSummary(delta.adapter, rank, alpha, scaling, *state))
    space = space_of(weight.module, weight.tensor)
    return WeightSummary(weight.name, tuple(weight.like.shape), space, tuple(adapters))
