"""Blocks of output features: the laws hold for each, and other features stay as they were."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

from lora_param import (
    assert_frozen,
    disable_lora,
    fingerprint,
    load_lora_state_dict,
    lora_parameters,
    lora_routed,
    lora_selected,
    lora_state_dict,
    lora_summary,
    merge_lora,
    named_lora_parameters,
    register_lora,
    remove_lora,
)
from lora_param.layers import CONVOLUTIONS
from lora_param.ops import LinearRun

from .activation_cases import SINGLE
from .cases import CASES, Case, describe, outputs, shake
from .kinds import KINDS
from .reference import feature_dim, loss, reference

BLOCKS = [case for case in CASES if case.id != "transposed conv2d grouped"]
LAYERS = [case for case in SINGLE if "embedding" not in case.id]
BATCHED = [case for case in LAYERS if case.id in {case.id for case in CASES}]
each_case = pytest.mark.parametrize("case", BLOCKS, ids=lambda case: case.id)
each_kind = pytest.mark.parametrize("kind", KINDS)


def adapt(case: Case, layer: nn.Module, kind: str = "lora", adapter: str = "a") -> list[str]:
    """Adapt the first two output features and the last one, or every other one."""
    blocks = ("[:2]", "[-1:]") if adapter == "a" else ("[::2]",)
    target = [name + block for name in case.names for block in blocks]
    return register_lora(
        layer,
        adapter=adapter,
        **{**KINDS[kind].options, "target": target, "kind": KINDS[kind].name, "space": case.space},
    )


@each_case
@each_kind
def test_fresh_blocks_leave_the_output_equal(case: Case, kind: str) -> None:
    layer, inputs = case.build()
    before = outputs(layer, inputs)
    names = adapt(case, layer, kind)
    assert [name.partition("[")[0] for name in names] == [n for n in case.names for _ in "ab"]
    assert all(map(torch.equal, outputs(layer, inputs), before))


@each_case
@each_kind
def test_blocks_and_their_gradients_match_the_oracle(case: Case, kind: str) -> None:
    layer, inputs = case.build(torch.float64)
    plain = copy.deepcopy(layer)
    adapt(case, layer, kind)
    adapt(case, layer, kind, "b")
    shake(layer)
    expected = reference(plain, layer, inputs)
    inputs = tuple(x.requires_grad_() if x.is_floating_point() else x for x in inputs)
    actual = outputs(layer, inputs)
    loss(actual).backward()
    pairs = list(zip(actual, expected.outputs, strict=True))
    pairs += [(x.grad, g) for x, g in zip(inputs, expected.input_gradients, strict=True)]
    factors = dict(named_lora_parameters(layer))
    assert factors.keys() == expected.factor_gradients.keys()
    pairs += [(factors[name].grad, want) for name, want in expected.factor_gradients.items()]
    for got, want in pairs:
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@each_case
def test_a_weight_changes_in_its_blocks_alone(case: Case) -> None:
    layer, _ = case.build()
    plain = copy.deepcopy(layer)
    adapt(case, layer)
    shake(layer)
    for name in case.names:
        owner, _, tensor = name.rpartition(".")
        dim = feature_dim(plain, name)
        now, before = (getattr(m.get_submodule(owner), tensor) for m in (layer, plain))
        same = (now == before).movedim(dim, 0).flatten(1).all(1).tolist()
        features = len(same)
        assert same == [row not in (0, 1, features - 1) for row in range(features)]


@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.id)
def test_blocks_act_on_their_features_of_the_output_alone(case: Case) -> None:
    layer, inputs = case.build()
    adapt(case, layer)
    [before] = outputs(layer, inputs)
    sizes = sum(isinstance(layer, kind) * k for k, kind in enumerate(CONVOLUTIONS, 1))
    shake(layer)
    [y] = outputs(layer, inputs)
    assert {weight.space for weight in lora_summary(layer).weights} == {"activation"}
    features = y.shape[-1 - sizes]
    assert torch.equal(*(each.narrow(-1 - sizes, 2, features - 3) for each in (y, before)))
    for first, width in ((0, 2), (features - 1, 1)):
        assert not torch.equal(*(each.narrow(-1 - sizes, first, width) for each in (y, before)))


@each_case
@each_kind
def test_remove_and_merge_leave_a_plain_module(case: Case, kind: str) -> None:
    layer, inputs = case.build(torch.float64)
    layer.eval()
    before, bits = describe(layer), fingerprint(layer)
    adapt(case, layer, kind)
    shake(layer)
    merged, adapted = copy.deepcopy(layer), outputs(layer, inputs)
    merge_lora(merged)
    for got, want in zip(outputs(merged, inputs), adapted, strict=True):
        torch.testing.assert_close(got, want)
    remove_lora(layer)
    assert describe(layer) == before
    assert_frozen(layer, bits)


@each_case
def test_a_state_dict_and_a_pickle_hold_every_block(case: Case) -> None:
    layer, inputs = case.build()
    fresh = copy.deepcopy(layer)
    adapt(case, layer)
    shake(layer)
    expected = outputs(layer, inputs)
    adapt(case, fresh)
    load_lora_state_dict(fresh, lora_state_dict(layer))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for copied in (fresh, torch.load(buffer, weights_only=False), copy.deepcopy(layer)):
        assert all(map(torch.equal, outputs(copied, inputs), expected))


@pytest.mark.parametrize("target", ["weight[2:4]", ("weight", [0, 2, 3])])
def test_an_embeddings_rows_are_tokens(target: Any) -> None:
    layer, tokens = nn.Embedding(7, 5), torch.arange(7)
    before = layer(tokens)
    [name] = register_lora(layer, rank=2, target=[target])
    shake(layer)
    assert lora_summary(layer).weights[0].space == "activation"
    moved = (layer(tokens) != before).any(1).nonzero().flatten().tolist()
    assert moved == ([2, 3] if name == "weight[2:4]" else [0, 2, 3])


@pytest.mark.parametrize("case", BATCHED, ids=lambda case: case.id)
def test_a_row_of_a_batch_meets_its_own_adapters_blocks(case: Case) -> None:
    layer, (x,) = case.build(torch.float64)
    alone = []
    for adapter in "ab":
        adapt(case, layer, adapter=adapter)
    shake(layer)
    for adapter in "ab":
        with lora_selected(layer, adapter):
            alone.append(layer(x))
    with lora_routed(layer, ["ab"[row % 2] for row in range(len(x))]):
        y = layer(x)
    for row in range(len(x)):
        torch.testing.assert_close(y[row], alone[row % 2][row])


def fused() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(6, 9)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_all_blocks_of_an_adapter_share_one_product_with_the_input(
    dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x, inputs = fused(), torch.randn(4, 6), []
    target = ["weight[:3]", "weight[3:6]", "weight[6:]"]
    register_lora(layer, rank=2, target=target, dropout=dropout, space="activation")
    shake(layer)
    down = LinearRun.down
    monkeypatch.setattr(LinearRun, "down", lambda self, x, A: inputs.append(x) or down(self, x, A))
    y = layer(x)
    assert len(inputs) == 1
    update = torch.cat([delta.lora_B @ delta.lora_A for delta in layer.parametrizations.weight])
    torch.testing.assert_close(
        y - nn.functional.linear(x, layer.parametrizations.weight.original, layer.bias),
        inputs[0] @ update.T,
    )
    assert (inputs[0] == 0).any() == bool(dropout)


def test_blocks_of_several_adapters_drop_by_themselves() -> None:
    layer = fused()
    for adapter in "ab":
        register_lora(layer, rank=2, target="weight[:3]", dropout=0.5, adapter=adapter)
    shake(layer)
    twin = copy.deepcopy(layer)
    disable_lora(twin, "b")
    torch.manual_seed(0)
    both = layer(torch.ones(4, 6))
    torch.manual_seed(0)
    assert not torch.equal(both, twin(torch.ones(4, 6)))


@pytest.mark.parametrize("blocks", [["[:3]", "[6:]"], ["[::3]", "[1::3]"]])
def test_blocks_compile_without_a_break(blocks: list[str]) -> None:
    layer, x = fused(), torch.randn(4, 6)
    register_lora(layer, rank=2, target=[f"weight{block}" for block in blocks])
    shake(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_an_optimizers_steps_leave_all_else_alone() -> None:
    layer = fused()
    before = layer.weight.detach().clone()
    register_lora(layer, rank=2, target=["weight[:3]", "weight[6:]"])
    optimizer = torch.optim.AdamW(lora_parameters(layer), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
    assert torch.equal(layer.weight[3:6], before[3:6])
    assert not torch.equal(layer.weight[:3], before[:3])
    assert not torch.equal(layer.weight[6:], before[6:])


def test_a_block_has_the_rank_that_its_name_gets() -> None:
    layer = fused()
    register_lora(layer, rank={"weight[:3]": 1, "*": 2}, target=["weight[0:3]", "weight[6:9]"])
    ranks = [weight.adapters[0].rank for weight in lora_summary(layer).weights]
    assert ranks == [1, 2]


def test_blocks_join_an_adapter_in_several_calls() -> None:
    layer = fused()
    register_lora(layer, rank=2, target="weight[:3]")
    assert register_lora(layer, rank=2, target="weight[6:]") == ["weight[6:9]"]
    assert len(list(lora_parameters(layer, "default"))) == 4
