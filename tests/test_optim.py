"""Groups of parameters for an optimizer, and what training with a frozen factor keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_param import (
    LoRAError,
    TargetError,
    lora_parameter_groups,
    lora_parameters,
    named_lora_parameters,
    register_lora,
)

from .cases import adapted


def numbers(model: nn.Module, lr: float = 1.0, **options: Any) -> dict[str, tuple[float, float]]:
    """Return learning rate and weight decay by the parameters' names."""
    groups = lora_parameter_groups(model, lr, **options)
    said = {p: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert sum(len(group["params"]) for group in groups) == len(said)
    return {name: said.pop(p) for name, p in named_lora_parameters(model)}


def test_the_factor_that_makes_the_output_learns_faster() -> None:
    model = nn.Sequential(nn.Linear(6, 5), Conv1D(4, 5), nn.Linear(4, 5))
    register_lora(model, rank=2, target=["0", "1"])
    register_lora(model, rank=2, target="2", init="pissa", adapter="b")
    assert numbers(model, 0.5, ratio=8) == {
        "0.weight.default.lora_A": (0.5, 0.0),
        "0.weight.default.lora_B": (4.0, 0.0),
        "1.weight.default.lora_A": (4.0, 0.0),
        "1.weight.default.lora_B": (0.5, 0.0),
        "2.weight.b.shift_A": (0.5, 0.0),
        "2.weight.b.shift_B": (4.0, 0.0),
    }


def test_lengths_and_vectors_do_not_decay() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    register_lora(model, target="0", rank=2, kind="dora", train="1")
    decays = {name: pair[1] for name, pair in numbers(model, weight_decay=0.1).items()}
    assert decays == {
        "0.weight.default.lora_A": 0.1,
        "0.weight.default.lora_B": 0.1,
        "0.weight.default.magnitude": 0.0,
        "1.weight.default.D": 0.1,
        "1.bias.default.D": 0.0,
    }


def test_the_first_pattern_that_matches_gives_the_factor() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    register_lora(model, rank=1)
    rates = numbers(model, ratio=1, factors={"1": 0.5, "[12]": 0.25})
    assert [rate for rate, _ in rates.values()] == [1, 1, 0.5, 0.5, 0.25, 0.25]
    assert len(lora_parameter_groups(model, 1.0, ratio=1, factors={"*": 3})) == 1
    with pytest.raises(TargetError, match='factors "3" matches no weight'):
        lora_parameter_groups(model, 1.0, factors={"3": 2.0})


def test_one_adapters_parameters_can_be_grouped() -> None:
    layer = nn.Linear(4, 4)
    for name in "ab":
        register_lora(layer, rank=1, adapter=name)
    groups = lora_parameter_groups(layer, 1.0, adapter="b")
    own = list(map(id, lora_parameters(layer, "b")))
    assert [id(each) for group in groups for each in group["params"]] == own


BAD: list[tuple[dict[str, Any], str]] = [
    ({"lr": -1.0}, "lr must be a finite number and at least 0, got -1.0"),
    ({"ratio": 0}, "ratio must be a finite number and positive, got 0"),
    (
        {"weight_decay": float("nan")},
        "weight_decay must be a finite number and at least 0, got nan",
    ),
    ({"factors": {"*": "2"}}, r"factors of '\*' must be a finite number"),
    ({"factors": 2}, "factors must map patterns to numbers, got 2"),
    ({"factors": {0: 2.0}}, "factors must map patterns to numbers, got {0: 2.0}"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[str(options) for options, _ in BAD])
def test_a_bad_number_is_refused(options: dict[str, Any], message: str) -> None:
    layer = adapted(nn.Linear(4, 4))
    with pytest.raises(LoRAError, match=message):
        lora_parameter_groups(layer, **{"lr": 1.0} | options)


def test_an_optimizer_trains_by_them() -> None:
    layer, x = nn.Linear(6, 5), torch.randn(3, 6)
    register_lora(layer, rank=2)
    optimizer = torch.optim.SGD(lora_parameter_groups(layer, 0.1, ratio=4))
    layer(x).square().sum().backward()
    _, B = lora_parameters(layer)
    expected = B.detach() - 0.4 * B.grad
    optimizer.step()
    torch.testing.assert_close(B.detach(), expected)


@pytest.mark.parametrize("options", [{}, {"init": "pissa"}, {"kind": "dora"}], ids=str)
@pytest.mark.parametrize("shape", [(40, 30), (4, 10, 30)], ids=str)
def test_a_frozen_inner_factor_keeps_no_input_for_backward(
    options: dict[str, Any], shape: tuple[int, ...]
) -> None:
    """LoRA-FA."""
    layer, x = nn.Linear(30, 7), torch.randn(shape)
    register_lora(layer, rank=2, **options)
    kept: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    def inputs_kept() -> int:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(x)
        return sum(size[-1] == 30 and torch.Size(size).numel() == 1200 for size in kept)

    assert inputs_kept() == 1
    for name, parameter in named_lora_parameters(layer):
        parameter.requires_grad_(not name.endswith("_A"))
    assert inputs_kept() == 0
    rank = 4 if "init" in options else 2
    assert (40, rank) in kept
    layer(x).square().sum().backward()
    assert [name for name, p in named_lora_parameters(layer) if p.grad is not None] != []
