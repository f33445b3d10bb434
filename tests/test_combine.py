"""Combining adapters, held against the updates themselves."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_param import (
    AdapterError,
    LoRAError,
    combine_lora,
    lora_selected,
    lora_summary,
    named_lora_parameters,
    register_lora,
    resize_lora,
    select_lora,
)
from lora_param.lowrank import dare, factorised, recompressed, ties

from .cases import CASES, Case, shake


def update(model: nn.Module, adapter: str, path: str = "") -> Tensor:
    layer: Any = model.get_submodule(path)
    with torch.no_grad(), lora_selected(model, adapter):
        return layer.weight - layer.parametrizations.weight.original


def layer(ranks: dict[str, int], kind: str = "lora", **options: Any) -> nn.Linear:
    torch.manual_seed(0)
    linear = nn.Linear(7, 6).double()
    for index, (name, rank) in enumerate(ranks.items()):
        own = {"rank": rank, "alpha": 1.0 + index} if kind == "lora" else {}
        register_lora(linear, adapter=name, target="weight", kind=kind, **own, **options)
    shake(linear)
    return linear


STRENGTHS = {"a": 0.7, "b": -0.3, "c": 1.5}


@pytest.mark.parametrize("kind", ["lora", "dense"])
@pytest.mark.parametrize("case", [c for c in CASES if c.id != "sequential"], ids=lambda c: c.id)
def test_a_sum_is_the_sum_of_the_updates_on_every_layer(case: Case, kind: str) -> None:
    model, inputs = case.build(torch.float64)
    for name in ("a", "b"):
        case.adapt(model, name, kind)
    shake(model)
    with torch.no_grad():
        select_lora(model, {"a": 0.7, "b": -0.3})
        want = [each.detach() for each in map(torch.as_tensor, flat(model(*inputs)))]
        fits = combine_lora(model, {"a": 0.7, "b": -0.3}, adapter="ab")
        assert [fit.weight for fit in fits] == list(case.names)
        assert max(fit.error for fit in fits) < 1e-12
        select_lora(model, "ab")
        for got, expected in zip(flat(model(*inputs)), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def flat(output: Any) -> list[Tensor]:
    return [each for each in torch.utils._pytree.tree_leaves(output) if isinstance(each, Tensor)]


def test_ranks_add_up_to_the_smaller_side_and_no_further() -> None:
    model = layer({"a": 2, "b": 3, "c": 4})
    assert combine_lora(model, {"a": 1, "b": 1}, adapter="ab")[0].rank == 5
    assert combine_lora(model, STRENGTHS, adapter="all")[0].rank == 6
    want = sum(strength * update(model, name) for name, strength in STRENGTHS.items())
    torch.testing.assert_close(update(model, "all"), want, rtol=0, atol=1e-12)


def test_the_new_adapter_is_off_and_the_others_stay() -> None:
    model, x = layer({"a": 2, "b": 3}), torch.randn(2, 7).double()
    before = model(x)
    combine_lora(model, {"a": 1, "b": 1}, adapter="ab")
    assert torch.equal(model(x), before)
    states = [(each.name, each.enabled) for each in lora_summary(model).weights[0].adapters]
    assert states == [("a", True), ("b", True), ("ab", False)]


def test_what_is_selected_at_present_makes_no_difference() -> None:
    model = layer({"a": 2, "b": 3})
    want = 0.5 * update(model, "a")
    select_lora(model, {"a": 3.0})
    combine_lora(model, {"a": 0.5}, adapter="half")
    torch.testing.assert_close(update(model, "half"), want)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-2, 2), min_size=3, max_size=3),
    st.sampled_from(["sum", "ties", "dare"]),
    st.integers(0, 2**16),
)
def test_a_combination_is_one_of_updates_and_not_of_factors(
    strengths: list[float], method: Any, seed: int
) -> None:
    options = {} if method == "sum" else {"density": 0.5}
    model, twin = layer({"a": 2, "b": 3, "c": 1}), layer({"a": 2, "b": 3, "c": 1})
    torch.manual_seed(seed)
    with torch.no_grad():  # (A, B) and (Q A, B Q^-1) are one update
        for delta in twin.parametrizations.weight:  # type: ignore[union-attr]
            Q = torch.randn(delta.rank, delta.rank).double() + 3 * torch.eye(delta.rank)
            delta.lora_A.copy_(Q @ delta.lora_A)
            delta.lora_B.copy_(delta.lora_B @ torch.linalg.inv(Q))
    own = dict(zip("abc", strengths, strict=True))
    for each in (model, twin):
        draws = torch.Generator().manual_seed(1)
        combine_lora(each, own, adapter="all", method=method, generator=draws, **options)
        combine_lora(each, {"a": 1}, adapter="again")
    torch.testing.assert_close(update(twin, "all"), update(model, "all"), rtol=0, atol=1e-8)
    assert torch.equal(update(model, "again"), update(model, "a"))


def test_one_adapter_alone_keeps_its_factors_bits() -> None:
    model = layer({"a": 2, "b": 3})
    combine_lora(model, {"a": 1}, adapter="again")
    factors = dict(named_lora_parameters(model))
    assert torch.equal(factors["weight.again.lora_B"], factors["weight.a.lora_B"])
    assert factors["weight.again.lora_B"] is not factors["weight.a.lora_B"]


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_lower_rank_is_the_best_and_its_error_is_said(rank: int) -> None:
    model = layer({"a": 2, "b": 3, "c": 4})
    combine_lora(model, STRENGTHS, adapter="all")
    [fit] = combine_lora(model, STRENGTHS, adapter="low", rank=rank)
    whole = update(model, "all")
    values = torch.linalg.svdvals(whole)
    best = (values[rank:].norm() / values.norm()).item()
    assert fit.rank == rank == torch.linalg.matrix_rank(update(model, "low"))
    assert fit.error == pytest.approx(best, rel=1e-9)
    missed = (update(model, "low") - whole).norm() / whole.norm()
    assert missed.item() == pytest.approx(best, rel=1e-9)


def test_a_share_of_energy_takes_the_least_rank_that_holds_it() -> None:
    model = layer({"a": 2, "b": 3, "c": 4})
    [fit] = combine_lora(model, STRENGTHS, adapter="low", rank=0.9)
    values = torch.linalg.svdvals(update(model, "a") * 0.7 - update(model, "b") * 0.3 + update(model, "c") * 1.5)  # fmt: skip
    shares = values.square().cumsum(0) / values.square().sum()
    assert fit.rank == 1 + int((shares < 0.9).sum())
    assert 0 < fit.error <= 0.1**0.5


def by_hand_ties(updates: list[Tensor], strengths: list[float], density: float) -> Tensor:
    """Compute TIES entry by entry."""
    keep = -(-updates[0].numel() * density // 1)
    trimmed = []
    for each in updates:
        order = each.abs().flatten().sort(descending=True).values
        trimmed.append([v if abs(v) >= order[int(keep) - 1] else 0.0 for v in each.flatten()])
    result = []
    for entries in zip(*trimmed, strict=True):
        parts = [strength * entry for strength, entry in zip(strengths, entries, strict=True)]
        agreeing = [
            (p, abs(s)) for p, s in zip(parts, strengths, strict=True) if p * sum(parts) > 0
        ]
        result.append(sum(p for p, _ in agreeing) / sum(s for _, s in agreeing) if agreeing else 0)
    return torch.tensor([float(value) for value in result]).view_as(updates[0])


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_trims_elects_and_averages(density: float) -> None:
    torch.manual_seed(0)
    updates, strengths = [torch.randn(4, 5) for _ in range(3)], [0.7, -0.3, 1.5]
    want = by_hand_ties(updates, strengths, density)
    torch.testing.assert_close(ties(updates, strengths, density), want)


def test_dare_drops_at_random_and_keeps_the_expectation() -> None:
    torch.manual_seed(0)
    updates = [torch.ones(200, 200), torch.ones(200, 200)]
    total = dare(updates, [1.0, -0.25], 0.4, torch.Generator().manual_seed(0))
    values = {round(value, 6) for value in total.flatten().tolist()}
    assert values == {0.0, 2.5, -0.625, 1.875}
    assert total.mean().item() == pytest.approx(0.75, abs=0.05)


@pytest.mark.parametrize("work", ["combine", "share", "resize", "singular values"])
def test_a_sums_matrix_is_never_formed(work: str) -> None:
    model = nn.Linear(90, 80)
    for name in ("a", "b"):
        register_lora(model, rank=2, adapter=name)
    shake(model)
    with Largest() as seen:
        if work == "resize":
            resize_lora(model, 1, "a")
        elif work == "singular values":
            lora: Any = model.parametrizations.weight
            lora[0].singular_values((80, 90))
        else:
            combine_lora(model, {"a": 1, "b": 2}, adapter="c", rank=1 if work == "combine" else 0.9)
    assert 2 * 90 <= seen.largest < 80 * 90 / 4


class Largest(TorchDispatchMode):
    """Notes how large the largest result in memory of its own is."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {each.untyped_storage().data_ptr() for each in flat((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        own = [e.numel() for e in flat(result) if e.untyped_storage().data_ptr() not in given]
        self.largest = max([self.largest, *own])
        return result


@pytest.mark.parametrize("method", ["ties", "dare"])
@pytest.mark.parametrize("rank", [None, 2])
def test_a_method_by_entries_is_dense_or_truncated(method: Any, rank: int | None) -> None:
    model = layer({"a": 2, "b": 3})
    options = {"method": method, "density": 0.5}
    for adapter, own in (("whole", None), ("low", rank)):
        draws = torch.Generator().manual_seed(0)
        strengths = {"a": 1, "b": 0.5}
        [fit] = combine_lora(
            model, strengths, adapter=adapter, rank=own, generator=draws, **options
        )
    assert fit.rank == rank
    whole, low = update(model, "whole"), update(model, "low")
    assert ((whole - low).norm() / whole.norm()).item() == pytest.approx(fit.error, abs=1e-12)
    assert (fit.error > 0.01) == (rank is not None)


def test_a_large_matrix_of_a_flat_spectrum_is_factorised_well_within_a_hundredth() -> None:
    matrix, rank = torch.randn(520, 520), 96
    squares = torch.linalg.svdvals(matrix.double()).square()
    nearest = math.sqrt(squares[rank:].sum() / squares.sum())
    assert factorised(matrix, rank).error < 1.006 * nearest


def test_a_large_matrix_is_factorised_by_its_range_with_the_true_error() -> None:
    torch.manual_seed(0)
    matrix = (torch.randn(600, 24) * torch.arange(24, 0, -1)) @ torch.randn(24, 520)
    matrix = matrix.double() + torch.randn(600, 520).double()
    values = torch.linalg.svdvals(matrix)
    for rank in (8, 0.9):
        A, B, error = factorised(matrix, rank)
        kept = A.shape[0]
        best = (values[kept:].norm() / values.norm()).item()
        assert error == pytest.approx(((matrix - B @ A).norm() / matrix.norm()).item(), rel=1e-6)
        assert error == pytest.approx(best, rel=1e-3)


def test_nothing_but_zeros_stays_zeros() -> None:
    A, B, error = recompressed(torch.zeros(2, 5), torch.zeros(4, 2), 0.9)
    assert (A.abs().sum(), B.abs().sum(), error) == (0, 0, 0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"adapters": {"d": 1}}, AdapterError, "an adapter 'd'; the model has 'a', 'b'"),
        ({"adapters": {}}, LoRAError, "adapters must be strengths by name"),
        ({"adapters": ["a"]}, LoRAError, "adapters must be strengths by name"),
        ({"adapters": {"a": float("inf")}}, LoRAError, "a strength must be a finite number"),
        ({"adapter": "a"}, AdapterError, 'an adapter "a" on this weight already'),
        ({"adapter": "a.b"}, AdapterError, "without dots"),
        ({"method": "linear"}, LoRAError, 'method must be "sum", "ties" or "dare"'),
        ({"rank": 0}, LoRAError, "rank must be a positive integer, or a share"),
        ({"rank": 1.5}, LoRAError, "rank must be a positive integer, or a share"),
        ({"rank": True}, LoRAError, "rank must be a positive integer, or a share"),
        ({"density": 0.5}, LoRAError, 'density is for "ties" and "dare"'),
        ({"method": "ties"}, LoRAError, "density must satisfy 0 < density <= 1"),
        ({"method": "dare", "density": 0}, LoRAError, "density must satisfy 0 < density <= 1"),
    ],
)
def test_what_makes_no_sense_is_refused_and_changes_nothing(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = layer({"a": 2, "b": 3})
    before = str(lora_summary(model))
    with pytest.raises(error, match=message):
        combine_lora(model, **{"adapters": {"a": 1, "b": 1}, "adapter": "ab"} | options)
    assert str(lora_summary(model)) == before


def test_a_share_of_statistics_is_refused_and_one_adapters_are_copied() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
    for name in ("a", "b"):
        register_lora(model, rank=2, adapter=name)
    with lora_selected(model, "a"):
        model(torch.randn(8, 4))
    norm: Any = model[1]
    combine_lora(model, {"a": 0.5}, adapter="half")
    select_lora(model, "half")
    assert norm.num_batches_tracked == 1
    with pytest.raises(AdapterError, match=r"1\.running_mean: .* a statistics delta is no sum"):
        combine_lora(model, {"a": 0.5, "b": 0.5}, adapter="ab")


def test_statistics_that_are_the_same_in_all_are_the_combinations() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
    model(torch.randn(8, 4))
    for name in ("a", "b"):
        register_lora(model, rank=2, adapter=name)
    shake(model.eval())
    combine_lora(model, {"a": 0.5, "b": -1}, adapter="ab")
    select_lora(model, "ab")
    norm: Any = model[1]
    assert torch.equal(norm.running_mean, norm.parametrizations.running_mean.original)
    assert len(norm.parametrizations.running_mean) == 3


def test_blocks_are_combined_with_their_like_and_refused_with_others() -> None:
    torch.manual_seed(0)
    model = nn.Linear(7, 6).double()
    for name, rows in (("a", "0:3"), ("b", "0:3"), ("c", "1:4")):
        register_lora(model, rank=2, adapter=name, target=f"weight[{rows}]")
    shake(model)
    combine_lora(model, {"a": 0.5, "b": -1}, adapter="ab")
    want = 0.5 * update(model, "a") - update(model, "b")
    torch.testing.assert_close(update(model, "ab"), want)
    with pytest.raises(AdapterError, match=r"overlaps weight.* in part"):
        combine_lora(model, {"a": 0.5, "c": -1}, adapter="ac")


def test_a_copy_of_statistics_is_moved_alone() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
    register_lora(model, rank=2, adapter="a")
    combine_lora(model, {"a": 1}, adapter="b")
    with lora_selected(model, "b"):
        model(torch.randn(8, 4))
        assert model[1].num_batches_tracked == 1
    with lora_selected(model, "a"):
        assert model[1].num_batches_tracked == 0
