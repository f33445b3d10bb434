"""The benchmark: that all ways compute the same cell, and that its report says what was measured."""

from __future__ import annotations

import copy
import importlib.util
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from experiments.benchmark import __main__ as benchmark
from experiments.benchmark import adapters as many
from experiments.benchmark.cells import WAYS, Cell, cells, linears
from experiments.benchmark.measuring import kept, measure, trainer
from experiments.benchmark.report import draw, show, summary
from experiments.benchmark.verbs import llama_70b

TINY = Cell("tiny", lambda: linears(8), (4, 8), 2, ("0", "2", "4", "6"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # peft's and transformers' own
@pytest.mark.parametrize("cell", [c for c in cells() if c.quick], ids=lambda cell: cell.name)
@pytest.mark.parametrize("way", list(WAYS)[1:])
def test_every_way_starts_from_the_floors_output_and_trains(cell: Cell, way: str) -> None:
    torch.manual_seed(0)
    plain = cell.make()
    try:
        model = WAYS[way](copy.deepcopy(plain), cell)
    except NotImplementedError:
        assert cell.kind == "dora" or (way, cell.name) == ("loralib", "transformer, 4 x 64")
        return
    x = torch.randn(cell.shape, requires_grad=True)
    if way != "loralib":  # it draws new originals, and the benchmark reads only the clock
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
    before = [each.detach().clone() for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad])
    trainer(model, x, optimizer)()
    after = [each for each in model.parameters() if each.requires_grad]
    assert any(not torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_a_report_tells_of_every_cell_and_way(tmp_path) -> None:
    result = measure(TINY, "float32", torch.device("cpu"), 0.0)
    assert result["training"].keys() == WAYS.keys()
    assert result["inference"].keys() == (WAYS.keys() - {"full"}) | {"merged"}
    environment = {"device_name": "", "device": "cpu", "threads": 1, "torch": "x"}
    report = {"environment": environment, "cells": [result], "verbs": {"register_lora": 0.5}}
    report["adapters"] = {"eight / one": 1.25}
    text = show(json.loads(json.dumps(report)))
    assert text.count("\ntiny ") == 4
    assert "register_lora: 500.0 ms" in text
    assert "eight / one: 1.25" in text
    draw([result], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_the_geometric_mean_and_the_worst_cell_are_named() -> None:
    def cell(name: str, ours: float, peft: float) -> dict:
        ways = {"floor": 1.0, "lora_param": ours, "peft": peft, "merged": 1.0}
        figures = {way: {"ratio": [value] * 3} for way, value in ways.items()}
        measures = ("training", "training and AdamW", "inference")
        return {"cell": name, "mode": "float32"} | dict.fromkeys(measures, figures)

    lines = summary([cell("a", 1.0, 2.0), cell("b", 2.0, 1.0)])
    assert lines[0] == (
        "training: lora_param / peft is 1.00 in the geometric mean of 2 cells, at most 2.00 (b)"
    )


def test_an_adapter_keeps_nothing_of_a_weights_size() -> None:
    torch.manual_seed(0)
    plain, x = linears(64), torch.randn(4, 64, requires_grad=True)
    small = Cell("small", lambda: plain, (4, 64), 2, ("0", "2", "4", "6"))
    sizes = {way: kept(WAYS[way](copy.deepcopy(plain), small), x) for way in WAYS}
    assert sizes["lora_param"] - sizes["floor"] < 4 * 64 * 64 / 2**20 < sizes["parametrize"]


def test_the_largest_model_has_70_billion_parameters() -> None:
    model = llama_70b()
    assert round(sum(each.numel() for each in model.parameters()) / 1e9) == 71
    assert isinstance(model["head"], nn.Linear)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--threads", "0", "threads must be an integer from 1 to"),
        ("--device", "nonsense", "device 'nonsense' can't be used"),
    ],
)
def test_bad_option_ends_in_one_line(option, value, message, tmp_path, capsys) -> None:
    arguments = [option, value, "--output", str(tmp_path)]
    try:
        status = benchmark.main(arguments)
    except SystemExit as exit_:
        status = exit_.code
    error = capsys.readouterr().err
    assert status not in (0, None)
    assert message in error
    assert error.count("\n") == 1


def test_command_writes_its_figures_and_a_picture(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(benchmark, "cells", lambda: [replace(TINY, quick=True)])
    monkeypatch.setattr(benchmark, "verbs", lambda: {"register_lora": 0.5})
    monkeypatch.setattr(benchmark, "adapters", lambda: {"eight / one": 1.25})
    arguments = ["--quick", "--device", "cpu", "--threads", "1", "--output", str(tmp_path)]
    assert benchmark.main(arguments) == 0
    written = json.loads((tmp_path / "001" / "benchmark.json").read_text())
    assert [each["cell"] for each in written["cells"]] == ["tiny"]
    assert (tmp_path / "001" / "benchmark.png").stat().st_size > 1000
    assert f"written to {tmp_path / '001'}" in capsys.readouterr().out


def test_peers_are_compared_where_they_are_installed() -> None:
    installed = {name for name in ("peft", "loralib") if importlib.util.find_spec(name)}
    assert WAYS.keys() - {"floor", "lora_param", "parametrize", "full"} == installed


@pytest.mark.filterwarnings("ignore")  # peft's own
def test_many_adapters_are_compared_on_equal_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("ROWS", 8), ("TOKENS", 2), ("WIDTH", 8), ("RANK", 2)):
        monkeypatch.setattr(many, name, size)
    monkeypatch.setattr(many, "recompression", lambda: 1.0)
    found = many.adapters()
    assert len(found) == 4 + bool(importlib.util.find_spec("peft"))
    assert all(ratio > 0 for ratio in found.values())
