"""What a training step holds in memory, counted tensor by tensor on any device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step.

    Attributes:
        parameters: The model's parameters and buffers, adapters among them.
        gradients: What backward leaves on the parameters.
        optimizer: The optimizer's state.
        activations: What forward keeps for backward, parameters aside.
        peak: The device's own count of the most that was allocated; `None` on a CPU.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    peak: int | None = None

    @property
    def total(self) -> int:
        """All that was counted."""
        return self.parameters + self.gradients + self.optimizer + self.activations


def size(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors' storages, of shared ones once."""
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def memory(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]
) -> Memory:
    """Take one training step and count what it holds.

    Args:
        model: The model.
        optimizer: An optimizer of what is trained.
        loss: Runs the model forward and returns the loss.

    Returns:
        The bytes.
    """
    own = [*model.parameters(), *model.buffers()]
    places = {each.untyped_storage().data_ptr() for each in own}
    kept: dict[int, int] = {}
    held: list[Tensor] = []  # so that no storage is freed and another one gets its place

    def keep(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in places and place not in kept:
            kept[place] = tensor.untyped_storage().nbytes()
            held.append(tensor.detach())
        return tensor

    device = own[0].device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    optimizer.zero_grad()
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        found = loss()
    held.clear()
    found.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    states = [t for state in optimizer.state.values() for t in state.values()]
    return Memory(
        size(own),
        size(each.grad for each in own if each.grad is not None),
        size(each for each in states if isinstance(each, Tensor)),
        sum(kept.values()),
        torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )
