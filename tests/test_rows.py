"""How rows are named: in a pattern's end, as a slice, as numbers, by a function; and refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_param import LoRAError, register_lora, remove_lora
from lora_param.rows import Rows

numbers = st.integers(1, 40).flatmap(
    lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), min_size=1))
)


@given(numbers)
def test_rows_are_what_was_given_in_order_and_their_text_says_them(given: Any) -> None:
    features, rows = given
    found = Rows.of(rows, features)
    assert [*found] == sorted(rows)
    assert Rows.of(str(found), features) == found


@given(numbers, st.integers(0, 1))
def test_taking_and_putting_are_indexing(given: Any, dim: int) -> None:
    features, rows = given
    found, index = Rows.of(rows, features), sorted(rows)
    matrix = torch.arange(3.0 * features).view(features, 3)
    tensor = matrix if dim == 0 else matrix.T
    assert torch.equal(found.take(tensor, dim), tensor.index_select(dim, torch.tensor(index)))
    changed = found.put(tensor, -found.take(tensor, dim), dim)
    expected = matrix.clone()
    expected[index] *= -1
    assert torch.equal(changed, expected if dim == 0 else expected.T)


@given(numbers, st.data())
def test_rows_overlap_if_they_have_one_in_common(given: Any, data: st.DataObject) -> None:
    features, rows = given
    others = data.draw(st.sets(st.integers(0, features - 1), min_size=1))
    assert Rows.of(rows, features).overlaps(Rows.of(others, features)) == bool(rows & others)


def heads(features: int) -> Any:
    """Give the rows of every head's queries: 2 of 6."""
    return torch.arange(features).view(-1, 6)[:, :2].flatten()


SAID: dict[str, tuple[Any, str]] = {
    "a range": ("qkv[0:6]", "0:6"),
    "from the start": ("qkv[:6]", "0:6"),
    "to the end": ("qkv[12:]", "12:18"),
    "from the end": ("qkv[-6:]", "12:18"),
    "all": ("qkv[:]", "0:18"),
    "a step": ("qkv[0:18:3]", "0:18:3"),
    "a step of one": ("qkv[0:6:1]", "0:6"),
    "heads": ("qkv[0::6+2]", "0:18:6+2"),
    "the last of heads": ("qkv[4::6+2]", "4:18:6+2"),
    "two ranges": ("qkv[12:18,0:6]", "0:6,12:18"),
    "neighbours": ("qkv[0:6,6:12]", "0:12"),
    "a full name": ("attn.qkv.weight[0:6]", "0:6"),
    "a glob": ("*.q[a-k]v[0:6]", "0:6"),
    "a slice": (("qkv", slice(0, 6)), "0:6"),
    "a slice with a step": (("qkv", slice(1, None, 3)), "1:18:3"),
    "numbers": (("qkv", [5, 4, 3]), "3:6"),
    "a tensor": (("qkv", torch.tensor([0, 17])), "0:18:17"),
    "a function": (("qkv", heads), "0:18:6+2"),
    "a type": ((nn.Linear, "0:6"), "0:6"),
    "a predicate": ((lambda path, module: path == "attn.qkv", slice(6)), "0:6"),
    "the same twice": ("qkv[0:6]", "0:6"),
}


def model() -> nn.ModuleDict:
    return nn.ModuleDict({"attn": nn.ModuleDict({"qkv": nn.Linear(4, 18)})})


@pytest.mark.parametrize(("said", "rows"), SAID.values(), ids=SAID)
def test_rows_can_be_said_in_many_ways(said: Any, rows: str) -> None:
    assert register_lora(model(), rank=1, target=[said]) == [f"attn.qkv.weight[{rows}]"]


def test_blocks_are_named_in_model_order() -> None:
    net = nn.ModuleDict({"a": Conv1D(6, 4), "b": nn.Linear(4, 6)})
    target = ["b[2:4]", "*[4:6]", "a[:2]"]
    names = ["a.weight[0:2]", "a.weight[4:6]", "b.weight[2:4]", "b.weight[4:6]"]
    assert register_lora(net, rank=1, target=target) == names


def test_any_other_bracket_stays_a_globs() -> None:
    net = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)])
    assert register_lora(net, rank=1, target="[02]") == ["0.weight", "2.weight"]


def test_a_name_that_looks_like_rows_is_a_name() -> None:
    net = nn.ModuleDict({"a[0:2]": nn.Linear(4, 4)})
    assert register_lora(net, rank=1, target="a[0:2]") == ["a[0:2].weight"]


REFUSED: dict[str, tuple[Any, str]] = {
    "past the end": ("qkv[12:19]", r"attn.qkv.weight: rows [12:19] must lie within 0:18"),
    "before the start": ("qkv[-19:]", "must lie within 0:18"),
    "none": ("qkv[6:6]", "attn.qkv.weight: rows [6:6] are none"),
    "backwards": ("qkv[6:0]", "rows [6:0] are none"),
    "no numbers": ("qkv[a:b]", "rows are start:stop, start:stop:step or start:stop:step+width"),
    "a step of zero": ("qkv[0:6:0]", "rows are start:stop"),
    "wider than a step": ("qkv[0:6:2+3]", "rows are start:stop"),
    "half a head": ("qkv[0:13:6+2]", "rows [0:13:6+2] end within 2 that belong together"),
    "a row twice": ("qkv[0:6,5:9]", "rows [0:6,5:9] name a row twice"),
    "a number past the end": (("qkv", [18]), "rows [18] must lie within 0:18, got 18 to 18"),
    "floats": (("qkv", [0.5]), "must be integers, got 0.5"),
    "bools": (("qkv", lambda n: [True]), "must be integers, got True"),
    "no iterable": (("qkv", lambda n: n), "a function takes how many rows there are"),
    "a number": (("qkv", 3), 'target "qkv": rows must be text, a slice, numbers or a function'),
    "no such weight": ("kv[0:6]", 'target "kv" matches no weight'),
}  # fmt: skip


@pytest.mark.parametrize(("said", "message"), REFUSED.values(), ids=REFUSED)
def test_rows_that_can_not_be_are_refused_with_the_reason(said: Any, message: str) -> None:
    net = model()
    with pytest.raises(LoRAError, match=re.escape(message)):
        register_lora(net, rank=1, target=[said])
    assert type(net["attn"]["qkv"]) is nn.Linear


OVERLAPPING: dict[str, tuple[list[str], str]] = {
    "two blocks": (["qkv[0:6]", "qkv[5:9]"], r"attn\.qkv\.weight\[0:6\]: attn\.qkv\.weight\[5:9\] overlaps it"),
    "interleaved": (["qkv[0::3]", "qkv[3:5]"], "overlaps it, and an adapter changes a row once"),
    "a block and all": (["qkv", "qkv[0:6]"], r"attn\.qkv\.weight: attn\.qkv\.weight\[0:6\] overlaps it"),
}  # fmt: skip


@pytest.mark.parametrize(("target", "message"), OVERLAPPING.values(), ids=OVERLAPPING)
def test_blocks_of_one_adapter_that_overlap_are_refused(target: list[str], message: str) -> None:
    with pytest.raises(LoRAError, match=message):
        register_lora(model(), rank=1, target=target)


def test_a_later_block_of_the_adapter_must_not_overlap_either() -> None:
    net = model()
    register_lora(net, rank=1, target="qkv[0:6]")
    with pytest.raises(LoRAError, match=r'\[3:9\]: there is an adapter "default" on this weight'):
        register_lora(net, rank=1, target="qkv[3:9]")
    register_lora(net, rank=1, target="qkv[3:9]", adapter="other")
    remove_lora(net)
    assert type(net["attn"]["qkv"]) is nn.Linear


@pytest.mark.parametrize("option", ["exclude", "train"])
def test_only_target_names_blocks(option: str) -> None:
    with pytest.raises(LoRAError, match=f'{option} "qkv" can\'t have rows; only target names'):
        register_lora(model(), rank=1, **{option: "qkv[0:6]"})


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.ConvTranspose2d(4, 6, 3, groups=2), "in groups, its output features are no rows"),
        (nn.LazyLinear(4), "it is lazy and has no shape yet"),
    ],
)
def test_a_tensor_without_such_rows_is_refused(layer: nn.Module, message: str) -> None:
    with pytest.raises(LoRAError, match=message):
        register_lora(layer, rank=1, target="weight[0:2]")


@pytest.mark.parametrize(("is_transposed", "shape"), [(False, (2, 4, 1)), (True, (2, 6, 1))])
def test_a_stacks_rows_are_each_matrixs_output_features(
    is_transposed: bool, shape: tuple[int, ...]
) -> None:
    net = nn.Module()
    net.experts, net.is_transposed = nn.Parameter(torch.randn(2, 6, 8)), is_transposed
    [name] = register_lora(net, rank=1, target="experts[:4]")
    assert name == "experts[0:4]"
    [delta] = net.parametrizations["experts"]
    assert delta.lora_B.shape == shape
