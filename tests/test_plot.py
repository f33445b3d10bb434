"""The picture of what a file holds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from lora_param import register_lora, save_lora
from lora_param.io import file_summary
from lora_param.io.cli import main

from .cases import shake


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Save an adapter, with a pair that changes nothing and what is trained whole, and its base."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3))
    torch.save(model.state_dict(), tmp_path / "base.pt")
    register_lora(model, rank=2, target=["0", "1"], train="2")
    shake(model)
    nn.init.zeros_(model[1].parametrizations.weight[0].lora_B)
    save_lora(model, tmp_path / "adapter.safetensors")
    return tmp_path


def drawn(monkeypatch: pytest.MonkeyPatch, *command: Any) -> dict[str, tuple[list[int], Any]]:
    """Run `info`, and return what it draws by its label: places and values."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, out: figures.append(self))
    assert main(["info", *map(str, command)]) == 0
    lines = [line for axes in figures[0].axes for line in axes.get_lines()]
    return {
        str(each.get_label()): (list(each.get_xdata()), list(each.get_ydata())) for each in lines
    }


def test_norms_and_ranks_are_drawn_in_model_order(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, base = saved / "adapter.safetensors", saved / "base.pt"
    lines = drawn(monkeypatch, path, "--plot", saved / "a.png", "--base", base)
    updates, plain = file_summary(path).weights, torch.load(base)
    assert [each.weight for each in updates] == ["0.weight", "1.weight", "2.weight", "2.bias"]
    assert lines["rank"] == ([0, 1], [2, 2])
    assert lines["effective rank"] == ([0, 1, 2, 3], [each.effective_rank for each in updates])
    assert lines["|dW|"] == ([0, 1, 2, 3], [each.norm for each in updates])
    norms = [plain[each.weight].double().norm().item() for each in updates]
    assert lines["|W|"] == ([0, 1, 2, 3], norms)


def test_without_a_base_updates_are_drawn_alone(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = drawn(monkeypatch, saved / "adapter.safetensors", "--plot", saved / "a.png")
    assert "|W|" not in lines
    assert "|dW|" in lines


def test_the_picture_is_written(saved: Path, capsys: Any) -> None:
    picture = saved / "a.png"
    assert main(["info", str(saved / "adapter.safetensors"), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "4 weights" in capsys.readouterr().out


def test_what_stops_a_picture_is_said_in_one_line(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    adapter = str(saved / "adapter.safetensors")
    assert main(["info", adapter, "--plot", str(saved / "a.xyz")]) == 1
    assert "a.xyz: can't be drawn: Format 'xyz' is not supported" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["info", adapter, "--plot", str(saved / "a.png")]) == 1
    assert capsys.readouterr().err == (
        "lora-param: a picture needs matplotlib: pip install matplotlib\n"
    )
