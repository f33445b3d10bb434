"""Which weights a target names, and what happens when it names none."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_param import TargetError, lora_summary, register_lora


class Gate(nn.Module):
    """A module that no table lists: two matrices, a vector, a table of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.randn(4, 3))
        self.values = nn.Parameter(torch.randn(2, 4, 3))
        self.gain = nn.Parameter(torch.ones(4))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(4, 4), "norm": nn.LayerNorm(4)}) for _ in range(2)
        )
        self.gate = Gate()
        self.attention = nn.MultiheadAttention(4, 2)
        self.head = nn.Linear(4, 9)


Q = ["layers.0.q_proj.weight", "layers.1.q_proj.weight"]
ATTENTION = ["attention.in_proj_weight", "attention.out_proj.weight"]
GATE = ["gate.keys", "gate.values"]
HEAD = ["head.weight"]


def show(given: Any) -> str:
    """Say what was given as a test's id, the same in every run."""
    return re.sub(" at 0x[0-9a-f]+", "", str(given))[:60]


FOUND: list[tuple[Any, list[str]]] = [
    (None, Q + ATTENTION + HEAD),
    ("layers.0.q_proj.weight", Q[:1]),
    ("layers.0.q_proj", Q[:1]),
    ("q_proj", Q),
    ("q_proj.weight", Q),
    ("layers.*.q_proj", Q),
    ("layers.[1].q_proj", Q[1:]),
    ("q_*", Q),
    ("q_pr?j.weight", Q),
    ("layers.*", Q),
    ("layers.0.*", Q[:1]),
    ("attention", ATTENTION),
    ("attention.*", ATTENTION),
    ("in_proj_weight", ATTENTION[:1]),
    ("out_proj", ATTENTION[1:]),
    ("embed", ["embed.weight"]),
    ("*.weight", ["embed.weight", *Q, ATTENTION[1], *HEAD]),
    ("gate", GATE),
    ("gate.values", GATE[1:]),
    ("keys", GATE[:1]),
    ("*", ["embed.weight", *Q, *GATE, *ATTENTION, *HEAD]),
    (nn.Linear, [*Q, ATTENTION[1], *HEAD]),
    (nn.Embedding, ["embed.weight"]),
    (nn.MultiheadAttention, ATTENTION),
    (Gate, GATE),
    (lambda path, module: path.startswith("layers.1"), Q[1:]),
    (lambda path, module: isinstance(module, Gate), GATE),
    (["q_proj", "head"], Q + HEAD),
    (("head", nn.Embedding, lambda path, module: path == "gate"), ["embed.weight", *GATE, *HEAD]),
    ({"head"}, HEAD),
]


@pytest.mark.parametrize(("target", "names"), FOUND, ids=[show(target) for target, _ in FOUND])
def test_a_target_names(target: Any, names: list[str]) -> None:
    assert register_lora(Net(), rank=1, target=target) == names


EXCLUDED: list[tuple[Any, list[str]]] = [
    ("head", Q + ATTENTION),
    ("layers.*", ATTENTION + HEAD),
    (["head", nn.MultiheadAttention], Q),
    (lambda path, module: "q_proj" in path, ATTENTION + HEAD),
    ("embed", Q + ATTENTION + HEAD),
    ("out_proj", [*Q, ATTENTION[0], *HEAD]),
]


@pytest.mark.parametrize(("exclude", "names"), EXCLUDED, ids=[show(each) for each, _ in EXCLUDED])
def test_exclude_leaves_out(exclude: Any, names: list[str]) -> None:
    assert register_lora(Net(), rank=1, exclude=exclude) == names


UNMATCHED: list[tuple[dict[str, Any], str]] = [
    ({"target": "q_porj"}, '"q_porj" matches no weight; the nearest are "layers.0.q_proj.weight"'),
    ({"target": ["head", "haed"]}, '"haed" matches no weight; the nearest are "head.weight"'),
    ({"target": "layers"}, '"layers" has no weight of its own; for all below it, write "layers.*"'),
    ({"target": "head.bias"}, 'target "head.bias" matches only head.bias: an adapter needs a tensor'),
    ({"target": nn.LayerNorm}, "target LayerNorm matches no weight"),
    ({"target": nn.Conv2d}, "target Conv2d matches no weight"),
    ({"target": lambda path, module: False}, "matches no weight"),
    ({"target": lambda path, module: path.missing}, 'predicate <lambda> failed at "" with AttributeE'),
    ({"target": []}, "target is empty"),
    ({"target": 3}, "target must be a pattern, a module type, a predicate or several"),
    ({"target": [3]}, "a selector must be a pattern, a subclass of torch.nn.Module or a predicate"),
    ({"target": int}, "a selector must be a pattern, a subclass of torch.nn.Module"),
    ({"target": {"head": 1}}, "target must be a pattern, .* got dict"),
    ({"target": nn.Linear(2, 2)}, r"a selector must be a pattern, .* got Linear\(in_features=2"),
    ({"exclude": "haed"}, 'exclude "haed" matches no weight; the nearest are "head.weight"'),
    ({"exclude": "*"}, "exclude leaves nothing to adapt"),
    ({"rank": {"q_proj": 1}}, 'rank: no pattern matches "attention.in_proj_weight"; end .* with "\\*"'),
    ({"rank": {"*": 1, "haed": 1}}, 'rank "haed" matches no weight; the nearest are "head.weight"'),
    ({"rank": {"*": 1, "head": 2}}, 'rank: "head" decides nothing, because earlier patterns match'),
    ({"alpha": {"qproj": 1, "*": 1}}, 'alpha "qproj" matches no weight'),
    ({"rank": {nn.Linear: 1}}, "rank: a pattern must be a string"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"), UNMATCHED, ids=[show(each) for each, _ in UNMATCHED]
)
def test_what_matches_nothing_is_an_error(options: dict[str, Any], message: str) -> None:
    model = Net()
    keys = list(model.state_dict())
    with pytest.raises(TargetError, match=message):
        register_lora(model, **{"rank": 1} | options)
    assert list(model.state_dict()) == keys


def test_a_model_without_a_listed_layer_says_what_there_is() -> None:
    with pytest.raises(TargetError, match=re.escape('for example "keys", "values"')):
        register_lora(Gate(), rank=1)


def test_rank_and_alpha_by_pattern_the_first_that_matches_decides() -> None:
    model = Net()
    register_lora(
        model,
        rank={"q_proj": 3, "*": 1},
        alpha={"layers.1.*": 6, "head": None, "*": 0.5},
    )
    found = {w.name: (w.adapters[0].rank, w.adapters[0].alpha) for w in lora_summary(model).weights}
    assert found == {
        Q[0]: (3, 0.5),
        Q[1]: (3, 6),
        ATTENTION[0]: (1, 0.5),
        ATTENTION[1]: (1, 0.5),
        HEAD[0]: (1, 1),
    }


def test_the_model_itself_may_be_the_layer() -> None:
    assert register_lora(nn.Linear(3, 2), rank=1, target="weight") == ["weight"]


def test_a_stack_of_matrices_has_a_pair_per_slice() -> None:
    gate = Gate()
    register_lora(gate, rank=2, target="values")
    lora = gate.parametrizations["values"][0]
    assert lora.lora_A.shape == (2, 2, 3)
    assert lora.lora_B.shape == (2, 4, 2)


def test_parametrizations_are_not_targets() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    register_lora(model, rank=1)
    with pytest.raises(TargetError, match="matches no weight"):
        register_lora(model, rank=1, target="lora_A", adapter="b")
    assert register_lora(model, rank=1, target="*", adapter="b") == ["0.weight"]


def test_a_module_used_twice_is_adapted_once() -> None:
    shared = nn.Linear(3, 3)
    model = nn.ModuleDict({"a": shared, "b": shared})
    assert register_lora(model, rank=1) == ["a.weight"]
    assert model["b"].weight is not model["b"].parametrizations.weight.original


def tied(first: nn.Module, second: nn.Module) -> nn.ModuleDict:
    second.weight = first.weight
    return nn.ModuleDict({"first": first, "second": second, "other": nn.Linear(4, 4)})


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_by_default_a_head_tied_to_an_embedding_is_left_out_with_a_warning(kind) -> None:
    model = tied(kind(9, 4), nn.Linear(4, 9))
    with pytest.warns(
        UserWarning, match=r"tied to an embedding: second.weight \(is first.weight\)"
    ):
        assert register_lora(model, rank=1) == ["other.weight"]


@pytest.mark.parametrize("target", ["first", "second", ["first", "second"]])
def test_a_named_weight_that_is_shared_is_refused(target: Any) -> None:
    model = tied(nn.Embedding(9, 4), nn.Linear(4, 9))
    with pytest.raises(
        TargetError, match="is the same Parameter, and an adapter here would not act"
    ):
        register_lora(model, rank=1, target=target)


def test_two_linear_layers_that_share_a_weight_are_refused() -> None:
    model = tied(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(TargetError, match=r"first.weight: second.weight is the same Parameter"):
        register_lora(model, rank=1)


def test_a_model_of_tied_weights_only_says_so() -> None:
    model = tied(nn.Embedding(9, 4), nn.Linear(4, 9))
    del model["other"]
    with (
        pytest.warns(UserWarning, match="tied to an embedding"),
        pytest.raises(TargetError, match="every weight is tied to an embedding"),
    ):
        register_lora(model, rank=1)


class Functional(nn.Module):
    """Reads the weight of a layer that it never calls, as torchvision's Swin does."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.qkv.weight, self.qkv.bias)


def test_a_weight_that_is_only_read_acts_too() -> None:
    model, x = Functional(), torch.randn(2, 4)
    before = model(x)
    register_lora(model, rank=2)
    nn.init.normal_(model.qkv.parametrizations.weight[0].lora_B)
    assert not torch.allclose(model(x), before)


def test_a_shared_module_is_found_by_each_of_its_paths() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict(
        {"body": nn.Sequential(shared), "head": nn.Sequential(shared, nn.Linear(4, 4))}
    )
    assert register_lora(model, rank=1, target="head.*", adapter="a") == [
        "body.0.weight",
        "head.1.weight",
    ]
    assert register_lora(model, rank=1, exclude="head.0", adapter="b") == ["head.1.weight"]


def test_attention_finds_its_projection_where_another_module_has_it_too() -> None:
    attention = nn.MultiheadAttention(4, 2)
    model = nn.ModuleDict({"first": attention.out_proj, "then": attention})
    names = register_lora(model, rank=1, target=nn.MultiheadAttention)
    assert names == ["first.weight", "then.in_proj_weight"]


def test_a_name_with_signs_of_a_pattern_in_it_names_itself() -> None:
    model = nn.ModuleDict({"a[0]": nn.Linear(4, 4), "a0": nn.Linear(4, 4)})
    assert register_lora(model, rank=1, target="a[0].weight") == ["a[0].weight"]
    assert register_lora(model, rank=1, target="a[0]", adapter="b") == ["a[0].weight"]


def test_what_is_there_but_has_nothing_to_adapt_is_told_from_a_typing_error() -> None:
    with pytest.raises(TargetError, match='"norm" is a LayerNorm with nothing to adapt'):
        register_lora(Net(), rank=1, target="norm")


def test_a_predicate_that_fails_is_named() -> None:
    def broken(path: str, module: nn.Module) -> bool:
        raise ZeroDivisionError

    with pytest.raises(
        TargetError, match=r'predicate .*broken failed at "" with ZeroDivisionError'
    ):
        register_lora(Net(), rank=1, target=broken)


def test_returned_names_are_targets() -> None:
    first, second = Net(), Net()
    names = register_lora(first, rank=1)
    assert register_lora(second, rank=1, target=names) == names


def test_two_parameters_in_the_same_memory_are_shared() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight.data = model["a"].weight.data
    with pytest.raises(TargetError, match=r"a\.weight: b\.weight has memory in common with it"):
        register_lora(model, rank=1)
