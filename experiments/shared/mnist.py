"""MNIST as two pairs of tensors, unpacked by torchvision from the files that come with the project.

No network is needed. Every file, packed and unpacked, is held against its SHA-256 sum at each load:
torchvision checks the packed files alone, and those only when it unpacks them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torchvision.datasets import MNIST  # type: ignore[import-untyped]

from . import ranks
from .batches import Split

FOLDER = Path(__file__).parent.parent / "data"
"""What torchvision calls the root: the files are in `MNIST/raw` below it."""

MEAN, STD = 0.1307, 0.3081
"""Of the training set's pixels, scaled to 0..1."""

SHA256 = {
    "train-images-idx3-ubyte.gz": (
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"
    ),
    "train-labels-idx1-ubyte.gz": (
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"
    ),
    "t10k-images-idx3-ubyte.gz": (
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"
    ),
    "t10k-labels-idx1-ubyte.gz": (
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"
    ),
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
PACKED = [name for name in SHA256 if name.endswith(".gz")]
UNPACKED = [name for name in SHA256 if not name.endswith(".gz")]


class DataError(ValueError):
    """A file of the data set is missing or damaged."""


def load(root: Path, device: torch.device) -> tuple[Split, Split]:
    """Load the training and the test set, checked, onto a device.

    Args:
        root: The data folder, which has the packed files in `MNIST/raw`.
        device: Where the tensors go.

    Returns:
        The training and the test split: normalised pixels `[count, 784]`, float32, and digits.

    Raises:
        DataError: A file is missing or damaged; says which and how to get it again.
    """
    with ranks.first_alone(), unpacked(root) as folder:
        train, test = (MNIST(folder, train=part) for part in (True, False))
    return _split(train, device), _split(test, device)


@contextmanager
def unpacked(root: Path) -> Iterator[Path]:
    """Give a data folder whose packed and unpacked files are all there and have the right sums.

    Args:
        root: The data folder, which has the packed files in `MNIST/raw`.

    Yields:
        `root` itself, or where that can't be written a temporary folder that holds the same.

    Raises:
        DataError: A file is missing or damaged; says which and how to get it again.
    """
    raw = _raw(root)
    for name in PACKED:
        _check(raw / name, _packed_again(raw / name))
    if all((raw / name).exists() for name in UNPACKED) or os.access(raw, os.W_OK):
        yield _unpack(root)
        return
    with TemporaryDirectory(prefix="mnist-") as folder:
        _raw(Path(folder)).mkdir(parents=True)
        for name in PACKED:
            shutil.copyfile(raw / name, _raw(Path(folder)) / name)
        yield _unpack(Path(folder))


def _raw(root: Path) -> Path:
    return root / "MNIST" / "raw"


def _unpack(root: Path) -> Path:
    MNIST(root, download=True)
    for name in UNPACKED:
        _check(_raw(root) / name, "delete it: the next run unpacks it again")
    return root


def _check(path: Path, remedy: str) -> None:
    if not path.is_file():
        raise DataError(f"{path} is missing; {remedy}")
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256[path.name]:
        raise DataError(f"{path} is damaged: its SHA-256 sum is not MNIST's; {remedy}")


def _packed_again(path: Path) -> str:
    if path.is_relative_to(FOLDER):
        return f"get it again with: git checkout -- {os.path.relpath(path)}"
    return f"copy it again from {os.path.relpath(_raw(FOLDER) / path.name)}"


def _split(dataset: MNIST, device: torch.device) -> Split:
    pixels = dataset.data.to(device).flatten(1).float()
    return Split(pixels.div_(255).sub_(MEAN).div_(STD), dataset.targets.to(device))
