"""The benchmark: that all ways compute the same cell, and that its report says what was measured."""

from __future__ import annotations

import copy
import importlib.util
import json
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

import lora_param as lp
from experiments.benchmark import __main__ as benchmark
from experiments.benchmark import decoder as decoding
from experiments.benchmark import scale as scaling
from experiments.benchmark.cells import Cell, blocks, cells, embedding, linears
from experiments.benchmark.measuring import Effort, kept, measure, trainer
from experiments.benchmark.picture import draw
from experiments.benchmark.report import compare, read, show, summary, table
from experiments.benchmark.ways import KINDS, OTHERS, WAYS, prepared

CPU, SHORT = torch.device("cpu"), Effort(turn=0.0, budget=0.0, least=2)
TINY = Cell("tiny", lambda: linears(8), (4, 8), 2, ("0", "2", "4", "6"))
ENVIRONMENT = {"device_name": "", "device": "cpu", "threads": 1, "torch": "x", "clock": "wall"}
SAME = ("lora_param", "bare", "parametrize", "peft", "loralib")
peers = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("peft", "loralib")),
    reason="needs peft and loralib",
)


def report(*found: dict, **parts: Any) -> dict:
    return {"environment": ENVIRONMENT, "cells": [*found], "scale": [], "decoder": []} | parts


def cell(name: str, **ways: float) -> dict:
    """A cell's figures, where the floor takes one second and each way so many."""
    ways |= {"floor": 1.0}
    figures = {
        way: {"seconds": [took] * 3, "ratio": [took] * 3, "ours": [ways["lora_param"] / took] * 3}
        for way, took in sorted(ways.items())  # the floor is first
    }
    return {"cell": name, "mode": "float32", "training": figures, "inference": figures} | {
        "mebibytes": dict.fromkeys(ways, 2.0),
        "idle": [],
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # peft's and transformers' own
@pytest.mark.parametrize(
    "cell", [c for c in cells() if c.quick and not c.routed], ids=lambda cell: cell.name
)
def test_every_way_starts_from_the_floors_output_and_trains(cell: Cell) -> None:
    torch.manual_seed(0)
    plain, x = cell.make(), torch.randn(cell.shape, requires_grad=True)
    for way in list(WAYS)[1:]:
        try:
            model = WAYS[way](copy.deepcopy(plain), cell)
            torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
        except NotImplementedError:
            assert way in ("bare", *OTHERS)
            assert "Linear" not in cell.name.split(":")[0]  # plain linear layers, everybody has
            continue
        trained = [each for each in model.parameters() if each.requires_grad]
        before = [each.detach().clone() for each in trained]
        trainer(model, x)()
        torch.optim.AdamW(trained).step()
        assert any(not torch.equal(*pair) for pair in zip(before, trained, strict=True))


@peers
@pytest.mark.filterwarnings("ignore")  # peft's own
@pytest.mark.parametrize("way", SAME)
def test_all_ways_compute_the_same_function_of_their_factors(way: str) -> None:
    torch.manual_seed(0)
    plain = linears(8)
    model, base = WAYS[way](copy.deepcopy(plain), TINY), list(plain.parameters())
    factors = [each for each in model.parameters() if each.requires_grad]
    assert len(factors) == 8
    with torch.no_grad():
        for down, up, weight in zip(factors[::2], factors[1::2], base[::2], strict=True):
            a, b = (down, up) if down.shape[0] == 2 else (up, down)
            weight += b.normal_() @ a.normal_()
    x = torch.randn(4, 8)
    torch.testing.assert_close(model(x), plain(x))


@pytest.mark.filterwarnings("ignore")  # peft's own
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_all_ways_have_the_base_in_the_same_memory(kind: str) -> None:
    plain = linears(8)
    memory = {each.data_ptr() for each in plain.parameters()}
    models = prepared(plain, replace(TINY, kind=kind))
    assert len(models) > 2
    for model in models.values():
        assert memory <= {each.data_ptr() for each in model.parameters()}


@pytest.mark.filterwarnings("ignore")  # peft's own
@pytest.mark.parametrize("kind", KINDS)
def test_every_adapter_acts_in_what_is_measured(kind: str) -> None:
    models = prepared(linears(8), replace(TINY, kind=kind))
    x = torch.randn(4, 8)
    y = {way: model(x) for way, model in models.items()}
    assert torch.equal(y.pop("full"), y["floor"])
    # PEFT's PiSSA begins as the base by factors that aren't zero, which it has taken from that.
    same = ["floor", "peft"] if kind == "pissa" and "peft" in y else ["floor"]
    assert [way for way in y if torch.allclose(y[way], y["floor"], atol=1e-6)] == same


@pytest.mark.filterwarnings("ignore")  # peft's own
def test_a_report_tells_of_every_cell_and_way(tmp_path) -> None:
    result = measure(TINY, "float32", CPU, SHORT)
    assert result["training"].keys() == WAYS.keys()
    assert result["inference"].keys() == (WAYS.keys() - {"full"}) | {"merged"}
    text = show(json.loads(json.dumps(report(result))))
    assert text.count("\n| tiny ") == 2
    draw([result], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


@pytest.mark.filterwarnings("ignore")  # peft's own
def test_rows_with_adapters_of_their_own_are_a_cell_too() -> None:
    routed = replace(TINY, adapters=2, routed=True)
    result = measure(routed, "float32", CPU, SHORT)
    assert result["training"].keys() == {"floor", "lora_param", "full"}
    assert result["inference"].keys() == {"floor", "lora_param"} | ({"peft"} & WAYS.keys())


@peers
@pytest.mark.filterwarnings("ignore")  # peft's own
def test_an_adapter_that_does_not_act_is_left_out_and_named() -> None:
    attention = Cell(
        "blocks", lambda: blocks(256), (1, 4, 256), 2, ("self_attn", "linear1", "linear2")
    )
    result = measure(attention, "float32", CPU, SHORT)
    assert result["idle"] == ["peft"]
    assert "peft" not in result["inference"]
    assert "doesn't act there: blocks (peft)" in summary([result])[-1]


def test_cells_that_miss_the_aim_are_named_with_the_best_other_way() -> None:
    found = [
        cell("a", lora_param=2.0, peft=4.0, parametrize=1.6, loralib=5.0),
        cell("b", lora_param=2.0, peft=2.0),
    ]
    lines = summary(found)
    assert lines[:3] == [
        "float32, training: 0.71 of PEFT's time (aim 0.85) in the geometric mean of 2 cells, at "
        "most 1.00 of PEFT's, b",
        "float32, training: 1.12 of the best other's in the geometric mean of 2 cells, at most "
        "1.25 of plain parametrize's, a",
        "float32, training: 1 cells above 1.02 of the best other's: 1.25 of plain parametrize's, a",
    ]
    row = next(line for line in show(report(*found)).splitlines() if line.startswith("| a "))
    assert "| 1.25 (plain parametrize) | 0.50 |" in " ".join(row.split())


def test_two_runs_are_held_side_by_side() -> None:
    then = report(cell("a", lora_param=2.0), cell("gone", lora_param=1.0))
    now = report(cell("a", lora_param=3.0), environment=ENVIRONMENT | {"threads": 2})
    text = compare(then, now)
    assert "not the same environment: threads was 1, is 2" in text
    assert "only in one of the runs: gone, training" in text
    row = next(line for line in text.splitlines() if line.startswith("| a, training"))
    assert row.replace(" ", "") == "|a,training|2|3|1.50|"
    assert text.endswith("now / then: 1.500 in the geometric mean of 2")


def test_a_table_is_markdown() -> None:
    lines = table([["", "a"], ["row", "1.50"]]).splitlines()
    assert lines == ["|     |    a |", "| --- | ---: |", "| row | 1.50 |"]


def test_growth_is_an_exponent_of_the_largest_sizes(monkeypatch) -> None:
    def part(size: int, path: object) -> dict:
        return {"square": lambda: passed.append(size**2)}

    passed: list[float] = [0.0]
    monkeypatch.setattr(scaling, "PARTS", (("things", part, (10, 100, 1000)),))
    found = scaling.scale(False, lambda: sum(passed))
    assert found == [
        {
            "of": "things",
            "what": "square",
            "counts": (10, 100, 1000),
            "seconds": [100.0, 10000.0, 1000000.0],
            "exponent": "2.00",
        }
    ]
    assert "| square  | 1e+02 | 1e+04 | 1e+06 |     2.00 |" in show(report(scale=found))


@pytest.mark.parametrize("part", scaling.PARTS[:3], ids=lambda part: part[0])
def test_every_verb_of_the_growth_runs(part, monkeypatch) -> None:
    of, verbs, _ = part
    monkeypatch.setattr(scaling, "PARTS", ((of, verbs, (2, 4)),))
    monkeypatch.setattr(scaling, "llama_70b", lambda: linears(8).to("meta"))
    found = scaling.scale(False, time.perf_counter)
    assert {"register_lora", "lora_summary", "remove_lora"} <= {
        each["what"].split(",")[0] for each in found
    }
    assert all(seconds > 0 for each in found for seconds in each["seconds"])


def test_an_adapter_keeps_nothing_of_a_weights_size() -> None:
    torch.manual_seed(0)
    plain, x = linears(256), torch.randn(4, 256, requires_grad=True)
    small = Cell("small", lambda: plain, (4, 256), 2, ("0", "2", "4", "6"))
    sizes = {way: kept(WAYS[way](copy.deepcopy(plain), small), x) for way in WAYS}
    assert sizes["lora_param"] - sizes["floor"] < 4 * 256 * 256 / 2**20 < sizes["parametrize"]


def test_the_largest_model_has_70_billion_parameters() -> None:
    model = scaling.llama_70b()
    assert round(sum(each.numel() for each in model.parameters()) / 1e9) == 71
    assert len(lp.register_lora(model, rank=1)) == 80 * 7 + 1


@pytest.mark.filterwarnings("ignore")  # peft's own
def test_a_decoder_is_trained_with_an_adapter_and_in_full(monkeypatch) -> None:
    monkeypatch.setattr(decoding, "SIZE", (2, 32, 2, 50, 8))
    runs = decoding.decoder(CPU, ("float32", "bfloat16"))
    ways = [way for way in ("full", "lora_param", "peft") if way in WAYS]
    assert [each["way"] for each in runs] == 2 * ways
    sizes = {(each["mode"], each["way"]): each["bytes"] for each in runs}
    assert sizes["float32", "lora_param"] < sizes["float32", "full"]
    assert sizes["bfloat16", "full"] < 0.6 * sizes["float32", "full"]
    text = show(report(decoder=runs))
    assert "| lora_param, bfloat16 " in text


def test_the_decoder_has_a_billion_parameters() -> None:
    with torch.device("meta"):
        model = decoding.Decoder(*decoding.SIZE)
    assert 0.9e9 < sum(each.numel() for each in model.parameters()) < 1.1e9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threads", "0"], "threads must be an integer from 1 to"),
        (["--device", "nonsense"], "device 'nonsense' can't be used"),
        (["--clock", "sun"], "clock must be wall or cpu, got 'sun'"),
        (["--modes", "float8"], "modes must be some of float32, bfloat16"),
        (["--cells", "nothing"], "no cell fits 'nothing'"),
        (["--decoder", "--device", "cpu"], "decoder needs a CUDA GPU"),
        (["--report", "nowhere.json"], "No such file or directory: 'nowhere.json'"),
        (["--compare", "pyproject.toml"], "pyproject.toml: not a benchmark.json of this benchmark"),
    ],
)
def test_a_bad_option_ends_in_one_line(options, message, tmp_path, capsys) -> None:
    try:
        status = benchmark.main([*options, "--output", str(tmp_path)])
    except SystemExit as exit_:
        status = exit_.code
    error = capsys.readouterr().err
    assert status not in (0, None)
    assert message in error
    assert error.count("\n") == 1
    assert [*tmp_path.iterdir()] == []


@pytest.mark.filterwarnings("ignore")  # peft's own
def test_the_command_writes_what_it_can_show_and_compare(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(benchmark, "cells", lambda pattern: [replace(TINY, quick=True)])
    monkeypatch.setattr(benchmark, "scale", lambda quick, clock: [])
    command = ["--quick", "--device", "cpu", "--threads", "1", "--clock", "cpu"]
    assert benchmark.main([*command, "--output", str(tmp_path)]) == 0
    file = tmp_path / "001" / "benchmark.json"
    assert f"\nin {file.parent}\n" in capsys.readouterr().out
    assert [each["cell"] for each in read(file)["cells"]] == ["tiny"]
    picture = file.with_name("speed.png")
    picture.unlink()
    assert benchmark.main(["--report", str(file), "--compare", str(file)]) == 0
    assert picture.stat().st_size > 1000
    assert "now / then: 1.000 in the geometric mean of 2" in capsys.readouterr().out


def test_peers_are_compared_where_they_are_installed() -> None:
    installed = {name for name in ("peft", "loralib") if importlib.util.find_spec(name)}
    assert WAYS.keys() - {"floor", "lora_param", "bare", "parametrize", "full"} == installed


def test_the_largest_layers_are_named_by_what_the_picture_looks_for() -> None:
    assert len(cells("Linear *, rank 8")) == 18
    kinds = [each.kind for each in cells("*: Linear 1024, 1024 *")]
    assert sorted(kinds) == sorted(KINDS)
    assert isinstance(cells("Conv2d 16, 32 x 32*")[0].make()[0], nn.Conv2d)


def test_the_embeddings_cell_looks_words_up_and_reads_no_adapted_weight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = embedding()
    lp.register_lora(model, rank=2, target="module.0")
    monkeypatch.delattr(ParametrizationList, "forward")
    assert model(torch.randn(4)).shape == (4, 256)
