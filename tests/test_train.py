"""`train=`: heads, biases and norms trained whole, beside low-rank updates or alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_param import (
    LoRAParametrization,
    TargetError,
    assert_frozen,
    fingerprint,
    load_lora,
    lora_disabled,
    lora_parameters,
    lora_summary,
    merge_lora,
    register_lora,
    remove_lora,
    save_lora,
)
from lora_param.deltas import DenseDelta
from lora_param.io import file_summary


class Classifier(nn.Module):
    """A body, and two heads below one module."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 5))
        self.heads = nn.ModuleDict({"a": nn.Linear(5, 3), "b": nn.Linear(5, 1)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return torch.cat([head(x) for head in self.heads.values()], 1)


HEADS = ["heads.a.weight", "heads.a.bias", "heads.b.weight", "heads.b.bias"]
BODY = ["body.0.weight", "body.2.weight"]
NORM = ["body.1.weight", "body.1.bias"]


def taught(model: nn.Module, steps: int = 5) -> nn.Module:
    """Train the adapters of a model for some steps."""
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=0.05)
    x, y = torch.randn(16, 6), torch.randn(16, 4)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    return model


def kinds(model: nn.Module) -> dict[str, str]:
    weights = lora_summary(model).weights
    return {weight.name: weight.adapters[0].kind for weight in weights}


@pytest.mark.parametrize(
    ("target", "train", "names"),
    [
        (None, "heads", [*BODY, *HEADS]),
        ((), "heads", HEADS),
        ((), "heads.a", HEADS[:2]),
        ((), "*.bias", ["body.0.bias", "body.1.bias", "body.2.bias", "heads.a.bias", "heads.b.bias"]),
        ((), nn.LayerNorm, NORM),
        ((), lambda path, module: path == "heads.b", HEADS[2:]),
        ("body.0", ["heads.a", nn.LayerNorm], ["body.0.weight", *NORM, *HEADS[:2]]),
        ((), "body.1.weight", ["body.1.weight"]),
        ([], "heads.?.weight", [HEADS[0], HEADS[2]]),
    ],
)  # fmt: skip
def test_what_train_names_is_trained_whole_and_nothing_else_moves(
    target: Any, train: Any, names: list[str]
) -> None:
    model = Classifier()
    before, values = fingerprint(model), {n: p.clone() for n, p in model.named_parameters()}
    assert register_lora(model, rank=2, target=target, train=train) == names
    x = torch.randn(4, 6)
    with lora_disabled(model):
        base = model(x)
    assert torch.equal(model(x), base)
    taught(model)
    assert_frozen(model, before)
    with lora_disabled(model):
        assert torch.equal(model(x), base)
    moved = [name for name in values if not torch.equal(read(model, name), values[name])]
    assert moved == names
    for name, kind in kinds(model).items():
        assert kind == ("lora" if name in BODY else "dense")


def read(model: nn.Module, name: str) -> Tensor:
    path, _, tensor = name.rpartition(".")
    value: Tensor = getattr(model.get_submodule(path), tensor)
    return value


def test_a_type_that_is_the_models_own_names_all_below_it() -> None:
    model = Classifier()
    names = [name for name, _ in model.named_parameters()]
    assert register_lora(model, target=(), train=Classifier) == names


def test_a_weight_that_its_row_expects_and_that_is_none_is_passed_over() -> None:
    layer = nn.Linear(3, 2)
    layer.register_parameter("weight", None)
    assert register_lora(layer, target=(), train="*") == ["bias"]


def test_full_fine_tuning_is_a_special_case_with_the_base_intact() -> None:
    model, twin = (torch.manual_seed(0), Classifier())[1], (torch.manual_seed(0), Classifier())[1]
    before = fingerprint(model)
    names = register_lora(model, target=(), train="*")
    assert names == [name for name, _ in twin.named_parameters()]
    x, y = torch.randn(16, 6), torch.randn(16, 4)
    optimizers = [
        torch.optim.SGD(lora_parameters(model), 0.1),
        torch.optim.SGD(twin.parameters(), 0.1),
    ]
    for _ in range(3):
        for net, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            (net(x) - y).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(model(x), twin(x))
    remove_lora(model)
    assert_frozen(model, before)


def test_what_both_name_is_trained_whole_with_a_warning() -> None:
    model = Classifier()
    with pytest.warns(
        UserWarning, match=r"both name heads\.a\.weight, heads\.b\.weight: trained w"
    ) as said:
        register_lora(model, target="*.weight", train="heads", rank=1)
    assert said[0].filename == __file__
    assert kinds(model)["heads.a.weight"] == "dense"
    assert isinstance(model.body[0].parametrizations.weight[0], LoRAParametrization)


def test_by_default_what_train_names_is_left_to_it_without_a_word() -> None:
    model = Classifier()
    register_lora(model, train="heads")
    assert isinstance(model.heads["a"].parametrizations.weight[0], DenseDelta)
    assert isinstance(model.body[0].parametrizations.weight[0], LoRAParametrization)


@pytest.mark.parametrize("options", [{"train": "*"}, {"train": "heads", "exclude": "body*"}])
def test_by_default_train_may_leave_nothing_else_to_adapt(options: dict[str, str]) -> None:
    model = Classifier()
    names = register_lora(model, **options)  # type: ignore[arg-type]
    assert names == (
        HEADS if "exclude" in options else [n for n, _ in Classifier().named_parameters()]
    )
    assert set(kinds(model).values()) == {"dense"}


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("head", 'train "head" matches no weight, because a name is matched whole; write'),
        ((), "train is empty; give None"),
        (3, "train must be a pattern"),
        ("body.3", 'train "body.3" matches no weight'),
        (nn.Conv2d, "train Conv2d matches no weight"),
    ],
)
def test_a_train_that_names_nothing_is_refused(train: Any, message: str) -> None:
    model = Classifier()
    with pytest.raises(TargetError, match=message):
        register_lora(model, train=train)
    assert not any(isinstance(module, LoRAParametrization) for module in model.modules())


def test_an_empty_target_without_train_is_refused() -> None:
    with pytest.raises(TargetError, match="target is empty"):
        register_lora(Classifier(), target=())


def test_without_a_target_exclude_leaves_out_of_train() -> None:
    model = Classifier()
    assert register_lora(model, target=(), train="*", exclude=["heads", "body.1"]) == [
        "body.0.weight",
        "body.0.bias",
        "body.2.weight",
        "body.2.bias",
    ]


@pytest.mark.parametrize(
    ("exclude", "message"),
    [("heds", 'exclude "heds" matches no weight'), ("*", "exclude leaves nothing to train")],
)
def test_an_exclude_from_train_that_does_not_fit_is_refused(exclude: str, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        register_lora(Classifier(), target=(), train="heads", exclude=exclude)


def test_beside_a_target_exclude_leaves_out_of_that_alone() -> None:
    model = Classifier()
    names = register_lora(model, target="*.weight", exclude="heads*", train="heads", rank=2)
    assert names == ["body.0.weight", "body.2.weight", *HEADS]


def test_a_number_without_dimensions_is_trained_whole_and_measured(tmp_path: Any) -> None:
    model = nn.ParameterDict({"logit_scale": torch.tensor(2.0)})
    register_lora(model, target=(), train="*")
    with torch.no_grad():
        model.parametrizations.logit_scale[0].D.fill_(-0.5)
    save_lora(model, tmp_path / "adapter.safetensors")
    (row,) = file_summary(tmp_path / "adapter.safetensors").weights
    assert (row.shape, row.norm, row.effective_rank) == ((), 0.5, 1)
    merge_lora(model)
    assert model["logit_scale"] == 1.5


def test_a_tied_parameter_is_refused_with_the_reason() -> None:
    model = Classifier()
    model.heads["b"].bias = nn.Parameter(model.heads["a"].bias.data[:1])
    with pytest.raises(TargetError, match=r"heads\.a\.bias has memory in common with it"):
        register_lora(model, target=(), train="heads.b")


def test_one_file_holds_head_and_body(tmp_path: Any) -> None:
    model = Classifier()
    base = copy.deepcopy(model)
    register_lora(model, rank=2, train="heads")
    taught(model)
    save_lora(model, tmp_path / "adapter.safetensors")
    load_lora(base, tmp_path / "adapter.safetensors", base="require")
    x = torch.randn(4, 6)
    assert torch.equal(base(x), model(x))
    assert kinds(base) == kinds(model)


def test_merging_folds_all_in() -> None:
    model, x = Classifier(), torch.randn(4, 6)
    register_lora(model, rank=2, train=["heads", nn.LayerNorm])
    expected = taught(model)(x)
    merge_lora(model)
    assert all(type(module) is not DenseDelta for module in model.modules())
    torch.testing.assert_close(model(x), expected)


def test_a_second_adapter_leaves_what_the_first_one_trains() -> None:
    model = Classifier()
    register_lora(model, rank=2, train="heads", adapter="a")
    register_lora(model, rank=2, target="body.*", adapter="b")
    assert all(parameter.requires_grad for parameter in lora_parameters(model))


# What freezing takes away


def test_freezing_a_thawed_head_says_so_and_names_the_way() -> None:
    model = Classifier().requires_grad_(False)
    model.heads.requires_grad_(True)
    with pytest.warns(
        UserWarning, match=r"freezes heads\.a\.bias, heads\.b\.bias, which .* train="
    ):
        register_lora(model, rank=1)
    assert not any(p.requires_grad for n, p in model.named_parameters() if n.endswith("bias"))


@pytest.mark.parametrize("options", [{"train": "heads"}, {"freeze": False}])
@pytest.mark.filterwarnings("error")
def test_a_thawed_head_that_goes_on_being_trained_is_no_matter(options: dict[str, Any]) -> None:
    model = Classifier().requires_grad_(False)
    model.heads.requires_grad_(True)
    register_lora(model, rank=2, target="body.*", **options)


# A rank above a weight's smaller side


def test_a_plain_rank_is_lowered_where_a_weight_is_narrow_with_the_scale_asked_for() -> None:
    model = Classifier()
    register_lora(model, alpha=16)
    rows = {weight.name: weight.adapters[0] for weight in lora_summary(model).weights}
    assert [rows[name].rank for name in (*BODY, HEADS[0], HEADS[2])] == [5, 5, 3, 1]
    for weight in lora_summary(model).weights:
        assert weight.adapters[0].alpha / weight.adapters[0].rank == 16 / 8


def test_a_rank_that_a_mapping_gives_is_taken_as_it_is() -> None:
    with pytest.raises(ValueError, match=r"heads\.b\.weight: rank must satisfy 1 <= rank <= "):
        register_lora(Classifier(), rank={"*": 2})
