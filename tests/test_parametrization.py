"""The formula by itself, as anyone can register it by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

from lora_param import LoRAError, LoRAParametrization, disable_lora, enable_lora, remove_lora


def by_hand(layer: nn.Linear, **options: object) -> LoRAParametrization:
    register_parametrization(layer, "weight", LoRAParametrization(*layer.weight.shape, **options))
    return layer.parametrizations.weight[0]


def test_a_matrix_computed_by_hand() -> None:
    lora = LoRAParametrization(3, 2, rank=1, alpha=2)
    with torch.no_grad():
        lora.lora_A.copy_(torch.tensor([[1.0, -2.0]]))
        lora.lora_B.copy_(torch.tensor([[1.0], [0.0], [3.0]]))
    adapted = lora(torch.tensor([[10.0, 10.0], [20.0, 20.0], [30.0, 30.0]]))
    assert torch.equal(adapted, torch.tensor([[12.0, 6.0], [20.0, 20.0], [36.0, 18.0]]))


def test_each_slice_of_a_stack_has_its_own_pair() -> None:
    lora = LoRAParametrization(3, 2, rank=1, batch=(4,))
    nn.init.normal_(lora.lora_B)
    stack = torch.randn(4, 3, 2)
    assert lora.lora_A.shape == (4, 1, 2)
    assert lora.lora_B.shape == (4, 3, 1)
    for index in range(4):
        expected = stack[index] + lora.lora_B[index] @ lora.lora_A[index]
        torch.testing.assert_close(lora(stack)[index], expected)


def test_registered_by_hand_it_has_the_names_of_the_tutorials() -> None:
    layer = nn.Linear(4, 3)
    weight = layer.weight
    lora = by_hand(layer, rank=2, alpha=6)
    nn.init.normal_(lora.lora_B)
    assert layer.parametrizations.weight.original is weight
    assert lora.scale == 3
    expected = weight + (lora.lora_B @ lora.lora_A).view_as(weight) * lora.scale
    assert torch.equal(layer.weight, expected)
    lora.enabled = False
    assert layer.weight is weight


def test_registered_by_hand_it_obeys_the_verbs() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    lora = by_hand(model[0], rank=2)
    disable_lora(model)
    assert not lora.enabled
    enable_lora(model)
    assert lora.enabled
    remove_lora(model)
    assert type(model[0]) is nn.Linear


def test_torch_can_take_it_off_again() -> None:
    layer = nn.Linear(4, 3)
    weight = layer.weight.detach().clone()
    nn.init.normal_(by_hand(layer, rank=2).lora_B)
    remove_parametrizations(layer, "weight", leave_parametrized=False)
    assert torch.equal(layer.weight, weight)


def test_assigning_to_the_weight_never_reaches_the_original() -> None:
    layer = nn.Linear(4, 3)
    by_hand(layer, rank=2)
    before = layer.parametrizations.weight.original.detach().clone()
    with pytest.raises(RuntimeError, match="right_inverse"):
        layer.weight = torch.zeros(3, 4)
    assert torch.equal(layer.parametrizations.weight.original, before)


def test_kaiming_is_the_default_and_is_uniform_within_one_over_root_fan_in() -> None:
    A = LoRAParametrization(500, 400, rank=300).lora_A
    bound = 1 / math.sqrt(400)
    assert A.abs().max() <= bound
    assert A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)


def test_kaiming_is_torchs_own_initialisation() -> None:
    torch.manual_seed(3)
    A = LoRAParametrization(5, 6, rank=4).lora_A
    torch.manual_seed(3)
    assert torch.equal(A, nn.init.kaiming_uniform_(torch.empty(4, 6), a=math.sqrt(5)))


def test_a_slice_of_a_stack_is_drawn_as_widely_as_a_matrix() -> None:
    A = LoRAParametrization(500, 400, rank=30, batch=(20,)).lora_A
    assert A.abs().max().item() == pytest.approx(1 / math.sqrt(400), rel=0.01)


def test_gaussian_has_a_deviation_of_one_over_rank() -> None:
    A = LoRAParametrization(500, 5000, rank=4, init="gaussian").lora_A
    assert A.std().item() == pytest.approx(1 / 4, rel=0.03)


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_b_starts_at_zero(init: str) -> None:
    assert LoRAParametrization(5, 6, rank=4, init=init).lora_B.count_nonzero() == 0


def test_a_generator_makes_the_draw_reproducible_and_leaves_the_global_one_alone() -> None:
    state = torch.get_rng_state()
    first, second = (
        LoRAParametrization(5, 6, rank=4, generator=torch.Generator().manual_seed(7)).lora_A
        for _ in range(2)
    )
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("factor_dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_mixed_dtypes_compute_in_the_wider_and_round_once(weight_dtype, factor_dtype) -> None:
    lora = LoRAParametrization(5, 6, rank=4, dtype=factor_dtype)
    nn.init.normal_(lora.lora_B)
    weight = torch.randn(5, 6).to(weight_dtype)
    wide = torch.promote_types(weight_dtype, factor_dtype)
    expected = weight.to(wide) + lora.lora_B.to(wide) @ lora.lora_A.to(wide)
    assert torch.equal(lora(weight), expected.to(weight_dtype))


def test_autocast_does_not_round_the_update() -> None:
    lora = LoRAParametrization(50, 60, rank=40)
    nn.init.normal_(lora.lora_B)
    weight = torch.randn(50, 60)
    expected = lora(weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lora(weight), expected)


def test_disabled_it_does_not_spread_an_infinite_factor() -> None:
    lora = LoRAParametrization(5, 6, rank=4)
    nn.init.constant_(lora.lora_A, math.inf)
    lora.enabled = False
    weight = torch.randn(5, 6)
    assert lora(weight) is weight


BAD = [
    ({"rank": 0}, r"1 <= rank <= min\(5, 6\) = 5, got 0; give an integer from 1 up"),
    ({"rank": -1}, "got -1"),
    ({"rank": 6}, "got 6; lower the rank"),
    ({"rank": 1.5}, "got 1.5"),
    ({"rank": True}, "got True"),
    ({"rank": "4"}, "got '4'"),
    (
        {"alpha": math.nan},
        "alpha must be a finite number, or None for the rank, got nan; give a number",
    ),
    ({"alpha": math.inf}, "got inf"),
    ({"alpha": "2"}, "got '2'"),
    ({"init": "zeros"}, r"init must be one of .*start from the weight, got 'zeros'"),
    ({"init": "pissa"}, r"or in register_lora one of \['pissa', .*got 'pissa'"),
    ({"dtype": torch.int64}, "float16, bfloat16, float32, float64, got torch.int64"),
    ({"dtype": torch.complex64}, "got torch.complex64"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[str(options) for options, _ in BAD])
def test_a_bad_argument_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(LoRAError, match=message):
        LoRAParametrization(5, 6, **{"rank": 4} | options)


def test_print_shows_what_it_is() -> None:
    lora = LoRAParametrization(5, 6, rank=4, alpha=0.5, adapter="style")
    numbers = "rank=4, alpha=0.5, scaling=lora, dropout=0"
    assert repr(lora) == f"LoRAParametrization('style', {numbers}, enabled)"


def test_alpha_is_what_was_given_and_follows_the_scale() -> None:
    lora = LoRAParametrization(60, 60, rank=49, alpha=1)
    assert (lora.alpha, lora.scale) == (1.0, 1 / 49)
    lora.scale = 0.5
    assert lora.alpha == 24.5
