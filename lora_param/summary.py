"""A table of what is adapted, for a terminal and for numbers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .base import base_parameters
from .classes import in_activation_space
from .register import adapters_of
from .surgery import template_of
from .targets import Weight


@dataclass(frozen=True)
class AdapterSummary:
    """One adapter on one weight.

    Attributes:
        name: The adapter's name.
        rank: Its rank.
        alpha: Its alpha; the update's scale is `alpha / rank`.
        parameters: Number of elements of `lora_A` and `lora_B`.
        enabled: Whether it acts.
    """

    name: str
    rank: int
    alpha: float
    parameters: int
    enabled: bool


@dataclass(frozen=True)
class WeightSummary:
    """One adapted weight.

    Attributes:
        name: The weight's name in the plain model.
        shape: Its shape.
        space: `"activation"` where its layer never forms `B @ A`, or `"weight"`.
        adapters: Its adapters, in the order in which they were registered.
    """

    name: str
    shape: tuple[int, ...]
    space: str
    adapters: tuple[AdapterSummary, ...]


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
        header = ("weight", "shape", "space", "adapter", "rank", "alpha", "state", "parameters")
        rows = [header, *(_row(weight) for weight in self.weights)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        numeric = (False, False, False, False, True, True, False, True)
        lines = [
            "  ".join(
                cell.rjust(width) if right else cell.ljust(width)
                for cell, width, right in zip(row, widths, numeric, strict=True)
            ).rstrip()
            for row in rows
        ]
        lines.insert(1, "-" * max(map(len, lines)))
        lines.append(lines[1])
        lines.append(
            f"base {self.base_parameters:,} + LoRA {self.lora_parameters:,} = "
            f"{self.total_parameters:,} parameters; LoRA is {self.percentage:.3f} % of the base; "
            f"{self.trainable_parameters:,} trainable"
        )
        return "\n".join(lines)


def lora_summary(model: nn.Module) -> LoRASummary:
    """List the adapted weights of a model, and count its parameters.

    Args:
        model: An adapted model.

    Returns:
        The numbers; its `str` is a table with one line per weight.

    Raises:
        AdapterError: The model has no adapters.

    Example:
        >>> import torch
        >>> from lora_param import register_lora
        >>> model = torch.nn.Sequential(torch.nn.Linear(20, 10), torch.nn.Linear(10, 4))
        >>> _ = register_lora(model, rank=2)
        >>> print(lora_summary(model))
        weight    shape  space       adapter  rank  alpha  state  parameters
        --------------------------------------------------------------------
        0.weight  10x20  activation  default     2      2  on             60
        1.weight  4x10   activation  default     2      2  on             28
        --------------------------------------------------------------------
        base 254 + LoRA 88 = 342 parameters; LoRA is 34.646 % of the base; 88 trainable
        >>> lora_summary(model).lora_parameters
        88
    """
    entries: dict[str, tuple[Weight, list[AdapterSummary]]] = {}
    for weight, entry in adapters_of(model):
        size = sum(parameter.numel() for parameter in entry.parameters())
        adapter = AdapterSummary(entry.adapter, entry.rank, entry.alpha, size, entry.enabled)
        entries.setdefault(weight.name, (weight, []))[1].append(adapter)
    base = {id(tensor): tensor.numel() for _, _, _, tensor in base_parameters(model)}
    return LoRASummary(
        weights=tuple(
            WeightSummary(
                name,
                tuple(template_of(weight.module, weight.tensor).shape),
                "activation" if in_activation_space(weight.module, weight.tensor) else "weight",
                tuple(adapters),
            )
            for name, (weight, adapters) in entries.items()
        ),
        base_parameters=sum(base.values()),
        lora_parameters=sum(
            each.parameters for _, adapters in entries.values() for each in adapters
        ),
        trainable_parameters=sum(each.numel() for each in model.parameters() if each.requires_grad),
    )


def _row(weight: WeightSummary) -> tuple[str, ...]:
    adapters = [
        (each.name, str(each.rank), f"{each.alpha:g}", "on" if each.enabled else "off")
        for each in weight.adapters
    ]
    return (
        weight.name,
        "x".join(map(str, weight.shape)),
        weight.space,
        *map(", ".join, zip(*adapters, strict=True)),
        f"{sum(each.parameters for each in weight.adapters):,}",
    )
