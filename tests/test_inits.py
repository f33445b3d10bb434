"""Where a pair starts: what it is made of, and that the base doesn't move for it."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_param import (
    FileError,
    LoRAError,
    assert_frozen,
    fingerprint,
    load_lora,
    load_lora_state_dict,
    lora_parameters,
    lora_state_dict,
    lora_summary,
    merge_lora,
    named_lora_parameters,
    register_lora,
    save_lora,
)
from lora_param.deltas.inits import STARTS, olora, pissa
from lora_param.io import file_summary
from lora_param.lowrank import LARGE

from .activation_cases import each_case
from .cases import CASES, DTYPES, Case, outputs, shake
from .peft_cases import output, quiet

INITS = ["orthogonal", *STARTS]
each_init = pytest.mark.parametrize("init", INITS)


def delta_of(layer: nn.Module) -> Any:
    return layer.parametrizations.weight[0]


def conv1d_of(linear: nn.Linear) -> Conv1D:
    layer = Conv1D(*linear.weight.shape)
    with torch.no_grad():
        layer.weight.copy_(linear.weight.T)
        layer.bias.copy_(linear.bias)
    return layer


@each_init
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", [each for each in CASES if len(each.names) == 1], ids=lambda case: case.id
)
def test_every_start_changes_nothing_and_trains_both_factors(case: Case, init, dtype) -> None:
    layer, inputs = case.build(dtype)
    before, bits = outputs(layer, inputs), fingerprint(layer)
    case.adapt(layer, init=init)
    name = case.names[0]
    assert torch.equal(getattr(layer, name), layer.parametrizations[name].original)
    after = outputs(layer, inputs)
    assert all(map(torch.equal, after, before))
    assert_frozen(layer, bits)
    sum(each.double().square().sum() for each in after).backward()
    assert all(each.grad.any() for each in lora_parameters(layer))


@pytest.mark.parametrize("scaling", ["lora", "rslora"])
def test_pissa_starts_from_the_largest_singular_values(scaling: Any) -> None:
    layer = nn.Linear(9, 8).double()
    register_lora(layer, rank=3, alpha=7, init="pissa", scaling=scaling)
    delta, W = delta_of(layer), layer.parametrizations.weight.original
    U, S, Vh = torch.linalg.svd(W)
    torch.testing.assert_close(
        delta.start_B @ delta.start_A * delta.scale, U[:, :3] * S[:3] @ Vh[:3]
    )
    norms = delta.start_A.norm(dim=1), delta.start_B.norm(dim=0)
    torch.testing.assert_close(*norms)


def test_milora_starts_from_the_smallest() -> None:
    layer = nn.Linear(9, 8).double()
    register_lora(layer, rank=3, alpha=7, init="milora")
    delta, W = delta_of(layer), layer.parametrizations.weight.original
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    expected = U[:, -3:] * S[-3:] @ Vh[-3:]
    torch.testing.assert_close(delta.start_B @ delta.start_A * delta.scale, expected)


def test_olora_starts_from_the_qr_decomposition() -> None:
    layer = nn.Linear(9, 8).double()
    register_lora(layer, rank=3, alpha=7, init="olora")
    delta, W = delta_of(layer), layer.parametrizations.weight.original
    Q, R = torch.linalg.qr(W)
    torch.testing.assert_close(delta.start_B @ delta.start_A * delta.scale, Q[:, :3] @ R[:3])


@pytest.mark.parametrize("init", STARTS)
def test_a_weight_that_is_stored_transposed_starts_as_a_linear_does(init: Any) -> None:
    linear = nn.Linear(9, 8).double()
    conv1d = conv1d_of(linear).double()
    for layer in (linear, conv1d):
        register_lora(layer, rank=3, init=init)
    (A, B), (a, b) = ((delta_of(each).start_A, delta_of(each).start_B) for each in (linear, conv1d))
    torch.testing.assert_close(a.T.abs(), B.abs())
    torch.testing.assert_close(b.T.abs(), A.abs())


def test_the_first_gradients_are_those_of_factors_that_were_taken_from_the_weight() -> None:
    layer, x = nn.Linear(9, 8).double(), torch.randn(5, 9).double()
    W, bias = layer.weight.detach().clone(), layer.bias.detach()
    register_lora(layer, rank=3, alpha=7, init="pissa")
    delta = delta_of(layer)
    A, B = (each.clone().requires_grad_() for each in (delta.start_A, delta.start_B))
    residual = W - (B @ A * delta.scale).detach()
    theirs = nn.functional.linear(x, residual + B @ A * delta.scale, bias)
    for y in (layer(x), theirs):
        y.square().sum().backward()
    torch.testing.assert_close(delta.shift_A.grad, A.grad)
    torch.testing.assert_close(delta.shift_B.grad, B.grad)


def test_weight_decay_pulls_towards_the_base() -> None:
    layer, x = nn.Linear(9, 8), torch.randn(5, 9)
    before = layer(x)
    register_lora(layer, rank=3, init="pissa")
    shake(layer)
    optimizer = torch.optim.SGD(lora_parameters(layer), lr=1.0, weight_decay=1.0)
    for factor in lora_parameters(layer):
        factor.grad = torch.zeros_like(factor)
    optimizer.step()
    assert torch.equal(layer(x), before)


def test_a_large_matrix_is_decomposed_nearly_as_well_by_draws() -> None:
    torch.manual_seed(0)
    side = LARGE + 8
    U, V = (torch.linalg.qr(torch.randn(side, side))[0] for _ in range(2))
    S = torch.arange(1, side + 1) ** -0.7
    W = U * S @ V.T
    B, A = pissa(W, 8, 0.5, torch.Generator().manual_seed(0))
    assert (W - B @ A * 0.5).norm() < 1.01 * S[8:].norm()
    again = pissa(W, 8, 0.5, torch.Generator().manual_seed(0))
    assert torch.equal(B, again[0])


def test_a_function_gives_a_start_of_its_own() -> None:
    seen: list[tuple[Any, ...]] = []

    def start(W: Tensor, rank: int, scale: float, generator: Any) -> tuple[Tensor, Tensor]:
        seen.append((W.shape, W.dtype, rank, scale, generator))
        W.fill_(7.0)  # which is a copy
        return torch.ones(W.shape[0], rank), torch.ones(rank, W.shape[1])

    generator = torch.Generator()
    layer = nn.Conv2d(3, 4, 2).bfloat16()
    W = layer.weight.detach().clone()
    register_lora(layer, rank=2, alpha=3, init=start, generator=generator)
    assert seen == [((4, 12), torch.float32, 2, 1.5, generator)]
    assert torch.equal(layer.weight, W)
    assert (delta_of(layer).start_A.dtype, delta_of(layer).anchored) == (torch.bfloat16, True)


def test_a_function_whose_product_is_zero_makes_a_plain_pair() -> None:
    layer = nn.Linear(9, 8)
    register_lora(layer, rank=2, init=lambda W, r, *_: (torch.zeros(8, r), W[:r]))
    delta = delta_of(layer)
    assert torch.equal(delta.lora_A, layer.parametrizations.weight.original[:2])
    assert not delta.anchored


BAD: list[tuple[str, Any, str]] = [
    ("unknown", "svd", r"init must be one of \['kaiming', 'gaussian', 'orthogonal'\]"),
    ("one tensor", lambda W, r, *_: W, "weight: init=.* fails on this weight: too many values"),
    ("no pair", lambda W, r, *_: (W, W), r"init must return B0 and A0 of \(\(8, 2\), \(2, 9\)\)"),
    ("any error", lambda *_: 1 / 0, "weight: init=.* fails on this weight: division by zero"),
    ("no tensors", lambda W, r, *_: (1, 2), "init must return B0 and A0 of"),
    ("NaN", lambda W, r, *_: (W[:, :r] * torch.nan, W[:r]), "gives factors that aren't finite"),
]


@pytest.mark.parametrize(("init", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_a_bad_start_is_refused(init: Any, message: str) -> None:
    layer = nn.Linear(9, 8)
    with pytest.raises(LoRAError, match=message):
        register_lora(layer, rank=2, init=init)
    assert type(layer) is nn.Linear


def test_a_start_from_a_weight_without_values_or_of_no_scale_is_refused() -> None:
    with pytest.raises(LoRAError, match="starts from the weight's values, and it is on meta"):
        register_lora(nn.Linear(9, 8, device="meta"), rank=2, init="pissa")
    with pytest.raises(LoRAError, match="aren't finite, at a scale of 0"):
        register_lora(nn.Linear(9, 8), rank=2, alpha=0, init="olora")


def trained(init: str = "pissa", **options: Any) -> tuple[nn.Sequential, nn.Sequential]:
    """Return a base, and a copy of it with an adapter that is away from its start."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(9, 8), Conv1D(7, 8)).eval()
    model = copy.deepcopy(base)
    register_lora(model, rank=3, alpha=5, init=init, **options)
    shake(model)
    return base, model


@pytest.mark.parametrize("scaling", ["lora", "rslora"])
@pytest.mark.parametrize("format", ["native", "peft", "kohya"])
def test_files_carry_it(format: str, scaling: str, tmp_path: Path) -> None:
    base, model = trained(scaling=scaling)
    x = torch.randn(4, 9)
    if format == "kohya":  # which has no place for a Conv1D
        base, model = base[:1], model[:1]
    path = tmp_path / ("folder" if format == "peft" else "file.safetensors")
    save_lora(model, path, format=format)
    load_lora(base, path)
    torch.testing.assert_close(base(x), model(x))
    delta = delta_of(base[0])
    anchored = format == "native"
    assert (delta.anchored, delta.rank) == (anchored, 3 if anchored else 6)
    assert anchored <= (file_summary(path).weights[0].rank == 3)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_loaded_one_counts_its_parameters_as_an_optimizers_state_does(
    kind: str, path: Path
) -> None:
    base, model = trained(kind=kind)
    save_lora(model, path)
    load_lora(base, path)
    names, loaded = ([name for name, _ in named_lora_parameters(each)] for each in (model, base))
    assert loaded == names


@each_init
def test_peft_gets_a_plain_pair(init: str, tmp_path: Path) -> None:
    base, model = trained(init)
    x = torch.randn(4, 9)
    save_lora(model, tmp_path, format="peft")
    with quiet():
        theirs = PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(output(theirs, x), output(model, x))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_pefts_folder_is_read_where_it_has_the_plain_base_under_it(
    init: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(9, 8)), torch.randn(4, 9)
    with quiet():
        config = LoraConfig(r=3, lora_alpha=5, target_modules=["0"], init_lora_weights=init)
        theirs = get_peft_model(copy.deepcopy(base), config)
        theirs.peft_config["default"].init_lora_weights = True
        theirs.save_pretrained(tmp_path / "start")
        theirs.peft_config["default"].init_lora_weights = init
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn(parameter.shape) / 9)
        theirs.save_pretrained(tmp_path / "trained")
        start = str(tmp_path / "start")
        theirs.save_pretrained(
            tmp_path / "converted", path_initial_model_for_weight_conversion=start
        )
        expected = output(theirs, x)
    with pytest.raises(FileError, match=f"init_lora_weights='{init}'.*path_initial_model_for"):
        load_lora(base, tmp_path / "trained")
    load_lora(base, tmp_path / "converted")
    torch.testing.assert_close(output(base, x), expected)


def test_state_goes_into_an_adapter_of_the_same_start_alone() -> None:
    _, source = trained()
    _, model = trained("milora")
    _, plain = trained("kaiming")
    load_lora_state_dict(model, lora_state_dict(source))
    x = torch.randn(4, 9)
    assert torch.equal(model(x), source(x))
    with pytest.raises(LoRAError, match=r"missing: 0.weight.default.lora_A; .*unexpected: .*start"):
        load_lora_state_dict(plain, lora_state_dict(source))


def test_damaged_tensors_of_an_anchored_pair_are_refused() -> None:
    delta = delta_of(trained()[1][0])
    state = {name: each for name, each in delta.state_dict().items() if name != "_extra_state"}
    for name, value, message in (
        ("start_B", state["start_B"][:, :2], r"start_A \(3, 9\) and start_B \(8, 2\) are no pair"),
        ("start_A", state["start_A"][:, :5], "aren't of the shapes of what moved"),
    ):
        with pytest.raises(LoRAError, match=message):
            type(delta).restore(state | {name: value}, delta.numbers)


def test_blocks_copies_and_merging_keep_it() -> None:
    base, model = trained()
    x = torch.randn(4, 9)
    delta, W = delta_of(model[0]), base[0].weight.detach()
    torch.testing.assert_close(delta.block(2, 5).value(W[2:5]), delta.value(W)[2:5])
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for each in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(each(x), model(x))
    before = model(x)
    merge_lora(model)
    torch.testing.assert_close(model(x), before)


def test_the_summary_counts_what_is_trained() -> None:
    _, model = trained()
    weight = lora_summary(model).weights[0]
    assert (weight.space, weight.adapters[0].rank, weight.adapters[0].parameters) == (
        "activation or weight, by cost",
        3,
        3 * (9 + 8),
    )


@each_case
def test_a_fresh_start_beside_a_trained_adapter_changes_nothing_but_rounding(case: Case) -> None:
    layer, inputs = case.build(torch.float64)
    case.adapt(layer, "a")
    shake(layer, "a")
    before = outputs(layer, inputs)
    case.adapt(layer, "b", init="olora")
    for got, want in zip(outputs(layer, inputs), before, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_olora_is_batched_over_a_stack() -> None:
    W = torch.randn(3, 6, 4, dtype=torch.float64)
    B, A = olora(W, 2, 2.0, None)
    one = olora(W[1], 2, 2.0, None)
    torch.testing.assert_close(B[1] @ A[1], one[0] @ one[1])
