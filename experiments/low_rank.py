"""Show why low rank is enough: on a small matrix, and in the update of full fine-tuning on MNIST.

Reproduces: a tutorial's 10 x 10 matrix of rank 2, and the paper's hypothesis (arXiv:2106.09685,
    section 4.1) that "the updates to the weights have a low intrinsic rank during adaptation", on
    RichBoyNet: pretrained on all digits, then fine-tuned fully on nines alone.
Command: `python -m experiments.low_rank`
Hardware, time: 2 cores of a shared AMD EPYC; 3 minutes.
Expected: rank 1 keeps 70 to 92 % of the update's energy, and does what all of it does: of 32 wrong
    nines 7 are left, and 6 with the whole. LoRA of every rank from 1 to full leaves 5 to 8.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import lora_param as lp

from .low_rank_picture import draw
from .mnist_network import RichBoyNet
from .shared import mnist
from .shared.batches import Split, shuffled
from .shared.claims import show
from .shared.environment import choose_device
from .shared.runs import recorded
from .shared.scoring import score
from .shared.settings import call, check_options, option
from .shared.tables import aligned
from .shared.training import adam, train


@dataclass(frozen=True)
class Settings:
    """Settings of the experiment.

    Raises:
        ValueError: A value is out of range; says which, the rule and what it got.
    """

    seed: int = option(0, "seed of every draw and of shuffling", least=0)
    digit: int = option(9, "digit to fine-tune on", least=0, most=9)
    train_images: int = option(60_000, "pretrain on the first so many images", most=60_000)
    batch_size: int = option(50, "images in a batch of pretraining")
    batches: int = option(100, "batches of fine-tuning, of ten images")
    full_rate: float = option(1e-4, "Adam's learning rate of full fine-tuning", above=0)
    lora_rate: float = option(1e-3, "Adam's learning rate of LoRA", above=0)
    device: str = option("auto", "cpu, cuda, ...")
    output: str = option("runs/low_rank", "each run writes to a new folder in this one")

    def __post_init__(self) -> None:
        check_options(self)


RANKS = (1, 2, 4, 8, 16, 64, 1000)
"""The last one is full: a weight's rank is at most its smaller side, 784, 1000 and 10 here."""


def factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the best `B` and `A` of a rank for a matrix: what its largest singular values keep."""
    U, S, V = torch.linalg.svd(matrix, full_matrices=False)
    root = S[:rank].sqrt()
    return U[:, :rank] * root, root[:, None] * V[:rank]


def small_matrix() -> None:
    """Walk through a 10 x 10 matrix that has rank 2."""
    print("\n1. A matrix of 10 x 10 that two columns and two rows make.")
    torch.manual_seed(0)
    W = torch.randn(10, 2) @ torch.randn(2, 10)
    x, b = torch.randn(10), torch.randn(10)
    values = torch.linalg.svdvals(W)
    print("singular values:", " ".join(f"{value:.2g}" for value in values.tolist()))
    B, A = factors(W, 2)
    far = float((W @ x + b - (B @ (A @ x) + b)).abs().max())
    print(f"W: {W.numel()} parameters; B {tuple(B.shape)} and A {tuple(A.shape)}:", end=" ")
    print(f"{B.numel() + A.numel()}")
    show(int(torch.linalg.matrix_rank(W)) == 2, "its rank is 2")
    show(far < 1e-5, f"W x + b is B (A x) + b, to {far:.0e}")


def tuned(net: nn.Module, rate: float, nines: Split, settings: Settings) -> nn.Module:
    """Train what requires a gradient on the one digit."""
    parameters = [each for each in net.parameters() if each.requires_grad]
    generator = torch.Generator().manual_seed(settings.seed)
    train(net, adam(parameters, rate), shuffled(nines, 10, generator), settings.batches, "tuning")
    return net


def extracted(base: nn.Module, full: nn.Module, rank: int) -> nn.Module:
    """Return the base with full fine-tuning's update as an adapter: cut to a rank, biases whole."""
    net = copy.deepcopy(base)
    lp.extract_lora(net, full, rank=rank)
    return net


def wrong(net: nn.Module, test: Split, digit: int) -> dict[str, int]:
    """Count what is wrong of the digit and of the others."""
    counts = score(net, test, 1000, "testing").wrong
    return {"digit": counts[digit], "others": sum(counts) - counts[digit]}


def spectra(base: nn.Module, full: nn.Module) -> dict[str, list[float]]:
    """Print what the update of each weight consists of, and return its singular values."""
    print("\n2. The update of full fine-tuning: its energy, the sum of squared singular values.")
    kept = (1, 2, 4, 8)
    rows = [["weight", "shape", "effective rank", *(f"rank {rank} keeps" for rank in kept)]]
    values = {}
    for path, layer in base.named_children():
        dW = full.get_submodule(path).weight - layer.weight  # type: ignore[operator]
        S = torch.linalg.svdvals(dW.detach().double())
        share = S.square() / S.square().sum()
        # The number of equal singular values that would have the same entropy.
        effective = float(torch.special.entr(share).sum().exp())
        sums = [f"{float(share[:rank].sum()):.1%}" for rank in kept]
        rows.append([path, f"{dW.shape[0]} x {dW.shape[1]}", f"{effective:.1f}", *sums])
        values[path] = S.tolist()
    print(aligned(rows))
    return values


def run(settings: Settings) -> None:
    """Run both parts, print and draw what came out."""
    device = choose_device(settings.device)
    torch.set_flush_denormal(True)
    with recorded(settings, device) as record:
        small_matrix()
        images, test = mnist.load(mnist.FOLDER, device)
        torch.manual_seed(settings.seed)
        base = RichBoyNet().to(device)
        with record.timed("pretraining"):
            used = images.pick(slice(settings.train_images))
            batches = shuffled(used, settings.batch_size, torch.Generator().manual_seed(0))
            count = math.ceil(len(used.labels) / settings.batch_size)
            train(base, adam(base.parameters(), 1e-3), batches, count, "pretraining")
        nines = images.pick(images.labels == settings.digit)
        found = {"pretrained": wrong(base, test, settings.digit)}
        with record.timed("fine-tuning"):
            full = tuned(copy.deepcopy(base), settings.full_rate, nines, settings)
            found["full"] = wrong(full, test, settings.digit)
            values = spectra(base, full)
            for rank in RANKS:
                cut = extracted(base, full, rank)
                found[f"full, cut to {rank}"] = wrong(cut, test, settings.digit)
                lora = copy.deepcopy(base)
                lp.register_lora(lora, rank=rank, alpha=1, train="*.bias")
                tuned(lora, settings.lora_rate, nines, settings)
                found[f"LoRA, {rank}"] = wrong(lora, test, settings.digit)
        print(f"\n3. Wrong of the {settings.digit}s, and of the other digits.")
        print(
            aligned(
                [["", "wrong", "others"], *([k, *map(str, v.values())] for k, v in found.items())]
            )
        )
        show(
            found[f"full, cut to {RANKS[-1]}"] == found["full"],
            "cut at full rank, all of it is kept",
        )
        record.results |= {"wrong": found, "singular values": values}
        draw(values, found, RANKS, record.folder / "low_rank.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line, whose arguments are `argv`; return the exit status."""
    return call(run, Settings, argv, "experiments.low_rank", __doc__)


if __name__ == "__main__":
    sys.exit(main())
