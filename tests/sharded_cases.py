"""Ways to spread an adapted model over two processes, for functions that these run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lora_param import load_lora_state_dict, lora_state_dict, register_lora, remove_lora
from lora_param.sharding import whole

from .cases import shake

ROWS = 4  # of the whole batch


def net(device: str = "cpu") -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8, device=device), nn.Tanh(), nn.Linear(8, 5, bias=False, device=device)
    )


def adapted(rank: int = 3) -> nn.Module:
    """Return the same model on every rank."""
    torch.manual_seed(1)
    model = net()
    register_lora(model, rank=rank)
    shake(model)
    return model


def distributed(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def sharded(model: nn.Module, mesh: Any = None, **options: Any) -> nn.Module:
    mesh = mesh or init_device_mesh("cpu", (2,))
    for each in (model[0], model):
        fully_shard(each, mesh=mesh, **options)
    return model


def offloaded(model: nn.Module) -> nn.Module:
    return sharded(model, offload_policy=CPUOffloadPolicy(pin_memory=False))


def mixed(model: nn.Module) -> nn.Module:
    return sharded(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.float32))


def split(model: nn.Module, mesh: Any = None, adapted: bool = True) -> nn.Module:
    """Split a model's layers; an adapted one's without adapters, which they then get again."""
    state = {name: t.clone() for name, t in lora_state_dict(model).items()} if adapted else {}
    if adapted:
        remove_lora(model)
    mesh = mesh or init_device_mesh("cpu", (2,))
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    if adapted:
        register_lora(model, rank=3)
        load_lora_state_dict(model, state)
    return model


def split_adapted(model: nn.Module) -> nn.Module:
    return split(model, adapted=False)


def crossed(shape: tuple[int, int]) -> Callable[[nn.Module], nn.Module]:
    def cross(model: nn.Module) -> nn.Module:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
        return sharded(split(model, mesh["tensor"]), mesh["data"])

    return cross


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DDP": distributed,
    "FSDP2": sharded,
    "FSDP2 offloaded": offloaded,
    "FSDP2 mixed": mixed,
    "tensor parallel": split,
    "adapted, then tensor parallel": split_adapted,
    "FSDP2 over tensor parallel": crossed((1, 2)),
    "FSDP2 and tensor parallel": crossed((2, 1)),
}

DATA_PARALLEL = {"DDP", "FSDP2", "FSDP2 offloaded", "FSDP2 mixed", "FSDP2 and tensor parallel"}
"""Those whose ranks see a half of the batch each."""


def trained(model: nn.Module, halved: bool, steps: int = 10) -> tuple[list[float], list[Tensor]]:
    """Return each step's loss on the whole batch, and the factors at the end."""
    data = torch.Generator().manual_seed(2)
    factors = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=0.05)
    losses = []
    for _ in range(steps):
        x = torch.randn(ROWS, 6, generator=data)
        if halved:
            x = x.chunk(2)[torch.distributed.get_rank()]
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        value = loss.detach().clone()
        if halved:
            torch.distributed.all_reduce(value)
        losses.append(float(value) / (2 if halved else 1))
    return losses, [whole(each.detach()) for each in factors]
