"""What a method costs that a clock doesn't tell: its file, and the memory of a step."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lora_param as lp

from .shared.batches import Split
from .shared.memory import memory
from .shared.training import adam


def file_bytes(model: nn.Module, path: Path) -> int:
    """Save what was trained, the adapter or the whole model, and return the file's size.

    Args:
        model: The model.
        path: Where the file goes for a moment.

    Returns:
        Its bytes.
    """
    if any(".parametrizations." in name for name, _ in model.named_parameters()):
        lp.save_lora(model, path)
    else:
        save_file({name: each.contiguous() for name, each in model.state_dict().items()}, path)
    size = path.stat().st_size
    path.unlink()
    return size


def bytes_of_a_step(
    model: nn.Module, parameters: Iterable[nn.Parameter], data: Split, size: int
) -> dict[str, int | None]:
    """Count what a training step holds in memory, on the batch of median length.

    Args:
        model: A classifier; its parameters are moved a little.
        parameters: What is trained.
        data: Sentences, ordered by length.
        size: Sentences in a batch.

    Returns:
        The bytes by what they hold, and together.
    """
    optimizer = adam(parameters, 1e-6, torch.optim.AdamW)
    middle = len(data.labels) // 2
    batch = data.pick(slice(middle, middle + size))

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(batch.inputs), batch.labels)

    found = memory(model.train(), optimizer, loss)
    return {**vars(found), "total": found.total}
