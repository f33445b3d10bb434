"""What can't be adapted is refused with its reason, before anything is changed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from lora_param import (
    LoRAError,
    TargetError,
    lora_parameters,
    merge_lora,
    register_lora,
    remove_lora,
)

from .cases import shake


class Holder(nn.Module):
    """Holds one parameter under a name of its own."""

    def __init__(self, parameter: nn.Parameter | None) -> None:
        super().__init__()
        self.table = parameter


def traced() -> nn.Module:
    return torch.fx.symbolic_trace(Multiplied(nn.Parameter(torch.ones(4, 3))))


class Multiplied(Holder):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.table


def hooked(norm: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch deprecates its hooks
            return norm(nn.Linear(6, 5))

    return make


def without_weight() -> nn.Module:
    layer = nn.Linear(6, 5)
    layer.register_parameter("weight", None)
    return layer


class Packed(torch.Tensor):
    """Stands for the quantised tensors of other libraries: it can be held, not added to."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.add, torch.add, torch.Tensor.__add__):
            raise NotImplementedError
        return super().__torch_function__(func, types, args, kwargs or {})


class Taken(nn.Linear):
    """Has something of its own where torch keeps parametrizations."""

    def __init__(self) -> None:
        super().__init__(6, 5)
        self.parametrizations = nn.Parameter(torch.ones(3, 3))


def built_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return nn.Linear(6, 5)


def sparse(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Embedding(7, 5, **options)


def held(tensor: torch.Tensor) -> Callable[[], nn.Module]:
    return lambda: Holder(nn.Parameter(tensor, requires_grad=False))


REFUSED: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "integer": (held(torch.ones(4, 3, dtype=torch.int64)), "table", "float64, got int64; convert"),
    "complex": (held(torch.ones(4, 3, dtype=torch.complex64)), "table", "got complex64; convert"),
    "float8": (held(torch.ones(4, 3).to(torch.float8_e4m3fn)), "table", "got float8_e4m3fn"),
    "boolean": (held(torch.ones(4, 3, dtype=torch.bool)), "table", "got bool"),
    "sparse": (held(torch.eye(4).to_sparse()), "table", "layout must be strided, got torch.sparse"),
    "None": (without_weight, None, "weight: it is None; give the module a Parameter"),
    "None named": (without_weight, "weight", "weight: it is None; give the module a Parameter"),
    "vector": (held(torch.ones(4)), "table", "matches only 0.table: an adapter needs a tensor of two"),
    "lazy": (lambda: nn.LazyLinear(5), None, "weight: it is lazy and has no shape yet; run one"),
    "weight_norm": (hooked(nn.utils.weight_norm), None, "the forward hook WeightNorm sets this"),
    "weight_norm's v": (hooked(nn.utils.weight_norm), "weight_v", "the forward hook WeightNorm"),
    "pruning's original": (lambda: prune.l1_unstructured(nn.Linear(6, 5), "weight", 0.5), "weight_orig", "the forward hook L1Unstructured"),
    "spectral_norm": (hooked(nn.utils.spectral_norm), None, "the forward hook SpectralNorm sets"),
    "pruning": (lambda: prune.l1_unstructured(nn.Linear(6, 5), "weight", 0.5), None, "the forward hook L1Unstructured"),
    "max_norm": (sparse(max_norm=1.0), "weight", "max_norm renormalises the original at every"),
    "sparse gradient": (sparse(sparse=True), "weight", "sparse gradients can't pass through"),
    "quantised": (lambda: Holder(nn.Parameter(torch.ones(4, 3).as_subclass(Packed))), "table", "a Packed can't be added to a plain tensor; dequantize it"),
    "name taken": (Taken, None, 'something else called "parametrizations"'),
    "made for inference": (built_in_inference_mode, None, r"it was made in torch.inference_mode"),
    "empty": (lambda: Holder(nn.Parameter(torch.ones(0, 4, 3))), "table", r"0\.table: it has no elements, or exclude"),
    "traced graph": (traced, "table", "a traced graph can't be parametrized"),
    "no weight": (lambda: nn.ReLU(), None, "target=None finds no linear, convolution"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_weight_that_cannot_be_adapted_is_refused(case: str) -> None:
    make, target, message = REFUSED[case]
    model = nn.Sequential(make(), *([nn.Linear(5, 4)] if case != "no weight" else []))
    before = [(name, type(each), sorted(vars(each))) for name, each in model.named_modules()]
    with pytest.raises(TargetError, match=message):
        register_lora(model, rank=1, target=None if target is None else [target, "1"])
    assert [(n, type(each), sorted(vars(each))) for n, each in model.named_modules()] == before


def test_a_scripted_module_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates scripting
        model = torch.jit.script(nn.Linear(6, 5))
    with pytest.raises(LoRAError, match="can't be called on a ScriptModule: its code is compiled"):
        register_lora(model, rank=1, target="weight")


@pytest.mark.parametrize("verb", [register_lora, remove_lora, merge_lora])
@pytest.mark.parametrize("model", [None, "net", torch.ones(2), nn.Linear])
def test_what_is_no_module_is_refused(verb: Callable[[Any], Any], model: Any) -> None:
    with pytest.raises(LoRAError, match=f"{verb.__name__} takes a torch.nn.Module, got"):
        verb(model)


@pytest.mark.parametrize("verb", [register_lora, remove_lora, merge_lora])
def test_inference_mode_is_refused(verb: Callable[[nn.Module], Any]) -> None:
    model = nn.Linear(9, 8)
    with torch.inference_mode(), pytest.raises(LoRAError, match=r"torch\.inference_mode"):
        verb(model)
    assert type(model) is nn.Linear


def distributed(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def fully_sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    ("wrap", "name"),
    [(distributed, "a DistributedDataParallel"), (fully_sharded, "what FSDP shards")],
)
@pytest.mark.parametrize("verb", [register_lora, remove_lora, merge_lora])
@pytest.mark.parametrize("outer", [lambda model: model, nn.Sequential])
def test_a_wrapped_or_sharded_model_is_refused(wrap, name, verb, outer) -> None:
    model = outer(wrap(nn.Linear(9, 8)))
    with pytest.raises(LoRAError, match=f"{verb.__name__} can't be called on {name}: it"):
        verb(model)


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore:DTensor random operators may not have complete support")
def test_a_split_that_fails_leaves_the_adapters() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_module

    def fail(name: str, module: nn.Module, mesh: object) -> None:
        assert type(module) is nn.Linear
        raise ValueError("no such style")

    model, x = nn.Linear(9, 8, bias=False), torch.randn(2, 9)
    register_lora(model, rank=2)
    shake(model)
    expected = model(x)
    with pytest.raises(ValueError, match="no such style"):
        distribute_module(model, init_device_mesh("cpu", (1,)), fail)
    assert torch.equal(model(x), expected)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    "wrap",
    [
        distributed,
        pytest.param(
            fully_sharded,
            marks=pytest.mark.skipif(torch.__version__ < "2.7", reason="shards on CUDA alone"),
        ),
    ],
)
def test_wrapping_after_registering_gives_the_gradients_of_one_process(wrap) -> None:
    model, x = nn.Linear(9, 8), torch.randn(3, 9)
    register_lora(model, rank=2)
    model(x).square().sum().backward()
    alone = [factor.grad.clone() for factor in lora_parameters(model)]
    model.zero_grad()
    wrap(model)(x).square().sum().backward()
    for factor, expected in zip(lora_parameters(model), alone, strict=True):
        gradient = getattr(factor.grad, "full_tensor", lambda: factor.grad)()  # noqa: B023
        torch.testing.assert_close(gradient, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch deprecates scripting
def test_scripting_an_adapted_model_fails_at_once() -> None:
    model = nn.Linear(9, 8)
    register_lora(model, rank=2)
    with pytest.raises((RuntimeError, torch.jit.frontend.NotSupportedError)):
        torch.jit.script(model)


def test_a_weight_that_another_parametrization_makes_unreadable_is_refused() -> None:
    layer = nn.Linear(6, 6)
    register_lora(layer, rank=2)
    parametrizations.orthogonal(layer)  # behind any parametrization, torch's own code fails to read
    with pytest.raises(TargetError, match=r"weight: reading it through LoRA.*, _Orthogonal fails"):
        register_lora(layer, rank=2, adapter="b")
    remove_lora(layer)
    assert [type(entry).__name__ for entry in layer.parametrizations.weight] == ["_Orthogonal"]


class ScriptModule(nn.Linear):
    """Is called like a class of torch's."""


def test_a_class_that_is_only_called_like_torchs_can_be_adapted() -> None:
    assert register_lora(ScriptModule(9, 8), rank=2) == ["weight"]
