"""Digests of what two processes hold in pieces: those of the whole, which is on neither."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_param import LoRAError, fingerprint, lora_state_dict, register_lora, save_lora
from lora_param.frozen import digest_of

from .ranks import Ranks

pytestmark = pytest.mark.skipif(torch.__version__ < "2.7", reason="FSDP2 shards on CUDA alone")


class Largest(TorchDispatchMode):
    """Notes how many bytes the largest tensor has that is made."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if type(result) is Tensor and not result.is_meta:
            self.size = max(self.size, result.nbytes)
        return result


def net(dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Module:
    """Build layers of 16, 9 and 1 rows, of which two processes have 8, 5 or 4, and 1 or none."""
    layers = nn.Linear(32, 16), nn.Conv1d(4, 9, 3), nn.Linear(9, 1)
    return nn.Sequential(*layers).to(device, dtype)


def is_proved_in_pieces(dtype: torch.dtype, options: dict[str, Any]) -> None:
    model = net(dtype)
    expected = fingerprint(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)), **options)
    with Largest() as largest:
        assert fingerprint(model) == expected
    assert largest.size <= 32 * 16 * dtype.itemsize // 2


@pytest.mark.parametrize("options", [{}, {"offload_policy": CPUOffloadPolicy(pin_memory=False)}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_fingerprint_is_the_wholes_and_no_rank_holds_that(
    dtype: torch.dtype, options: dict[str, Any], ranks: Ranks
) -> None:
    ranks(is_proved_in_pieces, dtype, options)


def is_digested(
    shape: tuple[int, ...],
    mesh: tuple[int, ...],
    placements: list[Any],
    dtype: torch.dtype = torch.float32,
) -> None:
    value = torch.randn(shape).to(dtype)
    laid = distribute_tensor(value, init_device_mesh("cpu", mesh), placements, src_data_rank=None)
    assert digest_of("x", laid) == digest_of("x", value)


@pytest.mark.parametrize(
    ("shape", "mesh", "placements"),
    [
        ((5, 3), (2,), [Shard(0)]),
        ((1,), (2,), [Shard(0)]),
        ((0, 3), (2,), [Shard(0)]),
        ((5, 3), (2,), [Shard(1)]),
        ((5, 3), (2,), [Replicate()]),
        ((), (2,), [Replicate()]),
        ((5, 3), (1, 2), [Replicate(), Shard(0)]),
        ((5, 3), (2, 1), [Shard(0), Replicate()]),
        ((5, 3), (1, 2), [Shard(0), Shard(0)]),
        ((5, 3), (2, 1), [Shard(1), Shard(0)]),
    ],
    ids=str,
)
def test_however_a_tensor_is_laid_out_its_digest_is_the_wholes(
    shape: tuple[int, ...], mesh: tuple[int, ...], placements: list[Any], ranks: Ranks
) -> None:
    ranks(is_digested, shape, mesh, placements)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int16, torch.float8_e4m3fn, torch.complex64])
def test_rows_of_any_dtype_are_digested_in_pieces(dtype: torch.dtype, ranks: Ranks) -> None:
    ranks(is_digested, (5, 3), (2,), [Shard(0)], dtype)


def has_no_values_yet(path: Any) -> None:
    model = net(device="meta")
    register_lora(model, rank=2, target="0")
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    for verb in (fingerprint, lambda model: save_lora(model, path)):
        with pytest.raises(
            LoRAError,
            match=r"0\.weight: .* has no bytes of its own|0\.weight: its tensors have no values",
        ):
            verb(model)
    assert all(each.is_meta for each in lora_state_dict(model, full=True).values() if each.ndim > 1)


def test_what_is_sharded_on_meta_is_refused_as_what_has_no_values(ranks: Ranks, path: Any) -> None:
    ranks(has_no_values_yet, path)
