"""A layer whose adapters change its output."""

from __future__ import annotations

import torch
from torch import nn

from lora_param import register_lora

from .cases import shake


def adapted(*adapters: str) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(6, 5)
    for adapter in adapters:
        register_lora(layer, rank=2, adapter=adapter)
    shake(layer)
    return layer
