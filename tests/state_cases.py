"""A small net with adapters that change its output."""

from __future__ import annotations

import torch
from torch import nn

from lora_param import register_lora

from .cases import shake


def net(*adapters: str, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).to(dtype)
    for adapter in adapters or ("default",):
        register_lora(model, rank=2, adapter=adapter)
    shake(model)
    return model
