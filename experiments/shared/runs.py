"""A run's folder, what is written there, and how long each phase took."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .environment import environment


def next_folder(parent: Path) -> Path:
    """Make the next free numbered folder: `001`, `002`, ...

    Args:
        parent: Where; made too if it isn't there.

    Returns:
        The new, empty folder.
    """
    parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        folder = parent / f"{number:03}"
        try:
            folder.mkdir()  # also where two runs start at once, only one gets the number
        except FileExistsError:
            number += 1
        else:
            return folder


def write_json(path: Path, content: object) -> None:
    """Write figures as JSON that people can read too.

    Args:
        path: The file.
        content: What `json.dumps` takes.
    """
    path.write_text(json.dumps(content, indent=2) + "\n")


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Add the time that a block takes to a phase.

    Args:
        seconds: Time by phase.
        phase: The phase's name.

    Yields:
        Nothing.
    """
    start = time.perf_counter()
    yield
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start


def timings(seconds: dict[str, float]) -> str:
    """Say where the time went.

    Args:
        seconds: Time by phase.

    Returns:
        One line.
    """
    phases = ", ".join(f"{phase} {time:.1f}" for phase, time in seconds.items())
    return f"seconds: {phases}; together {sum(seconds.values()):.1f}"


@dataclass
class Record:
    """A run on its way.

    Attributes:
        folder: Its folder.
        results: What `results.json` is going to hold beside settings, environment and times.
        seconds: Time by phase.
    """

    folder: Path
    results: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def timed(self, phase: str) -> AbstractContextManager[None]:
        """Add the time that a block takes to a phase."""
        return timed(self.seconds, phase)


@contextmanager
def recorded(settings: Any, device: torch.device, *packages: str) -> Iterator[Record]:
    """Make a folder for a run, say where it runs, and write its figures when it is over.

    Args:
        settings: The settings, a dataclass with the parent folder as its `output`.
        device: What it runs on.
        *packages: Further packages that take part.

    Yields:
        What to fill in; an interrupted or failed run leaves what it has found so far.
    """
    about, record = environment(device, *packages), Record(next_folder(Path(settings.output)))
    where = f"{about['device_name']}, {about['threads']} CPU threads, torch {about['torch']}"
    print(f"{where}; writing to {record.folder}", flush=True)
    try:
        yield record
    finally:
        found = {"settings": asdict(settings), "environment": about, "seconds": record.seconds}
        write_json(record.folder / "results.json", found | record.results)
    print(f"\n{timings(record.seconds)}")
