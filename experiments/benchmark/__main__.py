"""Measure what an adapter costs, against a frozen model and against the other ways to have one.

Every figure is a multiple of the floor, which is the same model with everything frozen: forward
and backward to the input in training, forward alone in inference. All ways take turns, so that they
meet the same machine; a figure is the median over rounds of the ratio within a round.

Command: `python -m experiments.benchmark` measures all cells, and how the verbs' time grows;
    `--quick` a few, `--cells "Linear 64*"` some, `--cells "*: Linear 1024, 1024 *"` the kinds,
    `--scale` growth alone, `--decoder` a model of a billion parameters, on CUDA. `--report FILE`
    shows a run's `benchmark.json` again and draws it; `--compare FILE` holds an earlier run beside.
Needs: `pip install -e ".[benchmark]"` for PEFT, loralib and transformers; without them those
    columns and cells are left out.
Where others use the machine: `--threads 1 --clock cpu`.
Hardware, time: 2 cores of a shared AMD EPYC; 12 minutes, with `--quick` 1.
Expected: lora_param over PEFT, training: 0.89 in the geometric mean.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from ..shared.environment import choose_device, environment
from ..shared.runs import next_folder, write_json
from ..shared.settings import call, check_options, option
from .cells import cells
from .decoder import decoder
from .measuring import CLOCKS, Effort, measure
from .picture import draw
from .report import Report, compare, read, show
from .scale import scale

DTYPES = ("float32", "bfloat16")
MODES = (*DTYPES, *(f"compiled {each}" for each in DTYPES))
AUTO = "on CUDA all, those compiled in the cells of --quick; else the first"
PEERS = ("peft", "loralib", "transformers")


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark.

    Raises:
        ValueError: A value is out of range, or two don't go together; says which and the rule.
    """

    quick: bool = option(False, "a few cells, in about a minute")
    cells: str = option("*", "a glob of cells' names, such as 'Linear 64*'")
    scale: bool = option(False, "only how the verbs' time grows with weights and adapters")
    decoder: bool = option(False, "only a decoder of a billion parameters, on CUDA")
    modes: str = option("auto", f"some of {', '.join(MODES)}; auto: {AUTO}")
    device: str = option("auto", "cpu, cuda, ...")
    threads: int = option(torch.get_num_threads(), "CPU threads")
    clock: str = option("wall", "wall, or cpu: processor time, on a machine that others use too")
    report: str = option("", "show this benchmark.json and draw it, and measure nothing")
    compare: str = option("", "hold this benchmark.json of an earlier run beside it")
    output: str = option("runs/benchmark", "each run writes to a new folder in this one")

    def __post_init__(self) -> None:
        check_options(self)
        if self.clock not in CLOCKS:
            raise ValueError(f"clock must be wall or cpu, got {self.clock!r}")
        if unknown := [each for each in self.chosen_modes if each not in MODES]:
            raise ValueError(f"modes must be some of {', '.join(MODES)}, got {unknown[0]!r}")

    @property
    def chosen_modes(self) -> tuple[str, ...]:
        """The modes that were asked for; none where the device says it."""
        names = () if self.modes == "auto" else self.modes.split(",")
        return tuple(name.strip() for name in names)


def run(settings: Settings) -> None:
    """Measure, or read what was measured; print the tables; write them and a picture."""
    then = read(Path(settings.compare)) if settings.compare else None
    path = Path(settings.report) if settings.report else measured(settings)
    report = read(path)
    print(show(report))
    if report["cells"]:
        draw(report["cells"], path.with_name("speed.png"))
    if then is not None:
        print(f"\n{compare(then, report)}")
    print(f"\nin {path.parent}")


def measured(settings: Settings) -> Path:
    """Measure what the settings ask for; return the file that the figures are in."""
    device = choose_device(settings.device)
    cuda, every = device.type == "cuda", settings.cells == "*"
    if settings.clock == "cpu" and device.type != "cpu":
        raise ValueError(f"clock 'cpu' doesn't see what {device} does; take wall")
    if settings.decoder and not cuda:
        raise ValueError(
            f"decoder needs a CUDA GPU of 40 GB or more, and runs on {device}: a step of a billion "
            "parameters would take minutes here. Run it with --device cuda on a machine with one"
        )
    modes = settings.chosen_modes or (MODES if cuda else MODES[:1])
    torch.set_num_threads(settings.threads)
    less: dict[str, Any] = {"turn": 0.01, "budget": 1.0, "least": 5} if settings.quick else {}
    effort, whole = Effort(**less, clock=settings.clock), not settings.scale | settings.decoder
    work = [
        (cell, mode)
        for mode in modes
        for cell in cells(settings.cells)
        if cell.quick or not (every and (settings.quick or "compiled" in mode))
    ]
    for name in PEERS:
        if importlib.util.find_spec(name) is None:
            print(f"{name} isn't installed: what needs it is left out", file=sys.stderr)
    path = next_folder(Path(settings.output)) / "benchmark.json"
    about = environment(device, *PEERS) | {"clock": settings.clock}
    report: Report = {"environment": about, "cells": [], "scale": [], "decoder": []}
    for cell, mode in tqdm(work if whole else [], "cells", disable=None, unit="cell"):
        report["cells"].append(measure(cell, mode, device, effort))
        write_json(path, report)  # each time, so that an interrupted run leaves what it has
    if settings.scale or (whole and every):
        report["scale"] = scale(settings.quick, CLOCKS[settings.clock])
    if settings.decoder or (whole and cuda and every and not settings.quick):
        report["decoder"] = decoder(device, modes)
    write_json(path, report)
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line.

    Args:
        argv: Arguments; those of the process if `None`.

    Returns:
        The exit status.
    """
    return call(run, Settings, argv, "experiments.benchmark", __doc__)


if __name__ == "__main__":
    sys.exit(main())
