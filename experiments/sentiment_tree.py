"""Grow a tree of adapters on one base: sentiment, and on top of it a domain, served in one batch.

Reproduces: the picture that tutorials end with, one base and many tasks, on real text: MiniLM and
    the four domains of `shared/sentiment.py`. An adapter "sentiment" learns from all domains; one
    for each domain is trained on top of it, with the one beneath acting and frozen.
Command: `python -m experiments.sentiment_tree`; `--quick` for two domains of 100 sentences.
Needs: `pip install -e ".[sentiment]"` for MiniLM.
Hardware, time: 2 cores of a shared AMD EPYC; 5 minutes, `--quick` 1.
Expected: a domain's on top of the shared one, 0.888 in the mean, is far ahead of a domain's alone,
    0.837, and little ahead of the shared one, 0.873. TIES of the four trained apart, made without
    training, 0.847: ahead of each domain's own in three, level on film.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lora_param as lp

from .sentiment_report import draw_tree, tree_table
from .shared.batches import Split
from .shared.claims import show
from .shared.environment import choose_device
from .shared.minilm import Classifier, encoded_parts, fine_tune
from .shared.runs import recorded
from .shared.scoring import score
from .shared.sentiment import DOMAINS, FOLDER
from .shared.settings import call, check_options, option


@dataclass(frozen=True)
class Settings:
    """Settings of the tree.

    Raises:
        ValueError: A value is out of range; says which, the rule and what it got.
    """

    quick: bool = option(False, "two domains, 100 sentences of each")
    sentences: int = option(500, "training sentences of a domain, at most", least=8)
    test_sentences: int = option(500, "of a domain, at most", least=8)
    epochs: int = option(3, "epochs of training of each adapter")
    rank: int = option(8, "rank of each adapter")
    rate: float = option(6e-4, "AdamW's learning rate", above=0)
    seed: int = option(0, "seed of the heads, the factors and of shuffling", least=0)
    bfloat16: bool = option(True, "train in bfloat16 by autocast; parameters stay in float32")
    device: str = option("auto", "cpu, cuda, ...")
    data: str = option(str(FOLDER), "the folder that has the sentences")
    output: str = option("runs/sentiment_tree", "each run writes to a new folder in this one")

    def __post_init__(self) -> None:
        check_options(self)


Data = dict[str, list[Split]]
"""Test and training sentences by domain."""


def grow(model: Classifier, adapter: str, on: list[str], data: Split, settings: Settings) -> None:
    """Train a new adapter, a head of its own in it, on top of others that act and stay."""
    torch.manual_seed(settings.seed)
    rank = settings.rank
    lp.register_lora(model, rank=rank, alpha=2 * rank, train="head", adapter=adapter)
    lp.select_lora(model, [*on, adapter], trainable=adapter)
    how: Any = {"rate": settings.rate, "epochs": settings.epochs, "seed": settings.seed}
    fine_tune(model, lp.lora_parameters(model, adapter), data, size=16, name=adapter, **how)


def accuracies(model: Classifier, adapters: object, data: Data) -> list[float]:
    """Test one choice of adapters on every domain."""
    with lp.lora_selected(model, adapters):  # type: ignore[arg-type]
        return [score(model, test, 100, "testing").accuracy for test, _ in data.values()]


def tree(base: Classifier, data: Data, settings: Settings) -> Classifier:
    """Grow "sentiment" and a leaf for each domain on top of it, and check what stays."""
    print('\n1. A tree: "sentiment", trained on all domains, and each domain on top of it.')
    model, before = copy.deepcopy(base), lp.fingerprint(base)
    together = Split(*map(torch.cat, zip(*(own for _, own in data.values()), strict=True)))
    grow(model, "sentiment", [], together, settings)
    root = {name: tensor.clone() for name, tensor in lp.lora_state_dict(model).items()}
    for domain, (_, own) in data.items():
        grow(model, domain, ["sentiment"], own, settings)
    now = lp.lora_state_dict(model)
    moved = [name for name, tensor in root.items() if not torch.equal(now[name], tensor)]
    show(not moved, "training the leaves moved nothing of the root, bit for bit")
    lp.assert_frozen(model, before)
    print("  it holds: the base is what it was, by SHA-256 of every parameter and buffer")
    return model


def path_is_a_sum(model: Classifier, domain: str) -> None:
    """Check that a leaf's weight is the base's, and the updates of its path."""
    layer: Any = model.get_submodule("encoder.encoder.layer.0.attention.self.query")
    expected = layer.parametrizations.weight.original
    for entry in layer.parametrizations.weight:
        if entry.adapter in ("sentiment", domain):
            expected = expected + (entry.lora_B @ entry.lora_A) * entry.scale
    with lp.lora_selected(model, ["sentiment", domain]):
        same = torch.equal(layer.weight, expected)
    show(same, f'"sentiment" and "{domain}" read as W + B A * scale of both, to the bit')


def routed(model: Classifier, data: Data) -> list[float]:
    """Send all domains through the model in mixed batches, a row on its own path, and compare."""
    print("\n2. One batch, a path for each row.")
    tests = [test for test, _ in data.values()]
    owners = torch.cat([torch.full_like(test.labels, i) for i, test in enumerate(tests)]).cpu()
    order = torch.randperm(len(owners), generator=torch.Generator().manual_seed(0))
    mixed = Split(*(torch.cat(parts)[order] for parts in zip(*tests, strict=True)))
    owners, names = owners[order], list(data)
    logits, alone = torch.empty(len(owners), 2), torch.empty(len(owners), 2)
    with torch.no_grad():
        for rows in torch.split(torch.arange(len(owners)), 100):
            paths = [{"sentiment": 1.0, names[owner]: 1.0} for owner in owners[rows]]
            with lp.lora_routed(model, paths):
                logits[rows] = model(mixed.inputs[rows]).cpu()
        for owner, domain in enumerate(data):
            with lp.lora_selected(model, ["sentiment", domain]):
                parts = [model(part) for part in torch.split(mixed.inputs[owners == owner], 100)]
            alone[owners == owner] = torch.cat(parts).cpu()
    far = float((logits - alone).abs().max())
    show(far < 1e-4, f"each row has what its path alone gives; at most {far:.0e} apart")
    right = (logits.argmax(1) == mixed.labels.cpu()).float()
    return [float(right[owners == owner].mean()) for owner in range(len(data))]


def to_peft_and_back(model: Classifier, base: Classifier, x: Tensor, folder: Path) -> None:
    """Write an adapter as PEFT's folder, and read it into a fresh model."""
    print("\n4. To PEFT and back.")
    lp.save_lora(model, folder, adapter="sentiment", format="peft")
    fresh = copy.deepcopy(base)
    fresh.autocasts = False
    lp.load_lora(fresh, folder, base="ignore")
    with torch.no_grad(), lp.lora_selected(model, "sentiment"):
        far = float((model(x) - fresh(x)).abs().max())
    show(far < 1e-5, f"head and all, the logits are the same; at most {far:.0e} apart")


def alone(base: Classifier, data: Data, settings: Settings) -> dict[str, list[float]]:
    """Train an adapter for each domain apart from all others, and combine them untrained."""
    print("\n3. A domain's adapter alone, and what all of them make without any training.")
    model = copy.deepcopy(base)
    for domain, (_, own) in data.items():
        grow(model, domain, [], own, settings)
    found = {f"{domain} alone": accuracies(model, domain, data) for domain in data}
    share, whole = (dict.fromkeys(data, strength) for strength in (1 / len(data), 1.0))
    lp.combine_lora(model, share, adapter="mean")
    lp.combine_lora(model, whole, adapter="sum")
    lp.combine_lora(model, whole, adapter="TIES", method="ties", density=0.3)
    for made in ("mean", "sum", "TIES"):
        found[f"{made} of all"] = accuracies(model, made, data)
    return found


def run(settings: Settings) -> None:
    """Grow the tree, serve it, combine adapters; print, write and draw."""
    device, root = choose_device(settings.device), Path(settings.data)
    domains = list(DOMAINS)[: 2 if settings.quick else None]
    sizes = settings.test_sentences, 100 if settings.quick else settings.sentences
    with recorded(settings, device, "transformers") as record:
        data = {name: encoded_parts(name, sizes, root, device) for name in domains}
        base = Classifier(settings.seed, settings.bfloat16).to(device).eval()
        with record.timed("the tree"):
            model = tree(base, data, settings)
            path_is_a_sum(model, domains[0])
            found = {"sentiment": accuracies(model, "sentiment", data)}
        model.autocasts = False  # so that paths can be compared to the last digits
        with record.timed("routing"):
            found["sentiment + its domain's, routed"] = routed(model, data)
        with record.timed("adapters alone"):
            found |= alone(base, data, settings)
        to_peft_and_back(model, base, data[domains[0]][0].inputs[:50], record.folder / "for_peft")
        record.results["accuracy"] = found
        print("", tree_table(found, domains), sep="\n")
        draw_tree(found, domains, record.folder / "sentiment_tree.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line, whose arguments are `argv`; return the exit status."""
    return call(run, Settings, argv, "experiments.sentiment_tree", __doc__)


if __name__ == "__main__":
    sys.exit(main())
