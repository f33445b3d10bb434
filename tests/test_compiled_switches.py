"""Numbers and switches of adapters that change while a model is compiled."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.utils.parametrize import register_parametrization

from lora_param import (
    LoRAError,
    LoRAParametrization,
    base_state_dict,
    disable_lora,
    enable_lora,
    lora_routed,
    lora_selected,
    register_lora,
    remove_lora,
    select_lora,
)
from lora_param.undo import all_or_nothing
from lora_param.walk import Walk

from .cases import shake

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's look


class Attended(nn.Module):
    """A model that computes in weight space."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2)

    def forward(self, x: Tensor) -> Any:
        return self.attention(x, x, x)[0]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "activation space": lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)),
    "weight space": Attended,
}


NAMES = [f"a{index}" for index in range(10)]


def adapted(model: nn.Module, names: Sequence[str] = NAMES, **options: Any) -> nn.Module:
    for name in names:
        register_lora(model, adapter=name, **(options or {"rank": 2}))
    shake(model)
    return model


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return adapted(MODELS[request.param](), NAMES)


def gradients(model: nn.Module, y: Tensor) -> dict[str, Tensor]:
    factors = dict(model.named_parameters())
    for factor in factors.values():
        factor.grad = None
    y.square().sum().backward()
    return {name: each.grad for name, each in factors.items() if each.grad is not None}


def graphs(
    model: nn.Module, changes: Iterable[Callable[[], object]], trained: bool = False
) -> list[int]:
    """List how many inputs each graph of a compiled model has, which is right after each change."""
    torch._dynamo.reset()
    found, x = [], torch.randn(3, 2, 6)

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        found.append(len(inputs))
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for change in changes:
        change()
        with torch.set_grad_enabled(trained):
            y, expected = compiled(x), model(x)
        torch.testing.assert_close(y, expected)
        if trained:
            torch.testing.assert_close(gradients(model, y), gradients(model, expected))
    return found


def selecting(model: nn.Module, *adapters: Any) -> list[Callable[[], object]]:
    return [lambda each=each: select_lora(model, each) for each in adapters]


def rescale(model: nn.Module, scale: float) -> None:
    for module in model.modules():
        if isinstance(module, LoRAParametrization):
            module.scale = scale


def test_changing_a_scale_keeps_the_graph(model: nn.Module) -> None:
    select_lora(model, "a0")
    scales = (1.0, 0.5, 2.0, -1.0, 7.0, 0.1)
    changes = [lambda scale=scale: rescale(model, scale) for scale in scales]
    assert len(graphs(model, changes)) <= 2  # of one value, and of any


def test_changing_strengths_keeps_the_graph(model: nn.Module) -> None:
    shares = [0.05 + index / 10 for index in range(5)]
    assert len(graphs(model, selecting(model, *({"a0": s, "a1": 1 - s} for s in shares)))) <= 2


@pytest.mark.parametrize("trained", [False, True], ids=["inference", "training"])
def test_ten_adapters_selected_in_turn_share_one_graph(model: nn.Module, trained: bool) -> None:
    assert len(graphs(model, selecting(model, *NAMES, *NAMES), trained)) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "dora", "rank": 2},
        {"kind": "dense"},
        {"init": "pissa", "rank": 2},
        {"dropout": 0.1, "rank": 2},
    ],
    ids=str,
)
def test_adapters_of_any_kind_share_one_graph(options: dict[str, Any]) -> None:
    model = adapted(MODELS["activation space"](), **options).eval()
    assert len(graphs(model, selecting(model, *NAMES), trained=True)) == 1


def test_pairs_of_adapters_share_one_graph(model: nn.Module) -> None:
    pairs = itertools.pairwise(NAMES)
    assert len(graphs(model, selecting(model, *map(list, pairs)))) == 1


def test_a_graph_computes_nothing_of_adapters_that_are_off(model: nn.Module) -> None:
    alone = copy.deepcopy(model)
    for name in NAMES[1:]:
        remove_lora(alone, name)
    ten, one = (graphs(each, selecting(each, "a0")) for each in (model, alone))
    assert ten == one


def test_adapters_selected_in_blocks_that_nest_share_a_graph(model: nn.Module) -> None:
    with ExitStack() as blocks:
        changes = [
            lambda name=name: blocks.enter_context(lora_selected(model, name)) for name in NAMES
        ]
        assert len(graphs(model, [*changes, blocks.close, lambda: select_lora(model, "a3")])) == 2


def test_switching_all_off_and_on_again_keeps_two_graphs(model: nn.Module) -> None:
    select_lora(model, "a0")
    switch = [lambda: disable_lora(model, "a0"), lambda: enable_lora(model, "a0")]
    assert len(graphs(model, [*switch * 5, *selecting(model, None, "a4")])) == 2


def saved_whole(model: nn.Module) -> nn.Module:
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    return cast("nn.Module", torch.load(file, weights_only=False))


@pytest.mark.parametrize("twin", [copy.deepcopy, saved_whole])
def test_the_adapters_of_a_copy_share_a_graph_of_the_copys_own(model: nn.Module, twin: Any) -> None:
    select_lora(model, "a0")
    other = twin(model)
    select_lora(model, None)
    assert len(graphs(other, selecting(other, *NAMES))) == 1


def test_an_adapter_that_comes_later_keeps_the_graph(model: nn.Module) -> None:
    def load(name: str) -> None:
        adapted(model, [name])
        select_lora(model, name)

    later = [lambda name=f"b{index}": load(name) for index in range(9)]
    assert len(graphs(model, [*selecting(model, "a0"), *later])) == 1
    changes = [lambda name=name: remove_lora(model, name) for name in NAMES]
    assert len(graphs(model, [*selecting(model, "b8"), *changes])) == 1


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def appended(model: nn.Linear) -> None:
    register_parametrization(model, "weight", Halved())


def inserted(model: nn.Linear) -> None:
    chain_of(model).insert(0, Halved())


def replaced(model: nn.Linear) -> None:
    chain_of(model)[0] = copy.deepcopy(chain_of(model)[1])


def deleted(model: nn.Linear) -> None:
    del chain_of(model)[0]


def deleted_by_name(model: nn.Linear) -> None:
    delattr(chain_of(model), "0")


def chain_of(model: nn.Module) -> Any:
    return model.parametrizations.weight  # type: ignore[union-attr]


@pytest.mark.parametrize("change", [appended, inserted, replaced, deleted, deleted_by_name])
def test_what_others_do_to_a_chain_acts(change: Callable[[nn.Linear], None]) -> None:
    model = cast("nn.Linear", adapted(nn.Linear(6, 6), ["a0", "a1"]))
    select_lora(model, "a0")
    assert len(graphs(model, [lambda: None, lambda: change(model)])) == 2
    expected = chain_of(model).original
    for entry in chain_of(model):
        expected = entry(expected)
    assert torch.equal(model.weight, expected)


def test_a_base_state_dict_leaves_switches_to_act(model: nn.Module) -> None:
    base_state_dict(model)
    assert len(graphs(model, selecting(model, *NAMES))) == 1


def test_a_refused_change_of_a_chain_leaves_what_acts(model: nn.Module) -> None:
    select_lora(model, "a3")
    x = torch.randn(3, 2, 6)
    expected = model(x)
    with contextlib.suppress(LoRAError), all_or_nothing() as undo:
        for weight, delta in Walk(model).deltas:
            weight.detach({delta}, undo)
        raise LoRAError("a fault behind them")
    assert torch.equal(model(x), expected)
    assert graphs(model, selecting(model, *NAMES))[1:] == []


@pytest.mark.skipif(torch.__version__ < "2.7", reason="no compiled code reads a context variable")
@pytest.mark.parametrize(("space", "rows"), [*((s, 1) for s in MODELS), ("activation space", 3)])
def test_ten_adapters_routed_by_their_names_share_one_graph(space: str, rows: int) -> None:
    model, x = adapted(MODELS[space]()), torch.randn(rows, 2, 6)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for name in NAMES:
        select_lora(model, name)
        expected = model(x)
        with lora_routed(model, [name] * rows, names=NAMES):
            torch.testing.assert_close(compiled(x), expected)
    assert counter.frame_count == 1
