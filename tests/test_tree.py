"""Adapters that form a tree: language, domain, task, user; each node stands on its parents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_param import (
    lora_parameters,
    lora_routed,
    lora_selected,
    named_lora_parameters,
    register_lora,
    select_lora,
)

LEAVES = {
    "ann": ("french", "law", "summary", "ann"),
    "bob": ("french", "law", "summary", "bob"),
    "translation": ("french", "law", "translation"),
    "chat": ("french", "chat"),
}
"""The paths from the root to four leaves."""

NODES = list(dict.fromkeys(node for path in LEAVES.values() for node in path))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.attention = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        output: Tensor = self.head(self.attention(self.embedding(tokens)))
        return output


def batch(rows: int) -> Tensor:
    return torch.randint(0, 11, (rows, 3))


def grow(model: nn.Module) -> None:
    """Train each node on top of its frozen path, parents first."""
    for node in NODES:
        register_lora(model, rank=2, adapter=node, target=["embedding", "*"])
        path = next(path for path in LEAVES.values() if node in path)
        select_lora(model, path[: path.index(node) + 1], trainable=[node])
        optimizer = torch.optim.AdamW(lora_parameters(model), lr=0.05, weight_decay=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(batch(6)).square().mean().backward()
            optimizer.step()


@pytest.fixture(scope="module")
def tree() -> nn.Module:
    torch.manual_seed(0)
    model = Net().double()
    grow(model)
    return model


def test_training_a_node_moves_nothing_else() -> None:
    torch.manual_seed(0)
    model = Net().double()
    kept: dict[str, Tensor] = {}
    base = {name: p.clone() for name, p in model.named_parameters()}
    for node in NODES:
        register_lora(model, rank=2, adapter=node)
        path = next(path for path in LEAVES.values() if node in path)
        select_lora(model, path[: path.index(node) + 1], trainable=[node])
        before = {n: p.detach().clone() for n, p in named_lora_parameters(model, node)}
        optimizer = torch.optim.AdamW(lora_parameters(model), lr=0.05, weight_decay=0.1)
        for _ in range(2):
            optimizer.zero_grad(set_to_none=False)
            model(batch(6)).square().mean().backward()
            optimizer.step()
        own = dict(named_lora_parameters(model, node))
        assert not any(torch.equal(own[name], before[name]) for name in own if "lora_B" in name)
        kept |= {name: p.detach().clone() for name, p in own.items()}
        now = dict(named_lora_parameters(model))
        assert all(torch.equal(now[name], kept[name]) for name in kept)
    select_lora(model, None)
    linear: Any = model.head
    assert torch.equal(linear.weight, base["head.weight"])


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_leaf_is_the_sum_of_its_path(tree: nn.Module, leaf: str) -> None:
    head: Any = tree.head
    original = head.parametrizations.weight.original
    with torch.no_grad():
        wanted = original.clone()
        for node in LEAVES[leaf]:
            with lora_selected(tree, node):
                wanted += head.weight - original
        with lora_selected(tree, LEAVES[leaf]):
            torch.testing.assert_close(head.weight, wanted, rtol=0, atol=1e-12)
    assert (wanted - original).abs().max() > 1e-3


def test_all_leaves_are_served_in_one_batch(tree: nn.Module) -> None:
    tokens = batch(1).expand(5, 3)
    paths = [*LEAVES.values(), ()]
    with torch.no_grad():
        with lora_routed(tree, [dict.fromkeys(path, 1.0) for path in paths]):
            got = tree(tokens)
        for row, path in enumerate(paths):
            with lora_selected(tree, path):
                want = tree(tokens[row : row + 1])
            torch.testing.assert_close(got[row : row + 1], want, rtol=0, atol=1e-10)
    assert all((got[row] - got[-1]).abs().max() > 1e-3 for row in range(4))
