"""Where an experiment runs, how long it takes, and where its results go."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def choose_device(name: str = "auto") -> torch.device:
    """Pick the device to run on, and try it.

    Args:
        name: What `torch.device` takes, or `"auto"`: CUDA, else another accelerator that torch
            reports, else the CPU.

    Returns:
        A device that computes.

    Raises:
        ValueError: This machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else _accelerator() or "cpu"
    try:
        torch.ones(1, device=name).add(1).item()
    except Exception:  # each backend has errors of its own
        there = ", ".join(filter(None, ["cpu", _accelerator()]))
        raise ValueError(f"device {name!r} can't be used; this machine has {there}") from None
    return torch.device(name)


def _accelerator() -> str | None:
    if not torch.accelerator.is_available():
        return None
    return str(torch.accelerator.current_accelerator())


def environment(device: torch.device, *packages: str) -> dict[str, str | int]:
    """Describe what figures depend on beside the settings.

    Args:
        device: The device that computed them.
        *packages: Further packages that took part; those that aren't installed are left out.

    Returns:
        Device, threads and versions.
    """
    found: dict[str, str | int] = {
        "device": str(device),
        "device_name": _name(device),
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for package in ("torchvision", "lora_param", *packages):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


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
