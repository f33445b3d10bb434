"""The proof that the base was not changed."""

from __future__ import annotations

import copy
import hashlib

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from lora_param import (
    FrozenError,
    LoRAError,
    LoRAParametrization,
    assert_frozen,
    base_frozen,
    fingerprint,
    load_lora,
    lora_parameters,
    register_lora,
    remove_lora,
    save_lora,
)

from .cases import shake


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.LSTM(5, 4))


def test_a_digest_is_sha256_of_dtype_shape_and_bytes() -> None:
    layer = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -2.0]]))
    content = b"torch.float32 (1, 2) " + bytes.fromhex("0000803f000000c0")
    assert fingerprint(layer) == {"weight": hashlib.sha256(content).hexdigest()}


def test_it_is_the_same_before_during_and_after_adaptation() -> None:
    model = net()
    before = fingerprint(model)
    register_lora(model, rank=2)
    shake(model)
    assert fingerprint(model) == before
    remove_lora(model)
    assert fingerprint(model) == before


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_originals_under_a_foreign_parametrization_are_covered(norm) -> None:
    layer = norm(nn.Linear(6, 5))
    before = fingerprint(layer)
    register_lora(layer, rank=2)
    assert_frozen(layer, before)
    with torch.no_grad():
        next(p for p in layer.parametrizations.weight.parameters() if p.ndim == 2).add_(1)
    with pytest.raises(FrozenError, match=r"1 of [234]"):
        assert_frozen(layer, before)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.int64]
)
def test_every_dtype_and_layout_has_a_digest(dtype: torch.dtype) -> None:
    holder = nn.ParameterList(
        [nn.Parameter(torch.arange(12).view(4, 3).to(dtype), requires_grad=False)]
    )
    turned = copy.deepcopy(holder)
    turned[0].data = turned[0].data.t().contiguous().t()
    assert fingerprint(turned) == fingerprint(holder)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("0.weight", lambda t: t[4, 5].copy_(torch.nextafter(t[4, 5], torch.tensor(9.0)))),
        ("0.bias", lambda t: t.neg_()),
        ("1.weight", lambda t: t[0].fill_(float("nan"))),
        ("2.weight_hh_l0", lambda t: t.zero_()),
        ("2.bias_hh_l0", lambda t: t.mul_(2)),
    ],
)
def test_one_changed_original_is_found_and_named(name, change) -> None:
    model = net()
    tensors = dict(model.named_parameters())
    before = fingerprint(model)
    register_lora(model, rank=2)
    with torch.no_grad():
        change(tensors[name])
    with pytest.raises(FrozenError, match=rf"^1 of 11 originals changed: {name}$"):
        assert_frozen(model, before)


def test_every_changed_and_every_lost_original_is_named() -> None:
    model = net()
    before = fingerprint(model)
    with torch.no_grad():
        model[0].weight.add_(1)
        model[0].bias.add_(1)
    del model[1]
    message = (
        "^2 of 11 originals changed: 0.weight, 0.bias; 9 of 11 originals are gone: 1.weight, 1.b"
    )
    with pytest.raises(FrozenError, match=message):
        assert_frozen(model, before)


def test_a_negative_zero_is_a_change() -> None:
    layer = nn.Linear(2, 1)
    nn.init.zeros_(layer.bias)
    before = fingerprint(layer)
    layer.bias.data.neg_()
    with pytest.raises(FrozenError, match="bias"):
        assert_frozen(layer, before)


def test_it_fails_as_an_assertion_too() -> None:
    assert issubclass(FrozenError, AssertionError)


def test_buffers_are_covered_unless_left_out() -> None:
    model = net()
    with pytest.warns(UserWarning, match=r"1\.running_mean, .* training moves these buffers"):
        register_lora(model, rank=2, statistics=False)
    parameters, all_of_it = fingerprint(model, buffers=False), fingerprint(model)
    model(torch.randn(3, 6))
    assert_frozen(model, parameters)
    with pytest.raises(FrozenError, match=r"running_mean, 1\.running_var, 1\.num_batches"):
        assert_frozen(model, all_of_it)


def test_a_meta_tensor_has_no_fingerprint() -> None:
    with pytest.raises(LoRAError, match="on meta has no bytes of its own"):
        fingerprint(nn.Linear(3, 2, device="meta"))


def test_an_empty_tensor_has_one() -> None:
    assert len(fingerprint(nn.ParameterList([torch.empty(0, 3)]))) == 1


def test_base_frozen_passes_when_only_adapters_train() -> None:
    model = nn.Linear(6, 5)
    register_lora(model, rank=2)
    optimizer = torch.optim.SGD(lora_parameters(model), lr=0.1)
    with base_frozen(model):
        model(torch.randn(3, 6)).sum().backward()
        optimizer.step()


def test_base_frozen_names_what_moved() -> None:
    model = nn.Linear(6, 5)
    with pytest.raises(FrozenError, match="changed: weight"), base_frozen(model):
        model.weight.data.add_(1)


def test_base_frozen_lets_the_blocks_own_exception_through() -> None:
    model = nn.Linear(6, 5)

    def change_and_fail() -> None:
        model.weight.data.add_(1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), base_frozen(model):
        change_and_fail()


@pytest.mark.parametrize("nothing", [None, {}, "digest"])
def test_an_empty_fingerprint_proves_nothing(nothing) -> None:
    with pytest.raises(LoRAError, match="assert_frozen takes what fingerprint"):
        assert_frozen(nn.Linear(3, 2), nothing)


@pytest.mark.parametrize("model", [None, [], nn.Linear])
def test_what_is_no_module_has_no_fingerprint(model) -> None:
    with pytest.raises(LoRAError, match=r"takes a torch\.nn\.Module, got"):
        fingerprint(model)


def test_a_tensor_without_bytes_of_its_own_has_no_fingerprint() -> None:
    layer = nn.Linear(3, 2)
    layer.register_buffer("zero", torch._efficientzerotensor(3))
    fingerprint(layer, buffers=False)
    with pytest.raises(LoRAError, match=r"zero: .* has no bytes of its own"):
        fingerprint(layer)


def test_a_buffer_without_bytes_is_no_matter_to_a_file_that_does_not_name_it(tmp_path) -> None:
    model = nn.Linear(3, 2)
    twin = copy.deepcopy(model)
    for each in (model, twin):
        each.register_buffer("zero", torch._efficientzerotensor(3))
    register_lora(model, rank=1)
    shake(model)
    base = fingerprint(model, buffers=False)
    save_lora(model, tmp_path / "adapter.safetensors", base=base)
    assert load_lora(twin, tmp_path / "adapter.safetensors", base="require") == ["weight"]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.parametrize("sparse", [Tensor.to_sparse_coo, Tensor.to_sparse_csr])
def test_a_graph_in_a_sparse_buffer_is_proven_by_all_its_parts(sparse, tmp_path) -> None:
    def holding(graph: Tensor) -> nn.Module:
        layer = nn.Linear(3, 2)
        layer.register_buffer("graph", sparse(graph))
        return layer

    turned = torch.tensor([[1.0, 2, 0], [0, 0, 3]])
    graphs = [turned, turned * 2, turned.flip(0), turned.flip(1)]
    assert len({fingerprint(holding(graph))["graph"] for graph in graphs}) == len(graphs)
    model = holding(turned)
    register_lora(model, rank=1)
    shake(model)
    with base_frozen(model):
        save_lora(model, tmp_path / "adapter.safetensors")


def test_what_stands_behind_an_adapter_keeps_its_name() -> None:
    layer = nn.Linear(6, 5)
    register_lora(layer, rank=2)
    parametrizations.spectral_norm(layer)
    with base_frozen(layer):
        remove_lora(layer)


class Odd(LoRAParametrization):
    """An adapter with a module of its own."""

    def __init__(self) -> None:
        super().__init__(5, 6, rank=2)
        self.noise = nn.Dropout(0.0)


def test_an_adapter_anywhere_else_in_a_model_is_no_obstacle() -> None:
    model = nn.ModuleDict({"loose": LoRAParametrization(5, 6, rank=2), "layer": nn.Linear(6, 5)})
    before = fingerprint(model)
    assert list(before) == ["layer.weight", "layer.bias"]
    parametrize.register_parametrization(model["layer"], "weight", Odd())
    assert fingerprint(model).keys() == before.keys()
    assert_frozen(model, before)


def test_a_lazy_conjugate_or_negative_has_the_digest_of_its_values() -> None:
    z = torch.randn(4, 3, dtype=torch.complex64)
    for lazy, values in ((z.conj(), z.conj().resolve_conj()), (z.conj().imag, -z.imag)):
        plain, view = nn.Module(), nn.Module()
        plain.register_buffer("table", values)
        view.register_buffer("table", lazy)
        assert fingerprint(view, buffers=True) == fingerprint(plain, buffers=True)


def test_base_frozen_checks_buffers_unless_told_not_to() -> None:
    model = net()
    with base_frozen(model, buffers=False):
        model(torch.randn(3, 6))
    with pytest.raises(FrozenError, match="running_mean"), base_frozen(model):
        model(torch.randn(3, 6))


def test_a_part_of_what_fsdp_has_flattened_has_no_fingerprint() -> None:
    layer = nn.Linear(3, 2)
    layer.weight._fsdp_flattened = True
    with pytest.raises(LoRAError, match=r"weight: a Parameter .* has no bytes of its own"):
        fingerprint(layer)
