"""DoRA: a direction that is low-rank, and a length for each output."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 as everybody calls it
from transformers.pytorch_utils import Conv1D

from lora_param import (
    LoRAError,
    disable_lora,
    load_lora_state_dict,
    lora_parameters,
    lora_state_dict,
    lora_summary,
    named_lora_parameters,
    register_lora,
    select_lora,
)
from lora_param.deltas import dora as kind
from lora_param.deltas.dora import length_of_sum
from lora_param.ops import LinearRun

from .activation_cases import ACTIVATION, check, each_case, each_smooth
from .cases import Case, adapted, outputs, shake
from .reference import loss

# Of a permuted input torch's own product has other bits by whether the weight is trained.
STEADY = [case for case in ACTIVATION if case.id != "linear, permuted input"]


@pytest.fixture(params=["formed", "not formed"])
def path(request: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Compute lengths of small weights as those of large ones too."""
    if request.param == "not formed":
        monkeypatch.setattr(kind, "SMALL", 0)
    return request.param


def dora(layer: nn.Module, **options: Any) -> nn.Module:
    return adapted(layer, kind="dora", **options)


def delta_of(layer: nn.Module) -> Any:
    return layer.parametrizations.weight[0]


def original_of(layer: nn.Module) -> Any:
    return layer.parametrizations.weight.original


@each_case
def test_activation_space_matches_the_oracle(case: Case, path: str) -> None:
    layer, inputs = case.build(torch.float64)
    plain = copy.deepcopy(layer)
    case.adapt(layer, kind="dora")
    shake(layer)
    assert "activation" in {weight.space for weight in lora_summary(layer).weights}
    check(layer, plain, inputs, 1e-10)


@pytest.mark.parametrize("case", STEADY, ids=lambda case: case.id)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fresh_one_changes_no_bit_whichever_way_lengths_are_computed(
    case: Case, dtype: torch.dtype, path: str
) -> None:
    layer, inputs = case.build(dtype)
    before = outputs(layer, inputs)
    case.adapt(layer, kind="dora")
    assert all(map(torch.equal, outputs(layer, inputs), before))


@pytest.mark.parametrize("kinds", [("dora", "dora"), ("lora", "dora"), ("dora", "lora")])
def test_each_acts_on_what_those_beneath_it_make(kinds: tuple[str, str], path: str) -> None:
    layer, x = nn.Linear(9, 8).double(), torch.randn(5, 9).double()
    for name, each in zip("ab", kinds, strict=True):
        register_lora(layer, rank=2, adapter=name, kind=each)
        shake(layer, name)
    y, read = layer(x), layer.weight
    torch.testing.assert_close(y, F.linear(x, read, layer.bias))
    gradients = []
    for loss_of in (y, F.linear(x, read, layer.bias)):
        gradients.append(torch.autograd.grad(loss_of.square().sum(), list(lora_parameters(layer))))
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want)


def test_a_fresh_one_on_a_trained_adapter_keeps_its_output() -> None:
    layer, x = adapted(nn.Linear(9, 8), adapter="a").double(), torch.randn(5, 9).double()
    before = layer(x)
    register_lora(layer, rank=2, adapter="b", kind="dora")
    torch.testing.assert_close(layer(x), before, rtol=1e-13, atol=1e-13)
    disable_lora(layer, "a")  # whose share of the lengths stays
    assert not torch.allclose(layer(x), before)


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([-3.0, -0.1, 0.5, 2.0]),
    st.sampled_from([1.0, 1e-4, 0.0]),
)
@settings(max_examples=60, deadline=None)
def test_the_length_of_a_sum_needs_no_sum(seed: int, scale: float, left: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.randn(3, 40, generator=generator), torch.randn(6, 3, generator=generator)
    rest = torch.randn(6, 40, generator=generator)
    W = rest * left - B @ A * scale  # of which the sum leaves little, or only rounding
    W[0] = 0
    own = torch.linalg.vector_norm(W, dim=1)
    expected = torch.linalg.vector_norm(W.double() + B.double() @ A.double() * scale, dim=1)
    got = length_of_sum(W, own, A, B, scale).double()
    assert ((got - expected).abs() <= 1e-5 * expected + 2e-6 * own).all()


def test_rows_of_which_little_is_left_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    W, A, B = torch.randn(6, 400), torch.randn(2, 400), torch.randn(6, 2)
    W[2] = 1e-3 * W[2] - B[2] @ A
    own = torch.linalg.vector_norm(W, dim=1)
    expected = torch.linalg.vector_norm(W.double() + B.double() @ A.double(), dim=1)
    got = length_of_sum(W, own, A, B, 1.0).double()
    assert ((got - expected).abs() < 1e-5 * expected).all()
    monkeypatch.setattr(kind, "CANCELLED", 0.0)
    without = length_of_sum(W, own, A, B, 1.0).double()
    assert (without - expected).abs()[2] > 1e-5 * expected[2]


def test_a_row_of_zeros_stays_and_can_be_trained(path: str) -> None:
    layer, x = nn.Linear(9, 8), torch.randn(5, 9)
    with torch.no_grad():
        layer.weight[3] = 0
    before = layer(x)
    register_lora(layer, rank=2, kind="dora")
    y = layer(x)
    assert torch.equal(y, before)
    y.square().sum().backward()
    assert all(each.grad.isfinite().all() for each in lora_parameters(layer))
    assert delta_of(layer).lora_B.grad[3].any()


def replaced(layer: nn.Linear) -> None:
    layer.parametrizations.weight.original.data = torch.randn(8, 9)


def written(layer: nn.Linear) -> None:
    with torch.no_grad():
        original_of(layer).mul_(2)


def loaded(layer: nn.Linear) -> None:
    layer.load_state_dict({"weight": torch.randn(8, 9), "bias": torch.randn(8)})


def assigned(layer: nn.Linear) -> None:
    state = {"weight": torch.randn(8, 9), "bias": torch.randn(8)}
    layer.load_state_dict(state, assign=True)


def converted(layer: nn.Linear) -> None:
    layer.to(torch.bfloat16).to(torch.float32)


def put_elsewhere_and_back(layer: nn.Linear) -> None:
    """Put new memory where the old was, at the same address and with the same version."""
    place = bytearray(8 * 9 * 4)
    original_of(layer).data = torch.frombuffer(place, dtype=torch.float32).view(8, 9)
    layer(torch.ones(1, 9))
    new = torch.frombuffer(place, dtype=torch.float32).view(8, 9)
    original_of(layer).data = new.copy_(torch.randn(8, 9))


def stepped(layer: nn.Linear) -> None:
    original = original_of(layer).requires_grad_()
    layer(torch.ones(1, 9)).sum().backward()
    torch.optim.SGD([original], lr=1.0, fused=True).step()  # counts no version
    original.requires_grad_(False)


CHANGES: list[Any] = [replaced, written, loaded, assigned, converted, put_elsewhere_and_back]


@pytest.mark.parametrize("change", [*CHANGES, stepped], ids=lambda change: change.__name__)
def test_what_is_known_of_a_base_ends_with_it(
    change: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kind, "SMALL", 0)
    layer, x = dora(nn.Linear(9, 8)), torch.randn(5, 9)
    layer(x)
    change(layer)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


def test_lengths_of_a_base_are_computed_once_and_are_no_copys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kind, "SMALL", 0)
    layer, x = dora(nn.Linear(9, 8)), torch.randn(5, 9)
    layer(x)
    known = kind._lengths[delta_of(layer)]
    layer(x)
    assert kind._lengths[delta_of(layer)] is known
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        original_of(twin).mul_(3)
    torch.testing.assert_close(twin(x), F.linear(x, twin.weight, twin.bias))
    assert kind._lengths[delta_of(layer)] is known


def test_a_base_that_is_loaded_later_gives_a_fresh_one_its_lengths() -> None:
    layer, plain, x = nn.Linear(9, 8), nn.Linear(9, 8), torch.randn(5, 9)
    register_lora(layer, rank=2, kind="dora")
    layer.load_state_dict(plain.state_dict())
    assert torch.equal(layer(x), plain(x))
    shake(layer)
    trained = delta_of(layer).magnitude.clone()
    layer.load_state_dict(nn.Linear(9, 8).state_dict())
    assert torch.equal(delta_of(layer).magnitude, trained)


@pytest.mark.parametrize("frozen", [False, True])
def test_nothing_of_the_weights_size_is_kept(frozen: bool) -> None:
    layer, x = nn.Linear(300, 400), torch.randn(5, 300, requires_grad=True)
    register_lora(layer, rank=4, kind="dora")
    shake(layer)
    for parameter in lora_parameters(layer):
        parameter.requires_grad_(not frozen)
    sizes: list[int] = []
    own = original_of(layer).data_ptr()

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() != own:  # the input's gradient needs that itself
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    assert max(sizes, default=0) <= 5 * 400  # as many as outputs
    assert kind._lengths[delta_of(layer)][1].numel() == 400


def test_strengths_are_refused() -> None:
    layer = dora(nn.Linear(9, 8))
    select_lora(layer, {"default": 1.0})
    with pytest.raises(LoRAError, match="a strength must be 1, because a dora delta adds nothing"):
        select_lora(layer, {"default": 0.5})


def test_lengths_of_inputs_act_too() -> None:
    """As older releases of LyCORIS have them."""
    layer, x = dora(nn.Conv2d(4, 5, 3)).double(), torch.randn(2, 4, 6, 6).double()
    delta = delta_of(layer)
    delta.magnitude = nn.Parameter(torch.rand(1, 4, 1, 1).double() + 1)
    V = original_of(layer) + (delta.lora_B @ delta.lora_A).view(5, 4, 3, 3)
    expected = delta.magnitude * V / torch.linalg.vector_norm(V, dim=(0, 2, 3), keepdim=True)
    torch.testing.assert_close(layer.weight, expected)
    torch.testing.assert_close(layer(x), F.conv2d(x, expected, layer.bias))


def test_a_magnitude_of_another_shape_is_refused() -> None:
    layer = dora(nn.Linear(9, 8))
    assert delta_of(layer).misfit((8, 9), (8, 9)) is None
    delta_of(layer).magnitude = nn.Parameter(torch.ones(7, 1))
    assert "its magnitude is (7, 1), for a weight of (8, 9)" in delta_of(layer).misfit(
        (8, 9), (8, 9)
    )


def test_autocast_keeps_lengths_in_float32(path: str) -> None:
    layer, x = nn.Linear(64, 64), torch.randn(8, 64)
    with torch.autocast("cpu", torch.bfloat16):
        before = layer(x)
        register_lora(layer, rank=2, kind="dora")
        assert torch.equal(layer(x), before)
    shake(layer)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.1, atol=0.1)


def test_a_block_of_outputs_has_lengths_of_its_own(path: str) -> None:
    for layer in (nn.Linear(9, 8).double(), Conv1D(8, 9).double()):
        plain, x = copy.deepcopy(layer), torch.randn(5, 9).double()
        assert register_lora(layer, target="weight[2:5]", rank=2, kind="dora") == ["weight[2:5]"]
        assert torch.equal(layer(x), plain(x))
        shake(layer)
        weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
        torch.testing.assert_close(layer(x), F.linear(x, weight, layer.bias))
        assert torch.equal(layer(x)[:, :2], plain(x)[:, :2])


def test_all_blocks_of_an_adapter_act_at_once_and_form_no_weight(
    monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    layer, x, count = nn.Linear(9, 8).double(), torch.randn(5, 9).double(), []
    register_lora(layer, target=["weight[0:3]", "weight[3:4]", "weight[6:]"], rank=1, kind="dora")
    shake(layer)
    want, down = F.linear(x, layer.weight, layer.bias), LinearRun.down
    monkeypatch.setattr(LinearRun, "down", lambda *args: count.append(args) or down(*args))
    monkeypatch.setattr(kind.DoRA, "value", None)
    torch.testing.assert_close(layer(x), want)
    assert len(count) == 1


def test_blocks_of_an_adapter_act_apart_where_another_is_between_them(path: str) -> None:
    layer, x = nn.Linear(9, 8).double(), torch.randn(5, 9).double()
    for name, target in (("a", "weight[0:3]"), ("b", "weight"), ("a", "weight[3:8]")):
        register_lora(layer, target=target, rank=1, adapter=name, kind="dora")
    shake(layer)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


@each_smooth
def test_it_differentiates_twice(case: Case) -> None:
    layer, inputs = case.build(torch.float64)
    case.adapt(layer, kind="dora")
    shake(layer)
    parameters = list(lora_parameters(layer))
    first = torch.autograd.grad(loss(outputs(layer, inputs)), parameters, create_graph=True)
    second = torch.autograd.grad(sum(each.square().sum() for each in first), parameters)
    assert all(each.isfinite().all() for each in second)


def test_it_compiles_whole() -> None:
    layer, x = dora(nn.Linear(9, 8)), torch.randn(5, 9)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).sum().backward()


def test_state_goes_into_another_of_the_kind_alone() -> None:
    source, model, pair = (nn.Linear(9, 8) for _ in range(3))
    dora(source)
    register_lora(model, rank=2, kind="dora")
    register_lora(pair, rank=2)
    load_lora_state_dict(model, lora_state_dict(source))
    for (name, a), (_, b) in zip(
        named_lora_parameters(model), named_lora_parameters(source), strict=True
    ):
        assert torch.equal(a, b), name
    with pytest.raises(LoRAError, match=r"unexpected: weight.default.magnitude"):
        load_lora_state_dict(pair, lora_state_dict(source))
