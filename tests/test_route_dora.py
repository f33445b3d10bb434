"""DoRA where each row of a batch has its own: lengths and pairs by row, in one pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 as everybody calls it

from lora_param import (
    LoRAError,
    groups,
    lora_parameters,
    lora_routed,
    lora_selected,
    register_lora,
)
from lora_param.deltas import dora as kind

from .activation_cases import WEIGHT_SPACE
from .cases import CASES, Case, shake
from .test_route import build, check_against_one_by_one, close
from .test_route_around import newer

CASE = {case.id: case for case in CASES}
ONE_WEIGHT = [c for c in CASES if c.id not in WEIGHT_SPACE and c.names == ("weight",)]
ENTRIES = ["b", None, "a", "b", "c", None]


@pytest.fixture
def no_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing run by groups of rows."""

    def fail(*args: Any) -> None:
        raise AssertionError("runs by groups")

    monkeypatch.setattr(groups, "run_by_groups", fail)


@pytest.fixture(params=["formed", "not formed"])
def path(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute lengths of small weights as those of large ones too."""
    if request.param == "not formed":
        monkeypatch.setattr(kind, "SMALL", 0)


def dora(*names: str, make: Any = lambda: nn.Linear(6, 5), **options: Any) -> Any:
    torch.manual_seed(0)
    layer = make().double()
    for index, name in enumerate(names):
        register_lora(layer, rank=1 + index, adapter=name, kind="dora", **options)
    shake(layer)
    return layer


@pytest.mark.parametrize("case", ONE_WEIGHT, ids=lambda case: case.id)
@pytest.mark.usefixtures("no_groups", "path")
def test_rows_of_several_are_computed_at_once(case: Case) -> None:
    layer, inputs = build(case, "dora", "dora olora rslora", "dora")
    check_against_one_by_one(layer, case, inputs, ENTRIES, True)


def test_padding_gives_a_length_no_gradient() -> None:
    layer = dora("a", "b", make=lambda: nn.Embedding(7, 5, padding_idx=2), target="weight")
    layer.parametrizations.weight.original.detach()[2] = 1.0  # as a checkpoint may have it
    tokens = torch.tensor([[2, 1, 2], [2, 2, 2]])
    case = Case("", lambda: layer, lambda: (tokens,))
    check_against_one_by_one(layer, case, (tokens,), ["a", "b"], True)
    assert not layer.parametrizations.weight[1].magnitude.grad.any()


@pytest.mark.usefixtures("no_groups")
def test_a_lora_on_other_rows_or_behind_it_is_computed_with_it() -> None:
    layer, inputs = build(CASE["linear"], "lora", "dora", "lora")
    entries: list[Any] = ["a", "b", {"b": 1.0, "c": -1.5}, {"a": 0.5, "c": 2.0}, None, "c"]
    check_against_one_by_one(layer, CASE["linear"], inputs, entries, True)


@pytest.mark.parametrize("kinds", [("dora", "dora", "lora"), ("lora", "dora", "dense")])
@pytest.mark.usefixtures("path")
def test_rows_that_have_another_in_front_go_by_groups(kinds: Any) -> None:
    layer, inputs = build(CASE["linear"], *kinds)
    entries: list[Any] = [{"a": 1.0, "b": 1.0}, "b", {"a": 1.0, "b": 1.0, "c": 1.0}, None, "a", "c"]
    check_against_one_by_one(layer, CASE["linear"], inputs, entries, True)


@pytest.mark.usefixtures("no_groups")
def test_blocks_of_one_adapter_are_computed_at_once() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 9).double(), torch.randn(6, 6).double()
    for name, target in (
        ("a", ["weight[0:3]", "weight[6:9]"]),
        ("b", "weight"),
        ("c", "weight[1:8:2]"),
    ):
        register_lora(layer, target=target, rank=2, adapter=name, kind="dora")  # fmt: skip
    register_lora(layer, rank=2, adapter="behind")
    shake(layer)
    case = Case("", lambda: layer, lambda: (x,))
    check_against_one_by_one(layer, case, (x,), ENTRIES, True)
    check_against_one_by_one(layer, case, (x,), [{"a": 1.0, "behind": 0.5}, *ENTRIES[:5]], True)
    with lora_routed(layer, ENTRIES):
        assert torch.equal(layer(x)[2, 3:6], nn.Linear.forward(off(layer), x)[2, 3:6])


def off(layer: nn.Linear) -> Any:
    """Return the layer without its adapters, with the same tensors."""
    plain: Any = nn.Linear(layer.in_features, layer.out_features)
    plain.weight, plain.bias = layer.parametrizations.weight.original, layer.bias  # type: ignore[union-attr]
    return plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("no_groups", "path")
def test_rows_of_the_base_and_of_a_fresh_one_keep_its_bits(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(33, 40), nn.Linear(40, 24)).to(dtype)
    x = torch.randn(6, 7, 33).to(dtype)
    for name in ("fresh", "fresh too"):
        register_lora(model, rank=2, adapter=name, kind="dora")
    register_lora(model, target="1", rank=2, adapter="second", kind="dora")
    shake(model, "second")
    with lora_selected(model, None):
        want, inner = model(x), model[0](x)
    with lora_routed(model, [None, "fresh", "second", "fresh too", None, "second"]):
        got = model(x)
        assert torch.equal(model[0](x), inner)
    assert torch.equal(got[[0, 1, 3, 4]], want[[0, 1, 3, 4]])
    assert not torch.isclose(got[[2, 5]], want[[2, 5]]).all(-1).any()


@pytest.mark.usefixtures("no_groups")
def test_each_row_drops_as_its_adapter_does() -> None:
    layer = dora("a", "b")
    register_lora(layer, rank=2, adapter="c", kind="dora", dropout=0.5)
    shake(layer)
    x = torch.randn(4, 3, 6).double()
    torch.manual_seed(0)
    with lora_routed(layer, ["c", "a", None, "c"], dim=0):
        got = layer.train()(x)
    torch.manual_seed(0)
    dropped = F.dropout(x.flatten(0, 1), 0.5).view_as(x)
    base = off(layer)
    for row, name in enumerate(["c", "a", None, "c"]):
        with lora_selected(layer, name):
            change = layer.eval().weight - base.weight
            close(got[row], base(x[row]) + F.linear((dropped if name == "c" else x)[row], change))


def test_dropout_acts_where_rows_go_by_groups() -> None:
    layer, x = dora("a"), torch.randn(2, 6).double()
    register_lora(layer, adapter="b", rank=2, kind="dora", dropout=0.5)
    shake(layer)
    entries: list[Any] = [{"a": 1.0, "b": 1.0}, None]
    with lora_routed(layer, entries):
        assert not torch.equal(layer(x)[0], layer(x)[0])
        assert torch.equal(layer(x)[1], layer(x)[1])


def test_nothing_of_the_weights_size_is_kept() -> None:
    layer = dora("a", "b", "c", make=lambda: nn.Linear(300, 400))
    x, sizes = torch.randn(6, 300).double(), list[int]()
    own = off(layer).weight.data_ptr()

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() != own:  # the input's gradient needs that itself
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):  # noqa: SIM117
        with lora_routed(layer, ENTRIES):
            layer(x)
    assert max(sizes) <= 6 * 400  # as many as outputs, of all ranks together


def test_lengths_of_inputs_go_by_groups() -> None:
    layer = dora("a", "b", make=lambda: nn.Conv2d(4, 5, 3))
    for delta in layer.parametrizations.weight:  # as older releases of LyCORIS have them
        delta.magnitude = nn.Parameter(torch.rand(1, 4, 1, 1).double() + 1)
    x = torch.randn(6, 4, 6, 6).double()
    case = Case("", lambda: layer, lambda: (x,))
    check_against_one_by_one(layer, case, (x,), ["a", "b", None, "a", "b", "b"], True)


@pytest.mark.parametrize("learned", [False, True])
def test_no_strength_but_one_and_none_can_be_had(learned: bool) -> None:
    layer, x = dora("a", "b"), torch.randn(3, 6).double()
    weights = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], requires_grad=learned)
    if learned:
        with pytest.raises(
            LoRAError, match="weight: strengths of a dora delta, of adapter 'a', can"
        ):
            lora_routed(layer, weights, names=["a", "b"]).__enter__()
        return
    with lora_routed(layer, weights, names=["a", "b"]):
        got = layer(x)
    with lora_routed(layer, ["a", "b", None]):
        assert torch.equal(got, layer(x))
    with pytest.raises(LoRAError, match=r"weight: adapter 'a': a strength must be 1, .* got 0\.5"):
        lora_routed(layer, [{"a": 0.5}, None]).__enter__()


@newer
def test_compiled_code_stays_the_same_when_the_rows_change() -> None:
    layer, x, graphs = dora("a", "b"), torch.randn(3, 6).double(), []
    compiled = torch.compile(
        layer, backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True
    )
    for entries in (["a", "b", None], [None, "a", "a"], ["b", "b", "a"]):
        with lora_routed(layer, entries, names=["a", "b"]):
            close(compiled(x), layer(x))
    assert len(graphs) == 1


@newer
@pytest.mark.parametrize("entry", ["b", {"a": 1.0, "b": 1.0}], ids=["apart", "mixed"])
def test_compiled_code_gives_the_same_gradients(entry: Any) -> None:
    layer, x = dora("a", "b"), torch.randn(3, 6).double()
    compiled = torch.compile(layer, backend="aot_eager")
    found = []
    for forward in (compiled, layer):
        layer.zero_grad()
        with lora_routed(layer, ["a", entry, None]):
            forward(x).square().sum().backward()
        found.append([each.grad for each in lora_parameters(layer)])
    for got, want in zip(*found, strict=True):
        close(got, want)


def test_autocast_keeps_lengths_in_float32() -> None:
    layer = dora("a", "b", make=lambda: nn.Linear(64, 48)).float()
    x, rows = torch.randn(3, 5, 64), ["a", None, "b"]
    with torch.autocast("cpu", torch.bfloat16), lora_routed(layer, rows, dim=0):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    with lora_routed(layer, rows, dim=0):
        torch.testing.assert_close(y.float(), layer(x), rtol=0.1, atol=0.1)
    assert len(list(lora_parameters(layer))) == 6
