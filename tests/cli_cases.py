"""Models, files and ways to run the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_param import base_state_dict, register_lora, save_lora
from lora_param.io.cli import main

from .cases import Experts, shake


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5)
        self.conv = nn.Conv2d(4, 6, 3, groups=2)
        self.attention = nn.MultiheadAttention(8, 2)
        self.tokens = nn.Embedding(7, 5)
        self.experts = Experts()


TARGETS = ["linear", "conv", "attention", "tokens", "up"]


def adapted(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    model = Net().to(dtype)
    register_lora(model, rank=2, alpha=3.0, target=TARGETS)
    shake(model)
    return model


def fails(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """Run what can't be done: one line, and a status that says so."""
    assert main([str(each) for each in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    return captured.err


def works(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    assert main([str(each) for each in arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def merging(adapter: Path, base: Path, out: Path) -> tuple[Any, ...]:
    return "merge", adapter, "--base", base, "--out", out


def change(name: str) -> Callable[[dict[str, Tensor]], None]:
    def apply(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[0] += 1

    return apply


def linears() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Conv1d(5, 4, 3), nn.Linear(5, 4))


def written(model: nn.Module, tmp_path: Path) -> tuple[nn.Module, Path, Path]:
    """Adapt a model, and save its adapter and its base."""
    register_lora(model, rank=2, alpha=3.0)
    shake(model)
    save_lora(model, tmp_path / "adapter.safetensors")
    save_file(base_state_dict(model), tmp_path / "base.safetensors")
    return model, tmp_path / "adapter.safetensors", tmp_path / "base.safetensors"


def spoil(file: Path, harm: Callable[[dict[str, Tensor]], Any]) -> None:
    """Write a file's tensors again when something has been done to them."""
    tensors = load_file(file)
    harm(tensors)
    save_file(tensors, file)
