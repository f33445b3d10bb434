"""LoRA by hand, as the tutorials write it; `from_scratch` holds the library to it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ByHand(nn.Module):
    """The formula as a parametrization: `W + (B @ A) * alpha / rank`."""

    def __init__(self, rows: int, columns: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.randn(rank, columns))
        self.lora_B = nn.Parameter(torch.zeros(rows, rank))
        self.scale = alpha / rank

    def forward(self, W: Tensor) -> Tensor:
        """Return the adapted weight."""
        return W + (self.lora_B @ self.lora_A) * self.scale


class LoRALinear(nn.Module):
    """A linear layer beside a low-rank one: `W x + b + B (A dropout(x)) * alpha / rank`."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.base, self.scale, self.merged = base.requires_grad_(False), alpha / rank, False
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[..., out]` for `[..., in]`."""
        y: Tensor = self.base(x)
        if not self.merged:
            y = y + self.dropout(x) @ self.lora_A.T @ self.lora_B.T * self.scale
        return y

    def switch(self) -> None:
        """Add the update to the base's weight, or take it out again."""
        sign = -1 if self.merged else 1
        self.base.weight.data += sign * self.scale * (self.lora_B @ self.lora_A).detach()
        self.merged = not self.merged


class Attention(nn.Module):
    """One head: `softmax(q k^T / sqrt(d)) v`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """Return `[batch, length, width]` for the same."""
        q, k, v = self.q(x), self.k(x), self.v(x)
        weights = torch.softmax(q @ k.mT / x.shape[-1] ** 0.5, -1)
        y: Tensor = weights @ v
        return y


def steps(model: nn.Module, parameters: Sequence[nn.Parameter], x: Tensor, y: Tensor) -> Tensor:
    """Take ten steps of Adam towards `y`, and return the output."""
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    for _ in range(10):
        optimizer.zero_grad()
        torch.manual_seed(0)  # the same entries are dropped by hand and by the library
        (model(x) - y).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        output: Tensor = model.eval()(x)
    return output


def pairs(model: nn.Module) -> list[nn.Parameter]:
    """Return the pairs that were made by hand."""
    return [each for name, each in model.named_parameters() if "lora_" in name]
