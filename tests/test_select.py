"""Which adapters act, how strongly, and which are trained."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_param import (
    AdapterError,
    LoRAError,
    enable_lora,
    load_lora,
    load_lora_state_dict,
    lora_parameters,
    lora_selected,
    lora_state_dict,
    lora_summary,
    merge_lora,
    named_lora_parameters,
    register_lora,
    save_lora,
    select_lora,
)
from lora_param.io.summary import file_summary

from .cases import CASES, Case, outputs, shake

NAMES = ("a", "b", "c")


def net(kind: str = "lora", names: tuple[str, ...] = NAMES) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    for name in names:
        options = {"rank": 2} if kind == "lora" else {"kind": kind}
        register_lora(model, adapter=name, **options)
    shake(model)
    return model


def trained(model: nn.Module) -> set[str]:
    return {name.split(".")[-2] for name, p in named_lora_parameters(model) if p.requires_grad}


def updates(model: nn.Module, path: str = "0") -> dict[str, Tensor]:
    """Return each adapter's update of a layer's weight, which it has alone."""
    layer: Any = model.get_submodule(path)
    original = layer.parametrizations.weight.original
    found = {}
    for delta in layer.parametrizations.weight:
        with lora_selected(model, delta.adapter):
            found[delta.adapter] = (layer.weight - original).detach()
    return found


@pytest.mark.parametrize("kind", ["lora", "dense"])
@pytest.mark.parametrize(
    ("selection", "strengths"),
    [
        ("b", {"b": 1.0}),
        (["a", "c"], {"a": 1.0, "c": 1.0}),
        ({"a": 0.7, "b": -0.3}, {"a": 0.7, "b": -0.3}),
        ({"a": 0, "c": 2}, {"c": 2.0}),
        (None, {}),
    ],
    ids=str,
)
def test_these_act_with_these_strengths_and_no_others(
    selection: Any, strengths: dict[str, float], kind: str
) -> None:
    model = net(kind)
    layer: Any = model[0]
    own = updates(model)
    select_lora(model, selection)
    wanted = layer.parametrizations.weight.original.clone()
    for name, strength in strengths.items():
        wanted += strength * own[name]
    assert torch.allclose(layer.weight, wanted, atol=1e-12)
    x = torch.randn(3, 4).double()
    assert torch.allclose(layer(x), nn.functional.linear(x, wanted, layer.bias), atol=1e-12)
    assert trained(model) == set(strengths)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_strength_scales_the_update_on_every_layer(case: Case) -> None:
    layer, inputs = case.build(torch.float64)
    case.adapt(layer)
    twin = copy.deepcopy(layer)
    shake(layer)
    twin.load_state_dict(layer.state_dict())
    for module in twin.modules():
        if hasattr(module, "alpha"):
            module.alpha *= -0.5
    select_lora(layer, {"default": -0.5})
    for got, want in zip(outputs(layer, inputs), outputs(twin, inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def test_selecting_nothing_gives_the_base_to_the_bit() -> None:
    model, x = net(), torch.randn(3, 4).double()
    base = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    base.load_state_dict({n: p for n, p in model.state_dict().items() if "bias" in n}, strict=False)
    with torch.no_grad():
        for index in (0, 2):
            base[index].weight.copy_(model[index].parametrizations.weight.original)  # type: ignore[union-attr]
    select_lora(model, None)
    assert torch.equal(model(x), base(x))
    assert trained(model) == set()


def test_a_strength_of_one_keeps_the_bits() -> None:
    model, x = net(names=("a",)), torch.randn(3, 4).double()
    before = model(x)
    select_lora(model, {"a": 1.0})
    assert torch.equal(model(x), before)


def test_others_can_be_trained_than_act() -> None:
    model = net()
    select_lora(model, ["a", "b"], trainable="b")
    assert trained(model) == {"b"}
    select_lora(model, "a", trainable=["a", "c"])
    assert trained(model) == {"a", "c"}
    select_lora(model, NAMES)
    assert trained(model) == {"a", "b", "c"}


def test_flags_come_back_as_they_were() -> None:
    model = net()
    frozen: Any = model[0]
    frozen.parametrizations.weight[0].lora_A.requires_grad_(False)
    before = [p.requires_grad for p in lora_parameters(model)]
    select_lora(model, "b")
    select_lora(copied := copy.deepcopy(model), NAMES)
    select_lora(model, NAMES)
    for each in (model, copied):
        assert [p.requires_grad for p in lora_parameters(each)] == before


@pytest.mark.parametrize("there", [(), ("b",)])
def test_an_adapter_loaded_to_be_frozen_stays_so(there: tuple[str, ...], path: Path) -> None:
    model = net(names=("a", *there))
    save_lora(model, path, "a")
    select_lora(model, "a")
    load_lora(model, path, "b", trainable=False)
    select_lora(model, ["a", "b"])
    assert trained(model) == {"a"}
    with pytest.raises(AdapterError, match="'b' can't be trained: all of it was frozen"):
        select_lora(model, "b", trainable="b")


def test_loading_trains_nothing_that_a_selection_lets_rest(path: Path) -> None:
    model = net(names=("a", "b"))
    save_lora(model, path, "b")
    select_lora(model, ["a", "b"], trainable="a")
    load_lora(model, path, "b")
    assert trained(model) == {"a"}
    select_lora(model, "b")
    assert trained(model) == {"b"}


def test_what_is_not_selected_stays_to_the_bit_also_under_momentum_and_decay() -> None:
    model, x = net(), torch.randn(8, 4).double()
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=0.1, weight_decay=0.5)
    for names in ("a", "b", "c"):
        select_lora(model, names)
        others = [p.clone() for n, p in named_lora_parameters(model) if f".{names}." not in n]
        for _ in range(2):
            optimizer.zero_grad(set_to_none=False)
            model(x).square().sum().backward()
            optimizer.step()
        after = [p for n, p in named_lora_parameters(model) if f".{names}." not in n]
        assert all(map(torch.equal, others, after))


def test_a_block_gives_flags_and_gradients_back() -> None:
    model, x = net(), torch.randn(3, 4).double()
    select_lora(model, ["a", "b"])
    model(x).sum().backward()
    before = [None if p.grad is None else p.grad.clone() for p in lora_parameters(model)]
    with lora_selected(model, None):
        assert [p.grad for p in lora_parameters(model)] == [None] * len(before)
        model(x)
    assert trained(model) == {"a", "b"}
    for parameter, grad in zip(lora_parameters(model), before, strict=True):
        assert (parameter.grad is None) == (grad is None)
        assert grad is None or torch.equal(parameter.grad, grad)  # type: ignore[arg-type]


def test_blocks_nest_and_end_in_any_order() -> None:
    model, x = net(), torch.randn(3, 4).double()
    alone = {}
    for name in NAMES:
        with lora_selected(model, name):
            alone[name] = model(x)
    before = model(x)
    outer, inner = lora_selected(model, "a"), lora_selected(model, "b")
    outer.__enter__()
    inner.__enter__()
    assert torch.equal(model(x), alone["b"])
    assert trained(model) == {"b"}
    outer.__exit__(None, None, None)
    assert torch.equal(model(x), alone["b"])
    assert trained(model) == {"b"}
    inner.__exit__(None, None, None)
    assert torch.equal(model(x), before)
    assert trained(model) == set(NAMES)


def test_blocks_in_threads_leave_everything_as_it_was() -> None:
    model = net()
    flags = [p.requires_grad for p in lora_parameters(model)]
    together = threading.Barrier(4)

    def select(name: str | None) -> None:
        together.wait()
        for _ in range(100):
            with lora_selected(model, name):
                pass

    threads = [threading.Thread(target=select, args=(name,)) for name in (*NAMES, None)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [p.requires_grad for p in lora_parameters(model)] == flags
    assert all(each.enabled for w in lora_summary(model).weights for each in w.adapters)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: select_lora(m, "d"), AdapterError, "an adapter 'd'; the model has 'a', 'b', 'c'"),
        (lambda m: select_lora(m, ["a", "d"]), AdapterError, "an adapter 'd'"),
        (lambda m: select_lora(m, ["a", "a"]), AdapterError, "named once"),
        (lambda m: select_lora(m, 3), AdapterError, "adapters must be a name, names, a mapping"),
        (lambda m: select_lora(m, [3]), AdapterError, r"adapters must be .* got \[3\]"),
        (lambda m: select_lora(m, {"a": float("nan")}), LoRAError, "a': a strength must be a fin"),
        (lambda m: select_lora(m, {"a": "1"}), LoRAError, "must be a finite number, got '1'"),
        (lambda m: select_lora(m, "a", trainable="d"), AdapterError, "an adapter 'd'"),
        (lambda m: lora_selected(m, "d").__enter__(), AdapterError, "an adapter 'd'"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_and_changes_nothing(
    call: Callable[[nn.Module], Any], error: type[Exception], message: str
) -> None:
    model = net()
    select_lora(model, {"a": 0.5, "b": 1})
    before = str(lora_summary(model))
    with pytest.raises(error, match=message):
        call(model)
    assert str(lora_summary(model)) == before
    assert trained(model) == {"a", "b"}


def test_of_statistics_one_adapters_act_at_any_strength_and_two_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
    for name in ("a", "b"):
        register_lora(model, rank=2, adapter=name)
    norm: Any = model[1]
    select_lora(model, {"b": 0.5})
    model(torch.randn(8, 4))
    assert norm.parametrizations.num_batches_tracked[1].S == 1
    assert norm.num_batches_tracked == 1
    select_lora(model, "a")
    assert norm.num_batches_tracked == 0
    with pytest.raises(
        AdapterError, match=r"1\.running_mean: adapters 'a' and 'b' have statistics"
    ):
        select_lora(model, ["a", "b"])


def test_the_summary_knows_strengths_and_enabling_brings_them_back() -> None:
    model = net()
    select_lora(model, {"a": 0.7, "b": 1})
    first = lora_summary(model).weights[0].adapters
    assert [(each.enabled, each.strength) for each in first] == [(True, 0.7), (True, 1), (False, 1)]
    assert "x 0.7, on, off" in str(lora_summary(model))
    select_lora(model, "b")
    enable_lora(model)
    assert [each.strength for each in lora_summary(model).weights[0].adapters] == [0.7, 1, 1]


@pytest.mark.parametrize("kind", ["lora", "dense"])
def test_a_strength_is_saved_beside_alpha_and_comes_back(path: Path, kind: str) -> None:
    model, x = net(kind, ("a",)), torch.randn(3, 4).double()
    select_lora(model, {"a": 0.25})
    state = {name: tensor.clone() for name, tensor in lora_state_dict(model).items()}
    save_lora(model, path)
    assert file_summary(path).weights[0].strength == 0.25
    for load in (
        lambda twin: load_lora_state_dict(twin, state),
        lambda twin: load_lora(twin, path),
        lambda twin: twin.load_state_dict(model.state_dict()),
    ):
        twin = net(kind, ("a",))
        load(twin)
        assert lora_summary(twin).weights[0].adapters == lora_summary(model).weights[0].adapters
        assert torch.equal(twin(x), model(x))


@pytest.mark.parametrize("format", ["peft", "kohya"])
def test_a_format_without_a_place_for_a_strength_says_so(tmp_path: Path, format: str) -> None:
    model = net(names=("a",))
    path = tmp_path / ("folder" if format == "peft" else "file.safetensors")
    select_lora(model, {"a": 0.25})
    with pytest.warns(UserWarning, match=f"format {format} has no place for a strength"):
        save_lora(model, path, format=format)
    select_lora(model, {"a": 0.5})
    load_lora(model, path, "a")
    assert lora_summary(model).weights[0].adapters[0].strength == 0.5


def test_merging_folds_the_strength_in() -> None:
    model, x = net(names=("a", "b")), torch.randn(3, 4).double()
    select_lora(model, {"a": 0.5, "b": -2})
    expected = model(x)
    merge_lora(model, "a")
    assert torch.allclose(model(x), expected, atol=1e-12)
    merge_lora(model, "b")
    assert torch.allclose(model(x), expected, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.dictionaries(st.sampled_from(NAMES), st.sampled_from([-1.5, 0.0, 0.5, 1.0])),
        min_size=1,
        max_size=5,
    )
)
def test_only_the_last_selection_counts(selections: list[dict[str, float]]) -> None:
    model = net()
    x = torch.randn(2, 4).double()
    for selection in selections:
        select_lora(model, selection)
    fresh = net()
    select_lora(fresh, selections[-1])
    assert torch.equal(model(x), fresh(x))
    assert trained(model) == {name for name, strength in selections[-1].items() if strength}
