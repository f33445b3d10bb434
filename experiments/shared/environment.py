"""Where an experiment runs: the device, and what else figures and times depend on."""

from __future__ import annotations

import platform
from contextlib import suppress
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


def flushes_denormals() -> bool:
    """Find out whether the CPU takes denormal numbers, those below 1.2e-38, for zero.

    `torch.set_flush_denormal` sets it, for this thread and those that it starts later; torch can't
    say whether it is set, but one product can.

    Returns:
        Whether it does.
    """
    return torch.full((1,), 2.0**-120).mul(2.0**-10).item() == 0


def environment(device: torch.device, *packages: str) -> dict[str, str | int]:
    """Describe what figures depend on beside the settings.

    Args:
        device: The device that computed them.
        *packages: Further packages that took part; those that aren't installed are left out.

    Returns:
        Device, threads, whether denormal numbers are flushed, and versions.
    """
    found: dict[str, str | int] = {
        "device": str(device),
        "device_name": _name(device),
        "threads": torch.get_num_threads(),
        "flush_denormal": flushes_denormals(),
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
