"""The base beneath the adapters: its parameters, freezing them, and proof that they stayed."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from .classes import chains_of
from .errors import FrozenError, LoRAError
from .parametrization import LoRAParametrization
from .surgery import check_module, original_of, tensor_names, without_wrappers


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Yield name, owner, name in the owner and tensor of every parameter that is no adapter's.

    The name is the one that the plain model gives it: `"linear1.weight"`, adapted or not.
    """
    for path, module in _base_paths(model):
        for name in tensor_names(module):
            # A chain's one original goes by its owner's name.
            if isinstance(module, ParametrizationList) and name == "original":
                continue
            if isinstance(tensor := original_of(module, name), nn.Parameter):
                yield f"{path}.{name}" if path else name, module, name, tensor


def _base_paths(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module but the adapters, with the path that it has without them."""
    check_module(model, "a call about the base")
    base_path: dict[str, str] = {}
    entries: dict[str, list[nn.Module]] = {}
    for path, module in model.named_modules():
        parent, _, name = path.rpartition(".")
        if isinstance(module, LoRAParametrization) or (parent and parent not in base_path):
            continue
        if parent in entries and module in entries[parent]:
            name = str(entries[parent].index(module))  # its number in the chain without adapters
        if isinstance(module, ParametrizationList):
            entries[path] = [e for e in module if not isinstance(e, LoRAParametrization)]
        base_path[path] = without_wrappers(f"{base_path[parent]}.{name}" if parent else name)
        yield base_path[path], module


def freeze(model: nn.Module) -> None:
    """Freeze every parameter that is no adapter's, clear its gradient and remember its flag.

    The gradient is cleared because an optimizer built earlier would still apply it.
    """
    for _, owner, name, tensor in base_parameters(model):
        if tensor.requires_grad:
            owner.__dict__["_lora_frozen"] = (*owner.__dict__.get("_lora_frozen", ()), name)
            tensor.requires_grad_(False)
        tensor.grad = None


def is_frozen(model: nn.Module) -> bool:
    """Say whether `freeze` has frozen anything that `thaw` would give back."""
    return any("_lora_frozen" in module.__dict__ for module in model.modules())


def thaw(model: nn.Module) -> None:
    """Give every parameter that `freeze` froze its flag back."""
    for module in model.modules():
        for name in module.__dict__.pop("_lora_frozen", ()):
            if (tensor := original_of(module, name)) is not None:
                tensor.requires_grad_(True)


def fingerprint(model: nn.Module, *, buffers: bool = False) -> dict[str, str]:
    """Return the SHA-256 digest of each original, over its bytes, dtype and shape.

    Args:
        model: A plain or an adapted model, on any device but meta. Adapters are left out, so the
            fingerprint is the same before `register_lora`, after it and after `remove_lora`.
        buffers: Include buffers, such as the running statistics of a batch norm, which move
            whenever the model runs in training mode.

    Returns:
        Hexadecimal digests by the parameters' names in the plain model, `"linear1.weight"`.

    Raises:
        LoRAError: A tensor has no bytes of its own: on the meta device, sparse, sharded, wrapped.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 2)
        >>> before = fingerprint(model)
        >>> sorted(before), len(before["weight"])
        (['bias', 'weight'], 64)

    Source:
        FIPS 180-4 for SHA-256.
    """
    originals = _originals(model, buffers)
    return {name: digest_of(name, tensor) for name, tensor in originals.items()}


def assert_frozen(model: nn.Module, fingerprint: Mapping[str, str]) -> None:
    """Raise unless every original in a fingerprint still has the same bytes, dtype and shape.

    Args:
        model: The model, adapted or plain.
        fingerprint: What `fingerprint(model)` returned earlier.

    Raises:
        FrozenError: Names every original that changed and every one that is gone.
        LoRAError: The fingerprint is empty, or none.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 2)
        >>> before = fingerprint(model)
        >>> assert_frozen(model, before)
        >>> _ = model.bias.data.add_(1)
        >>> assert_frozen(model, before)
        Traceback (most recent call last):
        ...
        lora_param.errors.FrozenError: 1 of 2 originals changed: bias
    """
    if not isinstance(fingerprint, Mapping) or not fingerprint:
        raise LoRAError(
            "assert_frozen takes what fingerprint(model) returned, got nothing to compare"
        )
    now = _originals(model, buffers=True)
    gone = [name for name in fingerprint if name not in now]
    changed = [
        name
        for name, digest in fingerprint.items()
        if name in now and digest_of(name, now[name]) != digest
    ]
    complaints = []
    if changed:
        complaints.append(
            f"{len(changed)} of {len(fingerprint)} originals changed: {', '.join(changed)}"
        )
    if gone:
        complaints.append(
            f"{len(gone)} of {len(fingerprint)} originals are gone: {', '.join(gone)}"
        )
    if complaints:
        raise FrozenError("; ".join(complaints))


@contextmanager
def base_frozen(model: nn.Module, *, buffers: bool = False) -> Iterator[None]:
    """Check that a block leaves every original as it was, to the bit.

    Args:
        model: The model, adapted or plain; it may gain or lose adapters in the block.
        buffers: Check buffers too.

    Raises:
        FrozenError: Names every original that changed. An exception of the block's own passes
            through instead.

    Example:
        >>> import torch
        >>> from lora_param import lora_parameters, register_lora
        >>> model = torch.nn.Linear(3, 2)
        >>> _ = register_lora(model, rank=1)
        >>> optimizer = torch.optim.SGD(lora_parameters(model), lr=0.1)
        >>> with base_frozen(model):
        ...     model(torch.ones(1, 3)).sum().backward()
        ...     optimizer.step()
    """
    before = fingerprint(model, buffers=buffers)
    yield
    assert_frozen(model, before)


def _originals(model: nn.Module, buffers: bool) -> dict[str, Tensor]:
    tensors = {name: tensor for name, _, _, tensor in base_parameters(model)}
    for path, module in _base_paths(model) if buffers else ():
        found = {name: each for name, each in module._buffers.items() if each is not None}
        found |= {
            name: each
            for name in chains_of(module)
            if (each := original_of(module, name)) is not None
        }
        if isinstance(module, ParametrizationList):
            found.pop("original", None)
        tensors |= {f"{path}.{name}" if path else name: each for name, each in found.items()}
    return tensors


def bytes_of(name: str, tensor: Tensor) -> Any:
    """Return a tensor's bytes, to hash or write, without a copy, and without numpy.

    Raises:
        LoRAError: It has none of its own: on the meta device, sparse, sharded, wrapped.
    """
    plain = type(tensor) in (Tensor, nn.Parameter, nn.Buffer) and tensor.layout is torch.strided
    size = tensor.numel() * tensor.element_size() if plain else 0
    if plain and not tensor.is_meta:
        tensor = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    if not plain or tensor.is_meta or (size and not tensor.data_ptr()):
        raise LoRAError(
            f"{name}: a {type(tensor).__name__} of {tensor.layout} on {tensor.device} has no bytes "
            "of its own; do this before the model is sharded or converted"
        )
    if not size:
        return b""
    content: Any = (ctypes.c_char * size).from_address(tensor.data_ptr())
    content.tensor = tensor  # keeps the memory
    return content


def digest_of(name: str, tensor: Tensor) -> str:
    """Return the SHA-256 digest of a tensor, over its bytes, dtype and shape."""
    content = bytes_of(name, tensor)
    found = digest(tensor.dtype, tensor.shape)
    found.update(content)
    return found.hexdigest()


def digest(dtype: torch.dtype, shape: Sequence[int]) -> hashlib._Hash:
    """Begin the digest of a tensor, which its bytes then go through."""
    return hashlib.sha256(f"{dtype} {tuple(shape)} ".encode())
