"""The comparison with the source's loop: that both ways do every phase, each in its own process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from experiments import mnist_source_loop
from experiments.mnist_source_loop import PHASES, Phase


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--quick"], ["--full"]])
def test_both_ways_are_timed_in_every_phase(
    options: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # more would wait for each other
    short = [Phase(phase.name, 20, 10, 10) for phase in PHASES]
    monkeypatch.setattr(mnist_source_loop, "PHASES", short)
    mnist_source_loop.main(options)
    printed = capfd.readouterr()
    names = [line[:16].strip() for line in printed.out.strip().split("\n")]
    assert names == ["phase", *(phase.name for phase in PHASES), "whole run"]
    assert printed.err == ""  # no progress bars, and no worker's traceback


TURNS = [([], 31), (["--quick"], 7), (["--full"], 4)]


@pytest.mark.parametrize(("options", "turns"), TURNS)
def test_workers_take_turns(
    options: list[str], turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, int]] = []

    @contextmanager
    def recorded(way: mnist_source_loop.Way, data: object) -> Iterator[mnist_source_loop.Seconds]:
        def seconds(phase: str, count: int) -> float:
            done.append((way.__name__, count))
            return float(count)

        yield seconds

    monkeypatch.setattr(mnist_source_loop, "worker", recorded)
    monkeypatch.setattr(mnist_source_loop, "PHASES", [Phase("a", 200, 50, 1500)])
    mnist_source_loop.main(options)
    assert [way for way, _ in done] == ["ours", "source"] * turns
    counts = [50] * turns if "--full" in options else [1500] + [50] * (turns - 1)
    assert [count for way, count in done if way == "source"] == counts
