"""What experiments share: settings, runs, claims, batches, training, scores, tables, devices."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.shared.batches import Split, shuffled
from experiments.shared.claims import BrokenClaimError, claim, same_bits
from experiments.shared.environment import choose_device, environment
from experiments.shared.plots import grouped_bars, new_figure
from experiments.shared.runs import next_folder, timed, timings, write_json
from experiments.shared.scoring import Spread, score, spread
from experiments.shared.settings import check_options, option, parse
from experiments.shared.tables import aligned
from experiments.shared.training import adam, train


@dataclass(frozen=True)
class Settings:
    """One option of each kind."""

    count: int = option(2, "an integer", most=9)
    rate: float = option(0.5, "a number", above=0)
    name: str = option("x", "a string")
    loud: bool = option(False, "a flag")

    def __post_init__(self) -> None:
        check_options(self)


def parsed(*arguments: str) -> Settings:
    return parse(Settings, arguments, "program", "Does it.")


def test_options_have_the_fields_defaults() -> None:
    assert parsed() == Settings()


def test_options_set_the_fields() -> None:
    found = parsed("--count", "3", "--rate", "2", "--name", "y", "--loud")
    assert found == Settings(3, 2.0, "y", True)
    assert not parsed("--loud", "--no-loud").loud


BAD = [
    ({"count": 0}, "count must be an integer from 1 to 9, got 0"),
    ({"count": 10}, "count must be an integer from 1 to 9, got 10"),
    ({"rate": 0.0}, "rate must be a finite number above 0, got 0.0"),
    ({"rate": float("inf")}, "rate must be a finite number above 0, got inf"),
    ({"rate": float("nan")}, "rate must be a finite number above 0, got nan"),
]


@pytest.mark.parametrize(("values", "message"), BAD)
def test_value_out_of_range_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Settings(**values)


def test_bad_option_ends_the_process_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parsed("--count", "0")
    error = capsys.readouterr().err
    assert error == "program: count must be an integer from 1 to 9, got 0\n"


def test_help_says_each_options_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parsed("--help")
    shown = capsys.readouterr().out
    assert "--count INT" in shown
    assert "an integer (default: 2)" in shown


def test_folders_are_numbered_and_none_is_taken_twice(tmp_path: Path) -> None:
    parent = tmp_path / "new" / "runs"
    assert [next_folder(parent).name for _ in range(3)] == ["001", "002", "003"]


def test_json_comes_back(tmp_path: Path) -> None:
    write_json(tmp_path / "figures.json", {"a": [1, 2.5]})
    assert json.loads((tmp_path / "figures.json").read_text()) == {"a": [1, 2.5]}


def test_phases_of_one_name_add_up() -> None:
    seconds = {"work": 10.0}
    with timed(seconds, "work"):
        pass
    assert seconds["work"] > 10


def test_timings_name_each_phase_and_the_sum() -> None:
    assert timings({"a": 1.04, "b": 2.0}) == "seconds: a 1.0, b 2.0; together 3.0"


def test_claim_that_does_not_hold_is_named() -> None:
    claim(True, "water is wet")
    with pytest.raises(BrokenClaimError, match="broken claim: water is dry"):
        claim(False, "water is dry")


ZERO = torch.zeros(2, 3)
OTHERS = {
    "sign": -ZERO,
    "shape": torch.zeros(3, 2),
    "dtype": torch.zeros(2, 3, dtype=torch.int32),
    "value": torch.ones(2, 3),
}


@pytest.mark.parametrize("other", OTHERS)
def test_bits_differ(other: str) -> None:
    assert not same_bits(ZERO, OTHERS[other])


def test_bits_do_not_depend_on_strides() -> None:
    matrix = torch.randn(3, 4)
    assert same_bits(matrix.T, matrix.T.clone(memory_format=torch.contiguous_format))
    assert same_bits(torch.tensor(float("nan")), torch.tensor(float("nan")))


def examples(count: int) -> Split:
    """Make vectors whose largest entry says the label."""
    labels = torch.arange(count) % 3
    return Split(torch.nn.functional.one_hot(labels, 3).float(), labels)


def test_an_epoch_of_batches_has_each_example_once() -> None:
    split = Split(torch.arange(10.0), torch.arange(10))
    batches = shuffled(split, 4, torch.Generator().manual_seed(0))
    epochs = [[next(batches) for _ in range(3)] for _ in range(2)]
    orders = [torch.cat([batch.labels for batch in epoch]).tolist() for epoch in epochs]
    assert [len(batch.labels) for batch in epochs[0]] == [4, 4, 2]
    assert [sorted(order) for order in orders] == [list(range(10))] * 2
    assert orders[0] != orders[1]
    assert all(batch.inputs.tolist() == batch.labels.tolist() for batch in epochs[0])


def test_training_takes_as_many_steps_as_asked_for_and_learns() -> None:
    torch.manual_seed(0)
    net, split = torch.nn.Linear(3, 3), examples(30)
    optimizer = adam(net.parameters(), 0.1)
    batches = shuffled(split, 10, torch.Generator().manual_seed(0))
    first = train(net, optimizer, batches, 1, "first")
    assert train(net, optimizer, batches, 50, "later") < first
    assert {int(state["step"]) for state in optimizer.state.values()} == {51}


def test_diverged_training_is_refused() -> None:
    net, split = torch.nn.Linear(3, 3), Split(torch.full((5, 3), torch.inf), torch.zeros(5).long())
    batches = shuffled(split, 5, torch.Generator())
    with pytest.raises(ValueError, match="this phase diverged, its mean loss is nan"):
        train(net, adam(net.parameters(), 0.1), batches, 1, "this phase")


def test_adam_goes_without_the_fused_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.optim.Adam

    def unfused(*arguments: Any, fused: bool = False, **rest: Any) -> torch.optim.Optimizer:
        if fused:
            raise RuntimeError("`fused=True` requires all the params to be on supported devices")
        return real(*arguments, **rest)

    monkeypatch.setattr(torch.optim, "Adam", unfused)
    optimizer = adam(torch.nn.Linear(2, 2).parameters(), 0.25)
    assert optimizer.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_score_counts_what_is_wrong_by_class(batch_size: int) -> None:
    split = examples(10)
    split.labels[:2] = 2  # what says 0 and 1 is a 2
    found = score(torch.nn.Identity(), split, batch_size, "test")
    assert found.wrong == (0, 0, 2)
    assert found.accuracy == pytest.approx(0.8)
    expected = torch.nn.functional.cross_entropy(*split)
    assert found.loss == pytest.approx(expected.item())


def test_spread_is_the_sample_standard_deviation() -> None:
    assert spread([1.0, 3.0]).text(2) == "2.00±1.41"
    assert spread([1.0]) == Spread(1.0, None)


def test_columns_are_aligned() -> None:
    assert aligned([["", "x"], ["ab", "100"]]) == "      x\nab  100"


def test_bars_of_a_group_stand_side_by_side() -> None:
    _, axes = new_figure(2)
    figures = [spread([1.0, 3.0]), spread([2.0, 2.0])]
    places = grouped_bars(axes, {"a": figures, "b": figures}, width=0.25)
    assert places == {"a": [-0.125, 0.875], "b": [0.125, 1.125]}
    assert [bar.get_height() for bar in axes.patches] == [2.0] * 4


def test_device_is_the_accelerator_that_torch_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
    assert choose_device("auto") == torch.device("cpu")


def test_environment_names_what_is_installed_only() -> None:
    found = environment(torch.device("cpu"), "numpy", "no-such-package")
    assert {"torch", "numpy", "threads", "flush_denormal"} <= found.keys()
    assert "no-such-package" not in found
