"""Taking denormal numbers for zero makes training faster, and what the experiment claims no weaker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_param as lp
from experiments import mnist_finetune, mnist_source_loop
from experiments.mnist_network import RichBoyNet
from experiments.mnist_report import STATES
from experiments.shared import mnist
from experiments.shared.claims import same_bits
from experiments.shared.environment import flushes_denormals

SHORT = ["--train-images", "1000", "--finetune-batches", "10", "--device", "cpu"]
FLAGS = {"flushed": "--flush-denormal", "kept": "--no-flush-denormal"}
ROOT = Path(__file__).parent.parent

CAN = torch.set_flush_denormal(True)
torch.set_flush_denormal(False)
both = pytest.mark.parametrize("flush", [False, True])
where_possible = pytest.mark.skipif(not CAN, reason="this CPU can't flush denormal numbers")


@pytest.fixture(autouse=True)
def denormals_kept_afterwards() -> Iterator[None]:
    yield
    torch.set_flush_denormal(False)


def denormal(*shape: int) -> torch.Tensor:
    """Make a tensor of the smallest number above zero, whatever the CPU takes it for."""
    return torch.ones(shape, dtype=torch.int32).view(torch.float32)


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    # Numpy 1 warns of processes that flush.
    quiet = ["-W", "ignore:The value of the smallest subnormal:UserWarning"]
    command, one = [sys.executable, *quiet, *arguments], os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=one, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("denormals", FLAGS)
def test_claims_hold_in_a_process_of_either_kind(denormals: str, tmp_path: Path) -> None:
    arguments = [*SHORT, FLAGS[denormals], "--output", str(tmp_path)]
    done = python("-m", "experiments.mnist_finetune", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    expected = denormals if CAN else "kept"
    assert f"denormal numbers {expected};" in done.stdout.split("\n")[0]
    found = json.loads((tmp_path / "001" / "results.json").read_text())
    assert found["environment"]["flush_denormal"] == (expected == "flushed")
    scores = found["runs"][0]["scores"]
    assert scores["LoRA off"] == scores["pretrained"] != scores["LoRA on"] == scores["loaded"]
    assert set(STATES) < set(scores)


@pytest.mark.slow
@where_possible
def test_every_thread_flushes() -> None:
    code = (
        "import torch; from experiments import mnist_finetune as experiment\n"
        "torch.set_num_threads(4)\n"
        "def products(_):\n"
        "    print(torch.full((10**7,), 2.0**-120).mul(2.0**-10).count_nonzero())\n"
        "    raise SystemExit\n"
        "experiment.choose_device = products\n"
        "experiment.main(['{}'])"
    )
    printed = {name: python("-c", code.format(flag)).stdout for name, flag in FLAGS.items()}
    assert printed == {"flushed": "tensor(0)\n", "kept": "tensor(10000000)\n"}


@where_possible
def test_only_the_experiments_side_of_the_comparison_flushes() -> None:
    with mnist.unpacked(mnist.FOLDER) as data:
        mnist_source_loop.source(data)
        assert not flushes_denormals()
        mnist_source_loop.ours(data)
        assert flushes_denormals()


@both
def test_bits_tell_a_denormal_number_from_zero(flush: bool) -> None:
    torch.set_flush_denormal(flush)
    assert same_bits(denormal(3), denormal(3))
    assert not same_bits(denormal(3), torch.zeros(3))


@where_possible
def test_values_do_not_tell_them_apart_where_denormal_numbers_are_flushed() -> None:
    torch.set_flush_denormal(True)
    assert torch.equal(denormal(3), torch.zeros(3))  # why the claims compare bits


def test_fingerprint_of_denormal_numbers_does_not_depend_on_the_setting() -> None:
    layer = torch.nn.Linear(3, 2)
    layer.weight.data = denormal(2, 3)
    digests = lp.fingerprint(layer)
    torch.set_flush_denormal(True)
    assert lp.fingerprint(layer) == digests


@both
def test_adapter_of_denormal_numbers_comes_back_from_its_file(flush: bool, tmp_path: Path) -> None:
    torch.set_flush_denormal(flush)
    net, fresh = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    lp.register_lora(net, rank=1)
    for parameter in lp.lora_parameters(net):
        parameter.data = denormal(*parameter.shape)
    lp.save_lora(net, tmp_path / "adapter.safetensors")
    lp.load_lora(fresh, tmp_path / "adapter.safetensors", base="ignore")
    for parameter in lp.lora_parameters(fresh):
        assert same_bits(parameter, denormal(*parameter.shape))


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "zero to minus zero": torch.neg,
    "zero to denormal": lambda bias: denormal(*bias.shape),
}


@pytest.fixture
def sabotage(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let fine-tuning change a bias that pretraining left at zero."""
    pretrain, finetune = mnist_finetune.pretrain, mnist_finetune.finetune

    def zeroed(net: RichBoyNet, *rest: Any) -> float:
        loss = pretrain(net, *rest)
        net.linear1.bias.data.zero_()
        return loss

    def apply(change: str) -> None:
        def changed(net: RichBoyNet, *rest: Any) -> float:
            net.linear1.bias.data = CHANGES[change](net.linear1.bias.data)
            return finetune(net, *rest)

        monkeypatch.setattr(mnist_finetune, "pretrain", zeroed)
        monkeypatch.setattr(mnist_finetune, "finetune", changed)

    return apply


@pytest.mark.parametrize("flag", FLAGS.values())
@pytest.mark.parametrize("change", CHANGES)
def test_changed_bits_of_equal_value_end_the_run(
    change: str,
    flag: str,
    sabotage: Callable[[str], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sabotage(change)
    assert mnist_finetune.main([*SHORT, flag, "--output", str(tmp_path)]) == 1
    assert "broken claim: linear1.bias is as before" in capsys.readouterr().err


@pytest.mark.parametrize("change", CHANGES)
def test_digests_see_changed_bits_too(
    change: str,
    sabotage: Callable[[str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sabotage(change)
    monkeypatch.setattr(mnist_finetune, "check_network", lambda *_: None)
    assert mnist_finetune.main([*SHORT, "--output", str(tmp_path)]) == 1
    assert "1 of 6 originals changed: linear1.bias" in capsys.readouterr().err
