"""The experiment in two processes, as `torchrun` starts them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from experiments.shared import mnist, ranks
from experiments.shared.batches import Split
from experiments.shared.claims import BrokenClaimError
from experiments.shared.training import train
from lora_param import lora_state_dict, register_lora

from .ranks import Ranks


def test_two_processes_run_the_experiment_as_one(tmp_path: Path) -> None:
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in mnist.PACKED:  # which one process unpacks for both
        shutil.copy(mnist.FOLDER / "MNIST" / "raw" / name, raw)
    options = ["--train-images", "200", "--finetune-batches", "3", "--device", "cpu"]
    folders = ["--data", str(tmp_path / "data"), "--output", str(tmp_path / "runs")]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]
    done = subprocess.run(
        [*command, "experiments.mnist_finetune", *options, *folders],
        capture_output=True, text=True, timeout=100, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("LoRA off: the wrong counts are exactly the pretrained network's") == 1
    assert [folder.name for folder in (tmp_path / "runs").iterdir()] == ["001"]
    (run,) = json.loads((tmp_path / "runs" / "001" / "results.json").read_text())["runs"]
    assert run["scores"]["LoRA off"] == run["scores"]["pretrained"]
    assert run["scores"]["LoRA on"] == run["scores"]["loaded"]


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    register_lora(net, rank=2)
    return net


def trained(net: nn.Module) -> float:
    data = torch.Generator().manual_seed(1)
    inputs, labels = torch.randn(5, 4, 6, generator=data), torch.arange(20).view(5, 4) % 3
    batches = (Split(x, y) for x, y in zip(inputs, labels, strict=True))
    factors = [each for each in net.parameters() if each.requires_grad]
    return train(net, torch.optim.SGD(factors, lr=0.5), batches, 5, "training")


def trains_together() -> tuple[float, dict[str, torch.Tensor]]:
    loss = trained(net := network())
    return loss, lora_state_dict(net)


def test_processes_share_out_each_batch(ranks: Ranks) -> None:
    loss, state = trains_together()
    for other_loss, other in ranks(trains_together):
        assert abs(other_loss - loss) < 1e-6
        for name, tensor in other.items():
            torch.testing.assert_close(tensor, state[name])


def finds_a_stray() -> bool:
    net = nn.Linear(2, 2)
    ranks.check_alike(net)
    net.bias.data += torch.distributed.get_rank()
    try:
        ranks.check_alike(net)
    except BrokenClaimError:
        return True
    return False


def test_a_process_that_trains_another_network_is_found(ranks: Ranks) -> None:
    assert ranks(finds_a_stray) == [False, True]
