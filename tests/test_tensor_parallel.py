"""Layers that two processes hold in pieces by torch's and transformers' tensor parallelism."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from lora_param import (
    base_frozen,
    fingerprint,
    load_lora,
    load_lora_state_dict,
    lora_disabled,
    lora_merged,
    lora_parameters,
    lora_state_dict,
    register_lora,
    remove_lora,
    save_lora,
)
from lora_param.sharding import is_sharded, whole

from .cases import shake
from .ranks import Ranks
from .sharded_cases import net, split
from .test_trainers import examples, small_llama

pytestmark = pytest.mark.skipif(torch.__version__ < "2.7", reason="FSDP2 shards on CUDA alone")

KINDS: list[dict[str, Any]] = [
    {"rank": 3},
    {"rank": 3, "kind": "dora"},
    {"rank": 3, "init": "pissa"},
    {"rank": 3, "train": "0.bias"},
    {"rank": 3, "target": ["0.weight[2:5]", "2.weight[1:3]"]},
    {"target": (), "train": "*"},
]


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    y = model(x)
    own = [x, *lora_parameters(model)]
    return [y, *map(whole, torch.autograd.grad(y.float().square().sum(), own))]


def assert_same(got: list[Tensor], expected: list[Tensor], **tolerance: float) -> None:
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


def computes_the_same(options: dict[str, Any], first: bool, dtype: torch.dtype) -> None:
    """Compare a model with its twin in one process, adapted before or after it is split."""
    torch.manual_seed(1)
    x, plain = torch.randn(2, 6, dtype=dtype, requires_grad=True), net().to(dtype)
    model = copy.deepcopy(plain)
    register_lora(plain, **options)
    shake(plain)
    if first:
        model = split(copy.deepcopy(plain), adapted=False)
    else:
        register_lora(split(model, adapted=False), **options)
        load_lora_state_dict(model, {n: t.clone() for n, t in lora_state_dict(plain).items()})
    tolerance = {"rtol": 0.02, "atol": 0.02} if dtype is torch.bfloat16 else {}
    assert_same(results(model, x), results(plain, x), **tolerance)
    assert fingerprint(model) == fingerprint(plain)
    for name, tensor in lora_state_dict(model, full=True).items():
        assert torch.equal(tensor, lora_state_dict(plain)[name]), name
    for each in (model, plain):
        remove_lora(each)
    assert list(model.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(model(x), plain(x), **tolerance)


@pytest.mark.parametrize("first", [True, False], ids=["adapted first", "split first"])
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_every_kind_on_split_layers_computes_as_in_one_process(
    options: dict[str, Any], first: bool, ranks: Ranks
) -> None:
    ranks(computes_the_same, options, first, torch.float32)


@pytest.mark.parametrize("first", [True, False], ids=["adapted first", "split first"])
def test_split_layers_compute_in_bfloat16(first: bool, ranks: Ranks) -> None:
    ranks(computes_the_same, {"rank": 3}, first, torch.bfloat16)


def loads(path: Path, format: str) -> None:
    torch.manual_seed(1)
    plain, x = net(), torch.randn(2, 6)
    model = split(copy.deepcopy(plain), adapted=False)
    register_lora(plain, rank=3)
    shake(plain)
    own = path.with_name(f"{torch.distributed.get_rank()}")
    save_lora(plain, own, format=format)
    load_lora(model, own, base="require" if format == "native" else "ignore")
    torch.testing.assert_close(model(x), plain(x))
    assert lora_state_dict(model, full=True).keys() == lora_state_dict(plain).keys()


@pytest.mark.parametrize("format", ["native", "peft"])
def test_a_file_is_loaded_onto_split_layers(format: str, ranks: Ranks, tmp_path: Path) -> None:
    ranks(loads, tmp_path / "adapter", format)


class Block(nn.Module):
    """A norm on a part of the sequence each, in front of layers that are split."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.up(self.norm(x)).tanh())
        return y


def shares_a_sequence(first: bool) -> None:
    torch.manual_seed(1)
    plain, x = Block(), torch.randn(2, 4, 6)  # [batch, sequence, features]
    model = copy.deepcopy(plain)
    styles = {
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1)),
    }
    for each in (plain, model):
        if each is model and not first:
            parallelize_module(model, init_device_mesh("cpu", (2,)), styles)
        register_lora(each, rank=2, train="norm")
    if first:
        parallelize_module(model, init_device_mesh("cpu", (2,)), styles)
    shake(plain)
    load_lora_state_dict(model, {n: t.clone() for n, t in lora_state_dict(plain).items()})
    rank = torch.distributed.get_rank()
    y, expected = model(x.chunk(2, 1)[rank]), plain(x)
    torch.testing.assert_close(y, expected.chunk(2, 1)[rank])
    for loss, each in ((y.square().sum(), model), (expected.square().sum(), plain)):
        loss.backward()
        assert all(factor.grad is not None for factor in lora_parameters(each))
    for one, other in zip(lora_parameters(model), lora_parameters(plain), strict=True):
        torch.testing.assert_close(whole(one.grad), other.grad)


@pytest.mark.parametrize("first", [True, False], ids=["adapted first", "split first"])
def test_a_sequence_can_be_shared_out_too(first: bool, ranks: Ranks) -> None:
    ranks(shares_a_sequence, first)


def loads_by_plan(folder: Path) -> None:
    import transformers

    os.environ["WORLD_SIZE"] = "2"  # as torchrun says it
    options = {"tp_plan": "auto", "dtype": torch.float32}
    model = transformers.LlamaForCausalLM.from_pretrained(folder, **options)
    del os.environ["WORLD_SIZE"]
    plain = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for each in (model, plain):
        register_lora(each, rank=2, train="*.bias")
    shake(plain)
    load_lora_state_dict(model, {n: t.clone() for n, t in lora_state_dict(plain).items()})
    ids = torch.stack([each["input_ids"] for each in examples()])

    def loss(model: nn.Module) -> Tensor:
        found: Tensor = model(input_ids=ids, labels=ids).loss
        return found

    def assert_close() -> None:
        torch.testing.assert_close(loss(model), loss(plain), rtol=0, atol=1e-6)

    assert_close()
    expected = torch.autograd.grad(loss(plain), list(lora_parameters(plain)))
    got = torch.autograd.grad(loss(model), list(lora_parameters(model)))
    assert_same([whole(each) for each in got], list(expected))
    assert fingerprint(model) == fingerprint(plain)
    layer = model.model.layers[0].mlp.up_proj
    assert is_sharded(layer.parametrizations.weight.original)
    with torch.no_grad(), base_frozen(model):
        assert_close()
        assert is_sharded(layer.weight)
        with lora_disabled(model), lora_disabled(plain):
            assert_close()
        with lora_merged(model), lora_merged(plain):
            assert_close()


@pytest.mark.filterwarnings("ignore")  # of the library, about its next names
def test_transformers_splits_by_its_plan(ranks: Ranks, tmp_path: Path) -> None:
    pytest.importorskip("transformers", minversion="5.0")  # older plans keep no whole
    small_llama(num_key_value_heads=2, attention_bias=True, mlp_bias=True).save_pretrained(tmp_path)
    ranks(loads_by_plan, tmp_path)
