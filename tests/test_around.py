"""What is done around adapted modules: subclasses, other code's switches, assignments, merging."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

from lora_param import (
    LoRAError,
    TargetError,
    disable_lora,
    fingerprint,
    lora_disabled,
    lora_merged,
    lora_parameters,
    lora_summary,
    merge_lora,
    register_lora,
    remove_lora,
)

from .cases import adapted, shake


def gradients(layer: nn.Module, forward: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Return the gradients of an input and of all factors."""
    x = torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = forward(x).square().sum()
    return list(torch.autograd.grad(loss, [x, *lora_parameters(layer)]))


# Checkpointing, and modes that see operations


@pytest.mark.parametrize("allowed", [False, True])
def test_selective_checkpointing_that_keeps_products_gives_the_same_gradients(
    allowed: bool,
) -> None:
    model = nn.Sequential(adapted(nn.Linear(4, 4)), nn.ReLU(), adapted(nn.Linear(4, 4)))
    products = [torch.ops.aten.addmm.default, torch.ops.aten.mm.default]

    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = operation in products
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    def contexts() -> Any:
        return create_selective_checkpoint_contexts(policy, allow_cache_entry_mutation=allowed)

    def forward(x: Tensor) -> Tensor:
        result: Tensor = checkpoint(model, x, use_reentrant=False, context_fn=contexts)
        return result

    for got, expected in zip(gradients(model, forward), gradients(model, model), strict=True):
        torch.testing.assert_close(got, expected)


def test_every_product_is_seen_by_a_counter_of_operations() -> None:
    layer = adapted(nn.Linear(64, 32), rank=4)
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(10, 64))
    assert counter.get_total_flops() == 2 * 10 * (64 * 32 + 64 * 4 + 4 * 32)


class Recurrent(nn.LSTM):
    """A recurrent layer whose forward does something around the stock one."""

    around: Any = None

    def __init__(self) -> None:
        super().__init__(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return self.around(super().forward, x) if self.around else super().forward(x)


class Attention(nn.MultiheadAttention):
    """The same for attention."""

    around: Any = None

    def __init__(self) -> None:
        super().__init__(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        stock = super().forward
        attend = lambda x: stock(x, x, x)  # noqa: E731
        return self.around(attend, x) if self.around else attend(x)


@pytest.mark.parametrize("kind", [Recurrent, Attention])
def test_a_forward_that_checkpoints_the_stock_one_gives_the_same_gradients(kind: Any) -> None:
    layer = adapted(kind())
    expected = gradients(layer, lambda x: layer(x)[0])
    layer.around = lambda stock, x: checkpoint(stock, x, use_reentrant=False)
    for got, wanted in zip(gradients(layer, lambda x: layer(x)[0]), expected, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("kind", [Recurrent, Attention])
def test_a_forward_that_calls_the_stock_one_with_other_tensors_sees_these(kind: Any) -> None:
    layer = adapted(kind())
    x = torch.randn(2, 3, 4)
    zeros = {name: torch.zeros_like(p) for name, p in layer.named_parameters() if "lora_B" in name}
    with lora_disabled(layer):
        expected = layer(x)[0]

    def inside(stock: Any, x: Tensor) -> Any:
        layer.around = None
        stock(x)
        return functional_call(layer, zeros, (x,))

    layer.around = inside
    torch.testing.assert_close(layer(x)[0], expected)


@pytest.mark.parametrize("kind", [Recurrent, Attention])
def test_a_forward_that_learns_between_two_calls_of_the_stock_one_sees_what_it_learned(
    kind: Any,
) -> None:
    layer = adapted(kind())
    x = torch.randn(2, 3, 4)

    def inside(stock: Any, x: Tensor) -> Any:
        stock(x)[0].sum().backward()
        for factor in lora_parameters(layer):
            factor.data.add_(factor.grad, alpha=-1.0)
        return stock(x)

    layer.around = inside
    got = layer(x)[0]
    layer.around = None
    torch.testing.assert_close(got, layer(x)[0])
    got.sum().backward()


# Names that don't read as the Parameter, and assignments


class Halved(nn.Linear):
    """A layer whose weight is read through a property."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self._parameters["weight"] * 0.5


class Looked(nn.Linear):
    """A layer that changes what it is asked for."""

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        return value * 0.5 if name == "weight" else value


@pytest.mark.parametrize("kind", [Halved, Looked])
def test_a_weight_that_does_not_read_as_its_parameter_is_refused(kind: Any) -> None:
    layer = nn.Linear(4, 3)
    layer.__class__ = kind
    x, before = torch.randn(2, 4), fingerprint(layer)
    expected = layer(x)
    with pytest.raises(TargetError, match="weight: reading it gives something else than the Para"):
        register_lora(layer, rank=2)
    assert type(layer) is kind
    assert fingerprint(layer) == before
    assert torch.equal(layer(x), expected)


def test_a_refused_weight_of_a_recurrent_layer_does_not_act_when_switched_off() -> None:
    lstm = adapted(nn.LSTM(4, 4))
    x = torch.randn(2, 3, 4)
    with lora_disabled(lstm):
        expected = lstm(x)[0]
    with pytest.raises(LoRAError, match="can't assign to an adapted weight"):
        lstm.weight_hh_l0 = nn.Parameter(torch.zeros(16, 4))
    with lora_disabled(lstm):
        assert torch.equal(lstm(x)[0], expected)


def test_a_module_in_an_adapted_weights_place_is_refused() -> None:
    layer = adapted(nn.Linear(6, 5))
    with pytest.raises(LoRAError, match="can't assign to an adapted weight"):
        layer.weight = nn.Identity()
    assert "weight" not in layer._modules


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_a_max_norm_set_after_registering_is_refused(kind: Any) -> None:
    layer = kind(6, 4)
    register_lora(layer, rank=2, target="weight")
    before = fingerprint(layer)
    with pytest.raises(LoRAError, match="max_norm: max_norm renormalises the original"):
        layer.max_norm = 0.1
    with lora_disabled(layer):
        layer(torch.arange(6)[None])
    assert fingerprint(layer) == before
    layer.max_norm = None


@pytest.mark.parametrize(
    "take",
    [
        lambda entries: entries.pop("a"),
        lambda entries: entries.popitem(),
        lambda entries: entries.clear(),
        lambda entries: entries.__delitem__("a"),
    ],
    ids=["pop", "popitem", "clear", "del"],
)
def test_taking_an_entry_from_an_adapted_dictionary_is_refused_and_keeps_it(take: Any) -> None:
    entries = nn.ParameterDict({"b": torch.randn(4, 3), "a": torch.randn(4, 3)})
    register_lora(entries, rank=2, target="a")
    with pytest.raises(LoRAError, match="has an adapter; call remove_lora first"):
        take(entries)
    assert list(entries.keys()) == ["a", "b"]
    assert entries["a"].shape == (4, 3)
    remove_lora(entries)
    assert isinstance(entries.pop("a"), nn.Parameter)


# Merging


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Conv2d(3, 3, 3), (1, 3, 5, 5)), (nn.Linear(4, 4), (2, 4))]
)
def test_a_backward_through_a_forward_before_the_merge_raises(
    layer: nn.Module, shape: tuple[int, ...]
) -> None:
    adapted(layer, space="activation")  # which saves the original for the backward
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    merge_lora(layer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


class Turned(nn.Module):
    """A parametrization that returns a view."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight[:, 1:]


def test_a_merged_block_hands_out_no_view_of_the_original() -> None:
    layer = nn.Linear(5, 3, bias=False)
    nn.utils.parametrize.register_parametrization(layer, "weight", Turned(), unsafe=True)
    register_lora(layer, rank=2)
    disable_lora(layer)
    before = fingerprint(layer)
    with lora_merged(layer):
        layer.weight.data.zero_()
    assert fingerprint(layer) == before


# Padding, the meta device, memory that is shared in part


def test_a_padding_row_counted_from_the_end_stays_as_it_is() -> None:
    layer = nn.Embedding(6, 4, padding_idx=5)
    layer.padding_idx = -1
    register_lora(layer, rank=2, target="weight")
    shake(layer)
    layer(torch.tensor([5, 5])).sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in lora_parameters(layer))
    layer(torch.tensor([0, 5])).sum().backward()
    assert all(p.grad.any() for p in lora_parameters(layer))


def test_an_adapted_embedding_runs_on_the_meta_device() -> None:
    layer = nn.Embedding(6, 4, device="meta")
    register_lora(layer, rank=2, target="weight")
    assert layer(torch.zeros(2, 3, dtype=torch.long, device="meta")).shape == (2, 3, 4)


class Tied(nn.Module):
    """A head that is a part of the embedding's memory."""

    def __init__(self, part: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 4, bias=False)
        self.head.weight = nn.Parameter(part(self.embedding.weight.data))


@pytest.mark.parametrize(
    "part",
    [lambda w: w[2:6], lambda w: w[:4], lambda w: w[4:], lambda w: w[4:].t()],
    ids=["middle", "front", "end", "turned"],
)
def test_a_weight_that_overlaps_an_embedding_in_memory_counts_as_tied(part: Any) -> None:
    model = Tied(part)
    with pytest.warns(UserWarning, match="not adapted, because tied to an embedding: head.weight"):
        assert register_lora(model, rank=2) == ["body.weight"]
    with pytest.raises(TargetError, match=r"embedding\.weight has memory in common with it"):
        register_lora(model, rank=2, target="head", adapter="b")


def test_neighbours_in_one_memory_are_not_tied() -> None:
    memory = torch.randn(2 * 16)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for layer, part in zip(model, memory.split(16), strict=True):
        layer.weight = nn.Parameter(part.view(4, 4))
    assert register_lora(model, rank=2) == ["0.weight", "1.weight"]


# Dropout that could not act


def test_dropout_is_refused_where_a_forward_of_its_own_replaces_the_layers() -> None:
    layer = nn.Linear(6, 5)
    layer.forward = lambda x: nn.functional.linear(x, layer.weight, layer.bias)
    with pytest.raises(TargetError, match="dropout needs a layer that computes in activation"):
        register_lora(layer, rank=2, dropout=0.5)
    register_lora(layer, rank=2)
    assert lora_summary(layer).weights[0].space == "weight"
