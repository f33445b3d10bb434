"""The table and the numbers behind it."""

from __future__ import annotations

import pytest
from torch import nn
from torch.nn.utils import parametrizations

from lora_param import AdapterError, disable_lora, lora_summary, register_lora


def rich_boy() -> nn.Sequential:
    return nn.Sequential(nn.Linear(784, 1000), nn.Linear(1000, 2000), nn.Linear(2000, 10))


def test_it_counts_what_the_source_counts() -> None:
    model = rich_boy()
    register_lora(model, rank=1)
    summary = lora_summary(model)
    assert summary.base_parameters == 2_807_010
    assert summary.lora_parameters == summary.trainable_parameters == 6_794
    assert summary.total_parameters == 2_813_804
    assert f"{summary.percentage:.3f}" == "0.242"


def test_it_prints_a_line_per_weight_and_the_totals() -> None:
    model = rich_boy()
    register_lora(model, rank=2, alpha=4, adapter="a")
    register_lora(model, rank=8, target="2", adapter="b")
    disable_lora(model, "b")
    assert str(lora_summary(model)).splitlines() == [
        "weight    shape      space                          adapter  kind        rank  alpha  state    parameters",
        "---------------------------------------------------------------------------------------------------------",
        "0.weight  1000x784   activation or weight, by cost  a        lora           2      4  on            3,568",
        "1.weight  2000x1000  activation or weight, by cost  a        lora           2      4  on            6,000",
        "2.weight  10x2000    activation or weight, by cost  a, b     lora, lora  2, 8   4, 8  on, off      20,100",
        "---------------------------------------------------------------------------------------------------------",
        "base 2,807,010 + LoRA 29,668 = 2,836,678 parameters; LoRA is 1.057 % of the base; "
        "29,668 trainable",
    ]


def test_it_can_be_asked_for_the_numbers() -> None:
    model = nn.Linear(6, 5)
    register_lora(model, rank=2, alpha=3)
    (weight,) = lora_summary(model).weights
    (adapter,) = weight.adapters
    assert (weight.name, weight.shape) == ("weight", (5, 6))
    assert (adapter.name, adapter.rank, adapter.alpha) == ("default", 2, 3.0)
    assert (adapter.parameters, adapter.enabled) == (22, True)


def test_a_shared_parameter_counts_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    register_lora(model, rank=1, target="c")
    assert lora_summary(model).base_parameters == 2 * 16 + 3 * 4


def test_originals_under_a_foreign_parametrization_count() -> None:
    layer = parametrizations.weight_norm(nn.Linear(6, 5))
    register_lora(layer, rank=2)
    assert lora_summary(layer).base_parameters == 30 + 5 + 5


def test_a_model_without_adapters_has_no_summary() -> None:
    with pytest.raises(AdapterError, match="the model has none"):
        lora_summary(nn.Linear(6, 5))
