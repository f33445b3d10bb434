"""Tensors that several processes hold in pieces: torch's `DTensor`, which stands for the whole.

Here is what crosses over between these and plain tensors, for which all ranks of a mesh call it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from .errors import LoRAError


def is_sharded(tensor: object) -> bool:
    """Say whether a tensor is one rank's piece of a whole."""
    module: Any = sys.modules.get("torch.distributed.tensor")  # without which there is none
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Any) -> Tensor:
    """Return a tensor with all its entries, gathered from every rank."""
    if is_sharded(tensor):  # offloaded pieces first go where their mesh can send them
        device = tensor.device if tensor.is_meta else tensor.device_mesh.device_type
        tensor = tensor.detach().to(device).full_tensor()
    return cast("Tensor", tensor)


def pieces_of(tensor: Any) -> Iterator[Tensor]:
    """Yield what has a tensor's bytes in their order: of one cut by rows each rank's, in turn."""
    own, placements = own_piece(tensor.detach()), getattr(tensor, "placements", ())
    cut = [dim for dim, placement in enumerate(placements) if not placement.is_replicate()]
    plain = type(own) is Tensor and not own.is_meta
    if len(cut) != 1 or not (placements[cut[0]].is_shard(0) and plain):
        yield whole(tensor)
        return
    mesh = tensor.device_mesh
    own = own.to(mesh.device_type).contiguous().unsqueeze(-1).view(torch.uint8)
    group, distributed = mesh.get_group(cut[0]), torch.distributed
    counts = map(len, torch.empty(len(tensor), device="meta").chunk(mesh.size(cut[0])))
    for rank, count in enumerate(counts):  # the last ranks may have none
        mine = rank == mesh.get_local_rank(cut[0])
        piece = own if mine else own.new_empty(count, *own.shape[1:])
        distributed.broadcast(piece, distributed.get_global_rank(group, rank), group)
        yield piece


def own_piece(tensor: Any) -> Tensor:
    """Return this rank's piece of a tensor."""
    return cast("Tensor", tensor.to_local() if is_sharded(tensor) else tensor)


def in_its_forward(module: nn.Module, value: Any) -> Tensor:
    """Return a weight as a forward of transformers' takes it without gradients: its own piece."""
    maker = getattr(module.__dict__["forward"], "__module__", "")
    theirs = maker == "transformers.distributed.tensor_parallel" and not torch.is_grad_enabled()
    if not (theirs and is_sharded(value) and sys._getframe(3).f_code is nn.Linear.forward.__code__):
        return cast("Tensor", value)  # anybody else who reads it gets the whole
    # Outputs are summed over the ranks where a bias is whole on each.
    summed = value.ndim == 1 and all(each.is_replicate() for each in value.placements)
    return own_piece(value) / (value.device_mesh.size() if summed else 1)


def spread(value: Any, like: Any, placements: Any = None) -> Tensor:
    """Lay out a tensor, the first rank's if it is whole, as another is, or over its mesh."""
    if not is_sharded(like):
        return whole(value)
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, placements or like.placements
    if is_sharded(value):
        laid = value.redistribute(mesh, placements)
    else:
        laid = distribute_tensor(value.detach().to(mesh.device_type), mesh, placements)
    return cast("Tensor", laid.to(like.device))


def lay_out(module: nn.Module, weight: Any, along: Callable[[str, int], int | None]) -> None:
    """Shard a module's tensors as a weight is; `along` says which dimension is along one of it."""
    from torch.distributed.tensor import Replicate, Shard

    tables: Any = module._parameters, module._buffers
    for table in tables:
        for name, tensor in table.items():
            dims = [along(name, p.dim) if p.is_shard() else None for p in weight.placements]
            cut = [None if dim is None or tensor.shape[dim] == 1 else dim for dim in dims]
            placements = [Replicate() if dim is None else Shard(dim) for dim in cut]
            laid = spread(tensor.detach(), weight, placements)
            own = isinstance(tensor, nn.Parameter)
            table[name] = nn.Parameter(laid, tensor.requires_grad) if own else laid


def news(value: object, like: Any) -> Tensor | None:
    """Lay out what the first rank has to load into a sharded tensor; `None` if it has nothing."""
    from torch.distributed.tensor import Replicate

    fits = isinstance(value, Tensor) and value.shape == like.shape and not is_sharded(value)
    if not own_piece(
        spread(torch.tensor(float(fits)), like, [Replicate()] * like.device_mesh.ndim)
    ):
        return None
    full: Any = value if fits else torch.empty(like.shape)
    return spread(full.to(like.dtype), like)


def mesh_of(tensors: Iterable[Any]) -> Any:
    """Return the mesh that holds the first of the tensors that are sharded; `None` without any."""
    return next((each.device_mesh for each in tensors if is_sharded(each)), None)


@contextmanager
def alike(mesh: Any) -> Iterator[bool]:
    """Raise on every rank of a mesh what one raises in a block; say whether this is the first."""
    fault = None
    try:  # in which no rank may wait for another
        yield mesh is None or not any(mesh.get_coordinate())
    except Exception as error:  # of any, because the others would wait for the rank that has left
        fault = error
        if not (mesh is None or isinstance(error, LoRAError)):
            fault = LoRAError(repr(error)).with_traceback(error.__traceback__)
    for dim in range(0 if mesh is None else mesh.ndim):
        faults: list[Exception | None] = [None] * mesh.size(dim)
        torch.distributed.all_gather_object(faults, fault, group=mesh.get_group(dim))
        fault = fault or next(filter(None, faults), None)
    if fault is not None:
        raise fault
