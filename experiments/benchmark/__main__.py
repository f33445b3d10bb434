"""Measure what an adapter costs, against a frozen model and against the other ways to have one.

Every figure is a multiple of the floor, which is the same model with everything frozen: forward
and backward to the input in training, forward alone in inference. All ways take turns, so that they
meet the same machine; a figure is the median over rounds of the ratio within a round.

Command: `python -m experiments.benchmark`; `--quick` for a few cells in under two minutes.
Needs: `pip install -e ".[benchmark]"` for PEFT, loralib and transformers; without them those
    columns and cells are left out.
Hardware, time: 2 cores of a shared AMD EPYC; 20 minutes, with `--quick` 63 s.
Expected: lora_param over PEFT, training: 0.89 in the geometric mean.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from ..shared.environment import choose_device, environment
from ..shared.runs import next_folder, write_json
from ..shared.settings import check_options, option, parse
from .adapters import adapters
from .cells import cells
from .measuring import measure
from .report import draw, show
from .verbs import verbs

PROGRAM = "python -m experiments.benchmark"
MODES = {"cpu": ("float32",), "cuda": ("float32", "bfloat16", "compiled float32")}
TURN = 0.02  # seconds that a turn of the floor lasts at least; with --quick one step will do


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark.

    Raises:
        ValueError: A value is out of range; says which, the rule and what it got.
    """

    quick: bool = option(False, "a few cells, in under two minutes")
    device: str = option("auto", "cpu, cuda, ...")
    threads: int = option(torch.get_num_threads(), "CPU threads")
    output: str = option("runs/benchmark", "each run writes to a new folder in this one")

    def __post_init__(self) -> None:
        check_options(self)


def run(settings: Settings) -> None:
    """Measure every cell, print the tables, and write `benchmark.json` and a picture."""
    device = choose_device(settings.device)
    torch.set_num_threads(settings.threads)
    chosen = [cell for cell in cells() if cell.quick or not settings.quick]
    work = [(cell, mode) for mode in MODES.get(device.type, MODES["cpu"]) for cell in chosen]
    results: list[dict[str, Any]] = []
    folder = next_folder(Path(settings.output))
    about = environment(device, "peft", "loralib", "transformers")
    report = {"environment": about, "cells": results, "verbs": verbs(), "adapters": adapters()}
    for cell, mode in tqdm(work, "cells", disable=None, unit="cell"):
        results.append(measure(cell, mode, device, 0.0 if settings.quick else TURN))
        # Each time, so that an interrupted run leaves what it has measured.
        write_json(folder / "benchmark.json", report)
    print(show(report))
    draw(results, folder / "benchmark.png")
    print(f"\nwritten to {folder}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line.

    Args:
        argv: Arguments; those of the process if `None`.

    Returns:
        The exit status.
    """
    settings = parse(Settings, argv, PROGRAM, __doc__.partition("\n")[0])
    try:
        run(settings)
    except (ValueError, OSError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
