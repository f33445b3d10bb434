"""Routed batches: mixtures, dropout, dtypes, and where the rows lie."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_param import (
    LoRAError,
    lora_parameters,
    lora_routed,
    lora_selected,
    named_lora_parameters,
    ops,
    register_lora,
    select_lora,
)

from .cases import Case, shake
from .test_activation import Operations
from .test_combine import Largest
from .test_route import NAMES, build, close, linear, one_by_one


@pytest.mark.parametrize("copy_cost", [0, 10**9], ids=["gathered", "joined"])
@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_gathering_and_joining_give_the_same(
    copy_cost: int, repeats: int, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "COPY", copy_cost)
    joined = []
    spy = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *args: joined.append(1) or spy(*args))
    case = Case(
        "", lambda: Conv1D(5, 6) if transposed else nn.Linear(6, 5), lambda: (torch.randn(1, 4, 6),)
    )
    layer, _ = build(case, "lora")
    x = torch.randn(4 * repeats, 3, 6).double()
    entries: list[Any] = ["b", None, "a", "b"]
    with lora_routed(layer, entries, dim=0):
        got = layer(x)
        got.square().sum().backward()
    found = {name: p.grad for name, p in named_lora_parameters(layer)}
    layer.zero_grad()
    want = []
    for row, entry in enumerate(entries):
        with lora_selected(layer, entry):
            want.append(layer(x[row * repeats : (row + 1) * repeats]))
    close(got, torch.cat(want))
    torch.cat(want).square().sum().backward()
    for name, p in named_lora_parameters(layer):
        assert (p.grad is None) == (found[name] is None) == (".c." in name)
        if p.grad is not None:
            close(found[name], p.grad)  # type: ignore[arg-type]
    assert bool(joined) == (copy_cost == 0)


@pytest.mark.parametrize("kind", ["lora", "dense"])
def test_a_mixture_can_be_learned(kind: str) -> None:
    case = Case("", lambda: nn.Linear(6, 5), lambda: (torch.randn(4, 6),))
    layer, (x,) = build(case, kind)
    x = x[:4]
    mixture = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def run(weights: Tensor) -> Tensor:
        with lora_routed(layer, weights, names=NAMES):
            output: Tensor = layer(x)
            return output

    assert torch.autograd.gradcheck(run, mixture)
    want = one_by_one(
        layer, case, (x,), [dict(zip(NAMES, row, strict=True)) for row in mixture.tolist()]
    )
    close(run(mixture), want[0])


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_more_rows_take_no_more_operations(kind: str) -> None:
    layer, counted = linear(kind=kind), []
    for rows in (3, 300):
        layer.zero_grad()  # a first gradient takes other operations than one that is added
        with Operations() as seen, lora_routed(layer, [*NAMES] * (rows // 3)):
            layer(torch.randn(rows, 6).double()).sum().backward()
        counted.append(seen.calls.total())
    assert counted[0] == counted[1] > 10


@pytest.mark.parametrize("copy_cost", [0, 10**9], ids=["gathered", "joined"])
def test_no_result_is_of_the_weights_size(copy_cost: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "COPY", copy_cost)
    layer = nn.Linear(90, 80)
    for name in NAMES:
        register_lora(layer, rank=2, adapter=name)
    with Largest() as seen, lora_routed(layer, NAMES):
        layer(torch.randn(3, 90)).sum().backward()
    assert 3 * 90 <= seen.largest < 80 * 90 / 4


def test_a_learned_strength_of_zero_leaves_an_adapters_statistics_off() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)).double()
    for name, spread in (("a", 1.0), ("b", 3.0)):
        register_lora(model, rank=2, adapter=name, target="0")
        with lora_selected(model, name):
            model(torch.randn(9, 6).double() * spread)
    shake(model.eval())
    x, weights = torch.randn(3, 6).double(), torch.tensor([[1.0, 0], [0, 1], [0, 0]]).double()
    with lora_routed(model, weights.requires_grad_(), names=["a", "b"]):
        got = model(x)
    case = Case("", lambda: model, lambda: (x,))
    close(got, one_by_one(model, case, (x,), [{"a": 1.0}, {"b": 1.0}, {}])[0])


def test_adapters_may_differ_in_rank_dtype_and_alpha() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 5)
    for name, dtype in zip(NAMES, (torch.float32, torch.float64, torch.bfloat16), strict=True):
        register_lora(layer, rank=2, adapter=name, dtype=dtype)
    shake(layer)
    x = torch.randn(3, 6)
    with lora_routed(layer, ["a", "b", "c"]):
        got = layer(x)
    for row, name in enumerate(NAMES):
        with lora_selected(layer, name):
            torch.testing.assert_close(got[row : row + 1], layer(x[row : row + 1]), rtol=0, atol=2e-2 if name == "c" else 1e-5)  # fmt: skip


def test_each_row_drops_with_its_adapters_probability() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(401, 3, bias=False)
    for name, dropout in (("a", 0.0), ("b", 0.75)):
        register_lora(layer, rank=1, adapter=name, dropout=dropout)
    with torch.no_grad():
        layer.parametrizations.weight.original.zero_()  # type: ignore[union-attr]
        for factor in lora_parameters(layer):
            factor.fill_(1.0)
    with lora_routed(layer, ["a", "b", None]):
        got = layer(torch.ones(3, 401))[:, 0].tolist()
    assert (got[0], got[2]) == (401, 0)
    assert got[1] % 4 == 0  # what is kept is multiplied by 4
    assert 200 < got[1] < 600


def test_adapters_that_a_row_mixes_drop_apart_as_they_do_alone() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(401, 1, bias=False)
    for name in ("a", "b"):
        register_lora(layer, rank=1, adapter=name, dropout=0.5)
    with torch.no_grad():
        layer.parametrizations.weight.original.zero_()  # type: ignore[union-attr]
        for factor in lora_parameters(layer):
            factor.fill_(1.0)
    x = torch.ones(2, 401)
    with lora_routed(layer, [{"a": 1.0, "b": -1.0}, None]):
        assert layer(x)[0].item() != 0  # as it is where both drop the same
        layer.eval()
        assert layer(x)[0].item() == 0


@pytest.mark.parametrize("tokens", [1, 200], ids=["joined", "gathered"])
def test_a_low_precision_row_has_no_larger_error_than_alone(tokens: int) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 32, bias=False, dtype=torch.bfloat16)
    for name in NAMES:
        register_lora(layer, rank=1, alpha=0.3, adapter=name, dtype=torch.float32)
    shake(layer)
    layer.parametrizations.weight.original.detach().zero_()  # type: ignore[union-attr]
    x = torch.randn(3, tokens, 64, dtype=torch.bfloat16)
    with lora_routed(layer, NAMES, dim=0):
        routed = layer(x)
    errors = [0.0, 0.0]
    for row, name in enumerate(NAMES):
        with lora_selected(layer, name):
            delta = layer.parametrizations.weight[row]  # type: ignore[index]
            want = x[row].double() @ (delta.lora_B.double() @ delta.lora_A.double() * delta.scale).T
            for which, got in enumerate((routed[row], layer(x[row]))):
                errors[which] += (got - want).detach().square().mean().item()
    assert errors[0] <= 1.05 * errors[1]


def test_what_is_selected_and_what_is_off_makes_no_difference() -> None:
    layer, x = linear(), torch.randn(2, 6).double()
    with lora_routed(layer, ["a", "b"]):
        want = layer(x)
    select_lora(layer, {"c": 3.0})
    with lora_routed(layer, ["a", "b"]):
        assert torch.equal(layer(x), want)


@pytest.mark.parametrize(
    ("shape", "entries", "options", "message"),
    [
        ((3, 6), ["a", "b"], {}, r"model: its input is \(3, 6\), and dimension 0 can't hold 2 rows"),
        ((2, 2, 6), ["a", "b"], {}, "more than one dimension could be that of the 2 rows; say which"),
        ((4, 2, 6), ["a", "b"], {}, "more than one dimension could be that of the 2 rows"),
        ((3, 2, 6), ["a", "b"], {"dim": 0}, "dimension 0 can't hold 2 rows"),
        ((2, 6), ["a", "b"], {"dim": 1}, "dimension 1 can't hold 2 rows"),
        ((6,), ["a", "b"], {}, "dimension 0 can't hold 2 rows"),
        ((2, 6), ["a", "d"], {}, "an adapter 'd'; the model has 'a', 'b', 'c'"),
        ((2, 6), "ab", {}, "must have an entry for each row of the batch, got 'ab'"),
        ((2, 6), [], {}, "must have an entry for each row"),
        ((2, 6), ["a", 3], {}, "adapters must be a name, names, a mapping"),
        ((2, 6), ["a", {"b": float("nan")}], {}, "a strength must be a finite number"),
        ((2, 6), ["a", "b"], {"names": ["a"]}, "names has not 'b'"),
        ((2, 6), ["a", "b"], {"names": ["a", "a", "b"]}, "names must be different"),
        ((2, 6), torch.ones(2, 2), {}, r"must be \[rows, len\(names\)\], got \(2, 2\)"),
        ((2, 6), torch.ones(2, 2) / 0, {"names": ["a", "b"]}, "must be finite numbers"),
        ((2, 6), ["a", "b"], {"dims": {"x": 1}}, 'dims: "x" matches no module'),
        ((2, 6), ["a", "b"], {"dim": -1}, "must be an integer from 0 up, got -1"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(
    shape: tuple[int, ...], entries: Any, options: dict[str, Any], message: str
) -> None:
    layer = linear()
    with pytest.raises(LoRAError, match=message):  # noqa: SIM117
        with lora_routed(layer, entries, **options):
            layer(torch.randn(shape).double())
    assert layer(torch.randn(2, 6).double()).shape == (2, 5)


def test_rows_are_found_where_the_caller_says() -> None:
    layer, x = linear(), torch.randn(2, 2, 6).double()
    with lora_routed(layer, ["a", "b"], dim=0):
        first = layer(x)
    with lora_routed(layer, ["a", "b"], dims={"weight": 1}):
        second = layer(x.transpose(0, 1))
    close(second.transpose(0, 1), first)


def test_a_batch_norm_in_training_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    register_lora(model, rank=1, adapter="a")
    with pytest.raises(LoRAError, match="1: a batch norm in training mixes the rows"):
        lora_routed(model, ["a", None]).__enter__()
    model.eval()
    with lora_routed(model, ["a", None]):
        model(torch.randn(2, 6))
        model.train()
        with pytest.raises(LoRAError, match="BatchNorm1d in training mixes the rows"):
            model(torch.randn(2, 6))


def test_a_packed_sequence_is_refused() -> None:
    layer = nn.LSTM(4, 5)
    register_lora(layer, rank=1)
    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 4), torch.randn(2, 4)])
    with lora_routed(layer, ["default", None]), pytest.raises(LoRAError, match="pad it instead"):
        layer(packed)


class Functional(nn.Module):
    """Reads its layers' weights itself, as torchvision's Swin does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        assert self.inner.weight.dtype is x.dtype
        assert self.inner.weight.shape == (5, 6)
        return nn.functional.linear(x, self.inner.weight, self.inner.bias)


def test_a_weight_read_elsewhere_computes_by_rows_or_raises() -> None:
    torch.manual_seed(0)
    model, x = Functional().double(), torch.randn(3, 6).double()
    for name in NAMES:
        register_lora(model, rank=2, adapter=name)
    shake(model)
    with lora_routed(model, ["a", None, "c"]):
        close(model(x), model.inner(x))
        with pytest.raises(LoRAError, match="inner: its weight is another one for each row"):
            model.inner.weight @ x.T
        with pytest.raises(LoRAError, match="another one for each row"):
            torch.equal(model.inner.weight, model.inner.weight)


def test_attention_with_its_output_alone_adapted_computes_by_rows() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.0).double().eval()
    for name in NAMES:
        register_lora(model, rank=2, adapter=name, target="self_attn.out_proj")
    shake(model)
    x = torch.randn(3, 4, 8).double()
    with torch.no_grad(), lora_routed(model, ["a", None, "c"]):
        got = model(x)
    for row, name in enumerate(["a", None, "c"]):
        with torch.no_grad(), lora_selected(model, name):
            close(got[row : row + 1], model(x[row : row + 1]))
