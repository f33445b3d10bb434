"""What the experiment says of its figures: a table and a verdict, that follow them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from experiments.mnist_picture import plot_wrong_counts
from experiments.mnist_report import SOURCE, STATES, Run, layer_table, table, verdict
from experiments.shared.scoring import Score
from lora_param import register_lora


def runs(on: tuple[int, ...]) -> list[Run]:
    before = Score((10,) * 10, 1000)
    return [Run(0, {"pretrained": before, "LoRA on": Score(on, 1000), "LoRA off": before})]


VERDICTS = [
    ((20,) * 9 + (2,), "The 9s: 10 wrong before, 2 with LoRA on: better, 5.0-fold."),
    ((20,) * 9 + (2,), "They pay for it, because the fine-tuning saw nothing but 9s."),
    ((20,) * 9 + (0,), "The 9s: 10 wrong before, 0 with LoRA on: better."),
    ((9,) * 9 + (12,), "The 9s: 10 wrong before, 12 with LoRA on: worse."),
    ((9,) * 9 + (12,), "The other digits: 90 wrong before, 81 with LoRA on: better, 1.1-fold."),
    ((10,) * 10, "The 9s: 10 wrong before, 10 with LoRA on: no change."),
]


@pytest.mark.parametrize(("on", "sentence"), VERDICTS)
def test_verdict_follows_the_figures(on: tuple[int, ...], sentence: str) -> None:
    assert sentence in verdict(runs(on), 9).split("\n")


def test_table_has_the_sources_figures_beneath_ours() -> None:
    lines = table(runs((20,) * 10), True).split("\n")
    for ours, source, state in zip(lines[1::2], lines[2::2], STATES, strict=True):
        assert ours.startswith(state)
        assert source.split()[-10:] == [str(count) for count in SOURCE[state].wrong]
    assert [line.split()[-11] for line in lines[2::2]] == ["0.953", "0.843", "0.953"]


def test_table_of_other_settings_has_no_figures_of_the_source() -> None:
    assert "notebook" not in table(runs((20,) * 10), False)


def test_table_of_several_runs_has_mean_and_spread() -> None:
    several = runs((10,) * 10) + runs((30,) * 10)
    assert "20±14" in table(several, True).split("\n")[3]


def test_layer_table_adds_up() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3))
    register_lora(net, rank=2)
    *_, second, totals = layer_table(net).split("\n")
    assert second.split() == ["1", "3x5", "3", "2x5", "3x2", "18", "16"]
    assert totals.startswith("58 original + 40 added by LoRA = 98 parameters together")


@pytest.mark.parametrize("count", [1, 3])
def test_picture_of_one_run_and_of_several_is_a_png(count: int, tmp_path: Path) -> None:
    plot_wrong_counts(runs((20,) * 10) * count, 9, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
