"""Batch and instance norms as data, and networks of them with statistics of their own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.BatchNorm1d(4), (6, 4)),
    "2d": (lambda: nn.BatchNorm2d(4), (3, 4, 5, 5)),
    "3d": (lambda: nn.BatchNorm3d(4), (3, 4, 2, 2, 2)),
    "cumulative average": (lambda: nn.BatchNorm1d(4, momentum=None), (6, 4)),
    "without affine": (lambda: nn.BatchNorm1d(4, affine=False), (6, 4)),
    "synchronised": (lambda: nn.SyncBatchNorm(4).eval(), (6, 4)),
    "instance norm": (lambda: nn.InstanceNorm2d(4, track_running_stats=True), (3, 4, 4, 4)),
}
BUFFERS = ["running_mean", "running_var", "num_batches_tracked"]


def net(name: str = "1d", device: str = "cpu") -> nn.Sequential:
    torch.manual_seed(0)
    norm = NORMS[name][0]()
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.num_batches_tracked.fill_(3)
    head = nn.Linear(torch.Size(NORMS[name][1][1:]).numel(), 2)
    return nn.Sequential(norm, nn.Flatten(), head).to(device)


def batches(name: str = "1d", count: int = 3, device: str = "cpu") -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    drawn = [torch.randn(NORMS[name][1], generator=draw) * 3 + 1 for _ in range(count)]
    return [each.to(device) for each in drawn]


def statistics(norm: nn.Module) -> list[Tensor]:
    return [getattr(norm, name).detach().clone() for name in BUFFERS]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(map(torch.equal, left, right))
