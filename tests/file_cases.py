"""A small net, its adapters, and what is asked of a load that fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor, nn

from lora_param import LoRAError, load_lora, register_lora
from lora_param.io.tensors import OpenFile, open_file

from .cases import shake


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))


def net(*adapters: str, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    model = plain().to(dtype)
    for adapter in adapters or ("default",):
        register_lora(model, rank={"0": 2, "*": 1}, alpha=3.0, adapter=adapter)
    shake(model)
    return model


def state(model: nn.Module) -> dict[str, Any]:
    tensors = {name: (id(t), t.requires_grad, t.clone()) for name, t in model.named_parameters()}
    return {"modules": str(model), "tensors": tensors}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return (
        a["modules"] == b["modules"]
        and a["tensors"].keys() == b["tensors"].keys()
        and all(
            x[:2] == y[:2] and torch.equal(x[2], y[2])
            for x, y in zip(a["tensors"].values(), b["tensors"].values(), strict=True)
        )
    )


def refused(model: nn.Module, path: Path, match: str = "", **options: Any) -> None:
    """Load what can't be loaded: one of our errors, and the model as it was."""
    before = state(model)
    with pytest.raises(LoRAError, match=match):
        load_lora(model, path, **options)
    assert same(before, state(model))


def header_of(path: Path) -> OpenFile:
    with open_file(path) as file:
        return file


def tensors_of(path: Path) -> dict[str, Tensor]:
    with open_file(path) as file:
        return dict(file.tensors)


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


FUZZ = settings(
    max_examples=1000,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
