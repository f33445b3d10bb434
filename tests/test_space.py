"""Which space a layer computes in: by counting, as it is asked to, or where nothing is lost."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from transformers.pytorch_utils import Conv1D

from lora_param import (
    LoRAError,
    TargetError,
    load_lora_state_dict,
    lora_merged,
    lora_routed,
    lora_state_dict,
    lora_summary,
    register_lora,
    resize_lora,
    select_lora,
)

from .activation_cases import BOTH, check
from .activation_cases import SINGLE as IN_ACTIVATION_SPACE
from .cases import Case, adapted, outputs, shake

SINGLE = [replace(case, space="auto") for case in IN_ACTIVATION_SPACE]
SPACES = ("activation", "weight", "auto")
BY_COST = "activation or weight, by cost"


def linear(fan_in: int, fan_out: int, rank: int, **options: Any) -> nn.Module:
    return adapted(nn.Linear(fan_in, fan_out), rank=rank, **options)


# By cost


# What a layer is, its input, and whether a sum pays in inference and in training. In both, a sum
# pays for narrow layers and many positions; in training for high ranks alone, because it costs a
# product as large as the layer's own.
BORDER = {
    "narrow, one token": (lambda: linear(64, 64, 4), (1, 64), False, False),
    "narrow, two tokens": (lambda: linear(64, 64, 4), (2, 64), True, True),
    "narrow, of high rank, one token": (lambda: linear(64, 64, 64), (1, 64), False, False),
    "wide, one token": (lambda: linear(1024, 1024, 4), (1, 1024), False, False),
    "many tokens of low rank": (lambda: linear(256, 256, 4), (1024, 256), True, False),
    "many tokens of high rank": (lambda: linear(256, 256, 64), (1024, 256), True, True),
    "sequences": (lambda: linear(256, 256, 64), (4, 256, 256), True, True),
    "as many as the layer is wide": (lambda: linear(512, 512, 64), (256, 512), False, False),
    "few channels": (lambda: adapted(nn.Conv2d(16, 16, 3)), (1, 16, 32, 32), True, True),
    "strided": (lambda: adapted(nn.Conv2d(64, 64, 3, 8)), (1, 64, 64, 64), False, False),
    "many channels": (lambda: adapted(nn.Conv2d(256, 256, 3)), (1, 256, 8, 8), False, False),
    "a large image": (lambda: adapted(nn.Conv2d(256, 256, 1)), (1, 256, 64, 64), True, False),
}


@pytest.mark.parametrize("case", BORDER)
def test_a_sum_is_formed_where_counting_says_so(case: str, sums: list[Tensor]) -> None:
    make, shape, in_inference, in_training = BORDER[case]
    layer, x = make(), torch.randn(shape, requires_grad=True)
    del sums[:]
    with torch.no_grad():
        layer(x)
    assert bool(sums) == in_inference
    del sums[:]
    layer(x)
    assert bool(sums) == in_training


@pytest.mark.parametrize("dim", [0, 1, None])  # of the lengths, its first original
def test_the_weight_counts_that_others_parametrizations_make(
    dim: int | None, sums: list[Tensor]
) -> None:
    for width, pays in ((64, True), (1024, False)):
        layer, x = weight_norm(nn.Linear(width, width), dim=dim), torch.randn(2, width)
        register_lora(layer, rank=4)
        del sums[:]
        layer(x)
        assert bool(sums) == pays


def test_the_ranks_of_all_that_acts_count(sums: list[Tensor]) -> None:
    layer, x = nn.Linear(256, 256), torch.randn(1024, 256)
    for adapter in "abcd":
        register_lora(layer, rank=16, adapter=adapter)
    layer(x)
    assert len(sums) == 4
    select_lora(layer, "a")
    layer(x)
    assert len(sums) == 4


def test_a_base_that_is_trained_too_has_its_gradient_to_itself(sums: list[Tensor]) -> None:
    layer = linear(256, 256, 4, freeze=False)
    layer(torch.randn(1024, 256))
    assert sums


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("case", BOTH, ids=lambda case: case.id)
def test_every_space_matches_the_oracle_with_all_gradients(case: Case, space: str) -> None:
    layer, inputs = case.build(torch.float64)
    plain = copy.deepcopy(layer)
    case.adapt(layer, space=space)
    shake(layer)
    check(layer, plain, tuple(x.requires_grad_(x.is_floating_point()) for x in inputs), 1e-10)


@pytest.mark.parametrize("rank", [8, 64])
@pytest.mark.parametrize("tokens", [16, 1024])
def test_both_sides_of_the_border_match_the_oracle(
    rank: int, tokens: int, sums: list[Tensor]
) -> None:
    layer = nn.Linear(256, 192).double()
    plain = copy.deepcopy(layer)
    adapted(layer, rank=rank)
    layer(x := torch.randn(tokens, 256, dtype=torch.float64, requires_grad=True))
    assert bool(sums) == (rank == 64 and tokens == 1024)
    check(layer, plain, (x,), 1e-10)


# Of an input that isn't contiguous, torch's own matmul computes otherwise where a weight has a
# gradient, so that by cost no sum is formed.
FRESH = [(case, space) for case in SINGLE for space in ("weight", "auto")]
FRESH = [each for each in FRESH if "permuted" not in each[0].id or each[1] == "auto"]


@pytest.mark.parametrize(("case", "space"), FRESH, ids=lambda each: getattr(each, "id", each))
def test_a_fresh_adapter_keeps_the_bases_bits_and_strides(case: Case, space: str) -> None:
    layer, inputs = case.build()
    layer.requires_grad_(False)
    before = outputs(layer, inputs)
    case.adapt(layer, space=space)
    for got, want in zip(outputs(layer, inputs), before, strict=True):
        assert torch.equal(got, want)
        assert got.stride() == want.stride()


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(64, 48), lambda: Conv1D(48, 64), lambda: nn.Conv2d(64, 8, 3)]
)
@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_several_adapters_blocks_and_strengths_are_summed(
    make: Callable[[], nn.Module], init: Any, sums: list[Tensor]
) -> None:
    layer = make().double()
    adapted(layer, adapter="a", rank=4)
    adapted(layer, adapter="b", rank=2, target=["weight[2:5]"], dtype=torch.float32)
    register_lora(layer, adapter="c", rank=2, init=init)
    shake(layer)
    select_lora(layer, {"a": 0.7, "b": -0.3, "c": 2})
    x = torch.randn(2, 64, 9, 9) if isinstance(layer, nn.Conv2d) else torch.randn(40, 64)
    got = layer(x.double())
    assert sums
    with lora_merged(layer):
        torch.testing.assert_close(got, layer(x.double()))


# Where a sum would lose something, or can't be


def test_lower_precision_stays_in_activation_space(sums: list[Tensor]) -> None:
    layer, x = linear(16, 16, 8), torch.randn(64, 16)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
        assert lora_summary(layer).weights[0].space == "activation"
    torch.set_float32_matmul_precision("medium")
    try:
        layer(x)
    finally:
        torch.set_float32_matmul_precision("highest")
    for dtype in (torch.bfloat16, torch.float16):
        layer.to(dtype)(x.to(dtype))
        assert lora_summary(layer).weights[0].space == "activation"
    assert not sums
    layer.to(torch.float32)(x)
    assert sums


def test_dropout_stays_in_activation_space_while_it_acts(sums: list[Tensor]) -> None:
    layer, x = linear(16, 16, 8, dropout=0.5), torch.randn(64, 16)
    layer(x)
    assert not sums
    layer.eval()(x)
    assert len(sums) == 1
    layer.train()
    layer.parametrizations.weight[0].dropout = 0.0
    layer(x)
    assert len(sums) == 2


def test_another_adapters_dropout_goes_before_what_is_asked_for(sums: list[Tensor]) -> None:
    layer, x = linear(16, 16, 8, space="weight"), torch.randn(64, 16)
    register_lora(layer, rank=2, adapter="b")
    layer.parametrizations.weight[1].dropout = 0.5
    layer(x)
    assert not sums


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it itself
def test_transforms_compilers_and_routes_stay_in_activation_space(sums: list[Tensor]) -> None:
    layer, x = linear(16, 16, 8), torch.randn(64, 16)
    factors = {n: p.detach()[None] for n, p in layer.named_parameters() if p.requires_grad}
    vmap(lambda values: functional_call(layer, values, (x,)))(factors)
    torch.compile(layer, backend="eager", fullgraph=True)(x)
    with lora_routed(layer, ["default", None], dim=0):
        layer(x)
    assert not sums


def test_a_kind_whose_cost_is_not_counted_stays_in_activation_space() -> None:
    layer = adapted(nn.Linear(16, 16), kind="dora")
    assert lora_summary(layer).weights[0].space == "activation"


@pytest.mark.parametrize("make", [lambda: nn.Embedding(7, 5), lambda: nn.LSTM(4, 5)])
def test_what_computes_in_one_space_alone_is_told_as_that(make: Callable[[], nn.Module]) -> None:
    layer = adapted(make(), target="weight*")
    assert {weight.space for weight in lora_summary(layer).weights} <= {"activation", "weight"}


# As it is asked for


@pytest.mark.parametrize(
    ("space", "said"), list(zip(SPACES, ("activation", "weight", BY_COST), strict=True))
)
def test_a_space_that_is_asked_for_is_kept_and_told(
    space: str, said: str, sums: list[Tensor]
) -> None:
    for width, tokens in ((16, 64), (256, 1)):
        layer, x = linear(width, width, 2, space=space), torch.randn(tokens, width)
        for model in (layer, copy.deepcopy(layer)):
            del sums[:]
            model(x)
            assert bool(sums) == {"activation": False, "weight": True, "auto": width == 16}[space]
            assert lora_summary(model).weights[0].space == said
    resize_lora(layer, rank=1)
    assert lora_summary(layer).weights[0].space == said


def test_a_space_is_how_and_not_what_so_no_state_has_it() -> None:
    first, second = linear(6, 5, 2, space="weight"), linear(6, 5, 2)
    load_lora_state_dict(second, lora_state_dict(first))
    second.load_state_dict(first.state_dict())
    assert lora_summary(second).weights[0].space == BY_COST


def test_of_two_adapters_the_one_in_activation_space_decides(sums: list[Tensor]) -> None:
    layer = linear(16, 16, 2, adapter="a", space="activation")
    adapted(layer, adapter="b")
    layer(torch.randn(64, 16))
    assert not sums


@pytest.mark.parametrize("options", [{"dropout": 0.5}, {"space": "activation"}])
def test_beside_what_asks_for_weight_space_another_may_need_activation_space(
    options: dict[str, Any], sums: list[Tensor]
) -> None:
    layer = linear(16, 16, 2, adapter="a", space="weight")
    register_lora(layer, rank=2, adapter="b", **options)
    layer(torch.randn(64, 16))
    assert not sums
    assert lora_summary(layer).weights[0].space.startswith("activation")


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("shape", [(6,), (40, 6)])
def test_what_is_in_front_runs_once(space: str, shape: tuple[int, ...]) -> None:
    layer, x = spectral_norm(nn.Linear(6, 5)), torch.randn(shape)
    plain = copy.deepcopy(layer)
    register_lora(layer, rank=2, space=space)
    plain(x), layer(x)
    for own, want in zip(layer.parametrizations.weight[0].buffers(), plain.buffers(), strict=True):
        assert torch.equal(own, want)


def test_in_weight_space_lower_precision_computes_by_the_formula() -> None:
    layer = linear(16, 16, 8, space="weight").bfloat16()
    x = torch.randn(64, 16).bfloat16()
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        (nn.Linear(6, 5), {"space": "both"}, r"space must be one of \['activation', 'weight', 'auto'\], got 'both'"),
        (nn.Linear(6, 5), {"space": None}, "space must be one of .*, got None"),
        (nn.Linear(6, 5), {"space": "weight", "dropout": 0.1}, "dropout=0.1 needs activation space"),
        (nn.LSTM(4, 5), {"space": "activation"}, "a lora delta on a LSTM's weight_ih_l0 here is computed in weight space"),
        (nn.Linear(6, 5), {"space": "activation", "kind": "dense", "rank": 8}, "a dense delta on a Linear's weight here is computed in"),
    ],
)  # fmt: skip
def test_a_space_that_cannot_be_is_refused(
    layer: nn.Module, options: dict[str, Any], message: str
) -> None:
    with pytest.raises((LoRAError, TargetError), match=message):
        register_lora(layer, **options)
    assert list(layer.state_dict()) == list(copy.deepcopy(layer).state_dict())
