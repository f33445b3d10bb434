"""The MNIST files that come with the project: checked, unpacked without a network, loaded."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import pytest
import torch

from experiments.shared import mnist
from experiments.shared.mnist import PACKED, UNPACKED, DataError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("something wanted the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data folder of its own, nothing unpacked."""
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in PACKED:
        shutil.copyfile(mnist.FOLDER / "MNIST" / "raw" / name, raw / name)
    return tmp_path / "data"


def raw(root: Path, name: str) -> Path:
    return root / "MNIST" / "raw" / name


def damage(path: Path) -> None:
    """Flip one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def test_load_gives_normalised_pixels_and_labels() -> None:
    train, test = mnist.load(mnist.FOLDER, CPU)
    assert train.inputs.shape == (60_000, 784)
    assert test.inputs.shape == (10_000, 784)
    assert train.inputs.mean().item() == pytest.approx(0, abs=1e-3)
    assert train.inputs.std().item() == pytest.approx(1, abs=1e-3)
    assert test.labels.bincount().sum() == 10_000
    assert test.labels.dtype == torch.int64


def test_packed_files_are_unpacked_next_to_them_without_a_network(root: Path) -> None:
    with mnist.unpacked(root) as folder:
        assert folder == root
    assert all(raw(root, name).is_file() for name in UNPACKED)


def test_folder_that_cannot_be_written_is_left_alone(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with mnist.unpacked(root) as folder:
        assert folder != root
        assert all(raw(folder, name).is_file() for name in UNPACKED)
    assert not folder.exists()
    assert sorted(os.listdir(root / "MNIST" / "raw")) == sorted(PACKED)


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("harm", [damage, truncate])
def test_damaged_packed_file_is_named(root: Path, name: str, harm: object) -> None:
    assert callable(harm)
    harm(raw(root, name))
    with pytest.raises(DataError, match=f"{name} is damaged.*copy it again from .*{name}"):
        mnist.load(root, CPU)


def test_missing_packed_file_is_named(root: Path) -> None:
    raw(root, PACKED[1]).unlink()
    with pytest.raises(DataError, match=f"{PACKED[1]} is missing; copy it again from"):
        mnist.load(root, CPU)


def test_projects_own_packed_file_comes_back_by_git(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mnist, "FOLDER", root)
    damage(raw(root, PACKED[0]))
    with pytest.raises(DataError, match=rf"git checkout -- .*MNIST/raw/{PACKED[0]}"):
        mnist.load(root, CPU)


@pytest.mark.parametrize("harm", [damage, truncate])
def test_damaged_unpacked_file_is_named_and_mended_by_deleting_it(root: Path, harm: object) -> None:
    assert callable(harm)
    with mnist.unpacked(root):
        pass
    victim = raw(root, UNPACKED[2])
    harm(victim)
    with pytest.raises(DataError, match=f"{UNPACKED[2]} is damaged.*delete it: the next run"):
        mnist.load(root, CPU)
    victim.unlink()
    _, test = mnist.load(root, CPU)
    assert len(test.labels) == 10_000
