"""Build LoRA by hand, as the tutorials do, and show that the library is the same.

Reproduces: what "LoRA from scratch" tutorials build in plain torch: a parametrization
    (github.com/hkproj/pytorch-lora), a layer with rank, alpha, dropout and a merge switch, and
    attention with LoRA on q, k and v; with the counts that they state.
Command: `python -m experiments.from_scratch`
Hardware, time: any; 2 to 4 s.
Expected: equal to the bit where the weight is formed as by hand; within 1e-6 where the library adds
    the update to the layer's output, which is the same sum in another order.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

import lora_param as lp

from .by_hand import Attention, ByHand, LoRALinear, pairs, steps
from .shared.claims import same_bits, show
from .shared.plots import draw_matrices
from .shared.runs import recorded
from .shared.settings import call, check_options, option
from .shared.tables import aligned, numbers


@dataclass(frozen=True)
class Settings:
    """Settings of the walk."""

    seed: int = option(0, "seed of every draw", least=0)
    output: str = option("runs/from_scratch", "each run writes to a new folder in this one")

    def __post_init__(self) -> None:
        check_options(self)


def copy_factors(source: nn.Module, target: nn.Module) -> None:
    """Give the library's pairs the start of those by hand, in order."""
    with torch.no_grad():
        for mine, theirs in zip(pairs(source), lp.lora_parameters(target), strict=True):
            theirs.copy_(mine)


def one_weight() -> dict[str, Tensor]:
    """Walk through one weight of 4 x 3, as numbers."""
    print("\n1. One weight. A and B of rank 1 say 4 + 3 numbers; B A has all 12.")
    W, A = torch.randn(4, 3), torch.randn(1, 3)
    B = torch.tensor([[1.0], [0.0], [-1.0], [0.5]])
    parts = {"W": W, "B": B, "A": A, "B A": B @ A, "W + B A": W + B @ A}
    for name, part in parts.items():
        print(f"\n{name}, {part.shape[0]} x {part.shape[1]}\n{numbers(part)}")
    print("\nEach row of B A is A times a number: row 2 of W stays, row 3 has A taken away.")
    show(int(torch.linalg.matrix_rank(B @ A)) == 1, "B A has rank 1")
    return parts


def why_zero(x: Tensor, y: Tensor) -> None:
    """Show what the first step sees, for each way to start."""
    print("\n2. Why B starts at zero: the output is the base's, and yet the first step moves.")
    rows = [["A", "B", "output moved by", "|gradient of A|", "|gradient of B|"]]
    W, A, B = torch.randn(4, 3), torch.randn(1, 3), torch.randn(4, 1)
    for names in (("random", "zero"), ("zero", "zero"), ("random", "random")):
        starts = [each * (name == "random") for each, name in zip((A, B), names, strict=True)]
        inner, outer = (each.clone().requires_grad_() for each in starts)
        out = x @ (W + outer @ inner).T
        grads = torch.autograd.grad((out - y).square().mean(), (inner, outer))
        moved = (out - x @ W.T).detach().abs().max()
        rows.append([*names, *(f"{float(f):.3f}" for f in (moved, *(g.norm() for g in grads)))])
    print(aligned(rows))
    print("Both at zero never move: A's gradient has the factor B, and B's has the factor A.")

    print("\n3. What alpha / rank does: the size of the update after one step of Adam at 0.01.")
    rows = [["rank", "scale 1", "scale 16 / rank"]]
    for rank in (1, 4, 16, 64):
        sizes = []
        for alpha in (rank, 16):
            layer = nn.Linear(256, 256, bias=False)
            lp.register_lora(layer, rank=rank, alpha=alpha)
            before = layer.weight.detach()
            optimizer = torch.optim.Adam(lp.lora_parameters(layer), lr=0.01)
            layer(torch.randn(64, 256)).square().mean().backward()
            optimizer.step()
            sizes.append(f"{float((layer.weight.detach() - before).norm() / before.norm()):.4f}")
        rows.append([str(rank), *sizes])
    print(aligned(rows))
    print("Without it a higher rank takes longer steps; with it a rate that suits one rank is not")
    print("too high for a higher one.")


def equal_after_training(x: Tensor, y: Tensor) -> dict[str, float]:
    """Train by hand and by the library from the same start, and compare."""
    print("\n4. By hand and by the library: ten steps of Adam from the same start.")
    base, far = nn.Linear(3, 4), {}
    hand, ours, calls = (copy.deepcopy(base) for _ in range(3))
    register_parametrization(hand, "weight", ByHand(4, 3, rank=2, alpha=4))
    register_parametrization(ours, "weight", lp.LoRAParametrization(4, 3, rank=2, alpha=4))
    lp.register_lora(calls, rank=2, alpha=4)
    copy_factors(hand, ours)
    copy_factors(hand, calls)
    outputs = [steps(each, pairs(each), x, y) for each in (hand, ours, calls)]
    show(torch.equal(*outputs[:2]), "LoRAParametrization, registered by torch: equal to the bit")
    far["register_lora"] = float((outputs[0] - outputs[2]).abs().max())
    wrapped, adapted = (copy.deepcopy(nn.Sequential(base)) for _ in range(2))
    wrapped[0] = LoRALinear(wrapped[0], rank=2, alpha=4, dropout=0.5)  # type: ignore[arg-type]
    lp.register_lora(adapted, rank=2, alpha=4, dropout=0.5)
    copy_factors(wrapped, adapted)
    got = [steps(each.train(), pairs(each), x, y) for each in (wrapped, adapted)]
    far["LoRALinear with dropout"] = float((got[0] - got[1]).abs().max())
    head = Attention(16)
    heads = [copy.deepcopy(head), copy.deepcopy(head)]
    for name in "qkv":
        setattr(heads[0], name, LoRALinear(getattr(head, name), rank=2, alpha=2))
    lp.register_lora(heads[1], rank=2, target=["q", "k", "v"])
    copy_factors(*heads)
    x, y = torch.randn(2, 5, 7, 16)
    got = [steps(each, pairs(each), x, y) for each in heads]
    far["attention, q, k and v"] = float((got[0] - got[1]).abs().max())
    for what, difference in far.items():
        show(difference < 1e-6, f"{what}: the greatest difference is {difference:.0e}")
    return far


def merging(x: Tensor) -> dict[str, int]:
    """Merge by hand and by the library, and take it back."""
    print("\n5. Merging: the same output from one plain layer.")
    base = nn.Linear(512, 512)
    hand, ours = LoRALinear(copy.deepcopy(base), rank=4, alpha=8), copy.deepcopy(base)
    lp.register_lora(ours, rank=4, alpha=8)
    nn.init.normal_(hand.lora_B, std=0.01)
    copy_factors(hand, ours)
    before = ours(x)
    hand.switch()
    hand.switch()
    creep = int((hand.base.weight != base.weight).sum())
    print(f"by hand, += and then -=: {creep:,} of {base.weight.numel():,} entries have changed")
    with lp.lora_merged(ours):
        show(torch.allclose(ours(x), before, atol=1e-5), "in lora_merged the output is the same")
    original = ours.parametrizations.weight.original  # type: ignore[union-attr]
    show(same_bits(original, base.weight), "behind it each bit of the original is back")  # type: ignore[arg-type]
    lp.merge_lora(ours)
    show(torch.allclose(ours(x), before, atol=1e-5), "after merge_lora the output is the same")
    show(type(ours) is nn.Linear and not pairs(ours), "and the layer is a plain one, with no pair")
    return {"entries changed by += and -=": creep, "of": base.weight.numel()}


def counts() -> dict[str, int]:
    """Count as the tutorials do."""
    print("\n6. Counts.")
    square, wide = nn.Linear(1024, 1024), nn.Linear(5000, 1000, bias=False)
    lp.register_lora(square, rank=4, train="bias")
    lp.register_lora(wide, rank=5)
    found: dict[str, int] = {}
    for what, layer in (("d = 1024, r = 4, bias trained", square), ("1000 x 5000, r = 5", wide)):
        summary = lp.lora_summary(layer)
        full, trained = summary.base_parameters, summary.lora_parameters
        print(f"{what}: {full:,} against {trained:,}, {full / trained:.0f} times fewer")
        found |= {f"{what}: full": full, f"{what}: LoRA": trained}
    expected = [1_049_600, 9_216, 5_000_000, 30_000]
    show(list(found.values()) == expected, "these are the tutorials' numbers")
    return found


def run(settings: Settings) -> None:
    """Walk through all of it."""
    with recorded(settings, torch.device("cpu")) as record, record.timed("all"):
        torch.manual_seed(settings.seed)
        parts = one_weight()
        draw_matrices(parts, record.folder / "from_scratch.png")
        x, y = torch.randn(8, 3), torch.randn(8, 4)
        why_zero(x, y)
        record.results["differences"] = equal_after_training(x, y)
        record.results["merging"] = merging(torch.randn(8, 512))
        record.results["counts"] = counts()


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line, whose arguments are `argv`; return the exit status."""
    return call(run, Settings, argv, "experiments.from_scratch", __doc__)


if __name__ == "__main__":
    sys.exit(main())
