"""The base beneath the deltas: freezing it, and the proof that it stayed as it was."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from .checks import walk
from .deltas.protocol import Delta
from .errors import FrozenError, LoRAError, TargetError
from .quantised import parts_of
from .sharding import pieces_of
from .targets import matches
from .undo import keep_entries, set_flags
from .walk import Walk
from .weight import Weight

FROZEN = "_lora_frozen"
"""Where a module keeps the holds on its parameters that `freeze` has frozen, by their names."""


class Hold(WeakSet[Delta]):
    """The deltas that keep parameters frozen until the last one has gone, in whichever module."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return Hold, ()  # the deltas of a copy join it by themselves


def freeze(walk: Walk, undo: ExitStack) -> None:
    """Freeze the base and clear its gradients, which an optimizer built earlier would apply."""
    hold, flagged = Hold(), [weight for weight, each in walk.parameters if each.requires_grad]
    keep_entries(undo, *[(weight.module.__dict__, [FROZEN]) for weight in flagged])
    for weight in flagged:
        notes = weight.module.__dict__
        notes[FROZEN] = {**notes.get(FROZEN, {}), weight.tensor: hold}
    set_flags(undo, [tensor for _, tensor in walk.parameters], False)


def hold_frozen(walk: Walk, deltas: Iterable[Delta]) -> None:
    """Let deltas keep frozen what is frozen."""
    holds = {hold for each in walk.owners for hold in each.__dict__.get(FROZEN, {}).values()}
    for delta in deltas:
        delta.__dict__["_holds"] = holds
        for hold in holds:
            hold.add(delta)


def let_go(delta: Delta, undo: ExitStack) -> None:
    """Let a delta keep nothing frozen any more."""
    for hold in delta._holds:
        undo.callback(hold.add, delta)
        hold.discard(delta)


def is_over(walk: Walk) -> bool:
    """Say whether `thaw` would give anything back."""
    return not all(h for each in walk.owners for h in each.__dict__.get(FROZEN, {}).values())


def thaw(walk: Walk, undo: ExitStack) -> None:
    """Give every parameter that nothing holds frozen any more its flag back."""
    for module, path in walk.owners.items():
        holds: dict[str, Hold] = module.__dict__.get(FROZEN, {})
        if free := [name for name, hold in holds.items() if not hold]:
            keep_entries(undo, (module.__dict__, [FROZEN]))
            del module.__dict__[FROZEN]
            if held := {name: holds[name] for name in holds if name not in free}:
                module.__dict__[FROZEN] = held
            originals = [Weight(path, module, name).original for name in free]
            set_flags(undo, [tensor for tensor in originals if tensor is not None], True)


def fingerprint(model: nn.Module, *, buffers: bool = True) -> dict[str, str]:
    """Return the SHA-256 digest of each original, over its bytes, dtype and shape.

    Adapters don't count: it is the same before `register_lora` and after it.

    Returns:
        Hexadecimal digests by name in the plain model's state dict, with or without `buffers`.

    Raises:
        LoRAError: A tensor has no bytes of its own: on the meta device, sharded, wrapped.

    Example:
        >>> {name: len(digest) for name, digest in fingerprint(torch.nn.Linear(3, 2)).items()}
        {'weight': 64, 'bias': 64}
    """
    tensors = walk(model, "fingerprint").tensors
    kept = [(w.name, each) for w, each in tensors if buffers or isinstance(each, nn.Parameter)]
    return {name: digest_of(name, each) for name, each in kept}


def assert_frozen(model: nn.Module, fingerprint: Mapping[str, str]) -> None:
    """Raise unless every original in a fingerprint still has the same bytes, dtype and shape.

    Raises:
        FrozenError: Names every original that changed and every one that is gone.
        LoRAError: The fingerprint is empty, or none.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> before = fingerprint(model)
        >>> _ = model.bias.data.add_(1)
        >>> assert_frozen(model, before)
        Traceback (most recent call last):
        ...
        lora_param.errors.FrozenError: 1 of 2 originals changed: bias
    """
    if not isinstance(fingerprint, Mapping) or not fingerprint:
        rule = "assert_frozen takes what fingerprint(model) returned"
        raise LoRAError(f"{rule}, got nothing to compare")
    now = {weight.name: each for weight, each in walk(model, "assert_frozen").tensors}
    gone = [name for name in fingerprint if name not in now]
    there = [name for name in fingerprint if name in now]
    changed = [name for name in there if digest_of(name, now[name]) != fingerprint[name]]
    complaints = [
        f"{len(names)} of {len(fingerprint)} originals {what}: {', '.join(names)}"
        for what, names in (("changed", changed), ("are gone", gone))
        if names
    ]
    if moved := [name for name in changed if not isinstance(now[name], nn.Parameter)]:
        fix = "keep them in eval mode, or leave these out (exclude=, buffers=False)"
        complaints.append(f"{moved[0]} is a buffer, which its module may move in training; {fix}")
    if complaints:
        raise FrozenError("; ".join(complaints))


@contextmanager
def base_frozen(
    model: nn.Module, *, buffers: bool = True, exclude: str | Sequence[str] = ()
) -> Iterator[None]:
    """Check that a block leaves every original as it was, to the bit, unless it raises.

    The model may gain or lose adapters in the block. `buffers=False` leaves its buffers out, and
    `exclude`, of one pattern or several as `register_lora` takes them, what these match.

    Raises:
        TargetError: A pattern matches nothing.
        FrozenError: Names every original that changed.

    Example:
        >>> optimizer = torch.optim.SGD(lora_parameters(model), lr=0.1)
        >>> with base_frozen(model):
        ...     model(torch.ones(1, 3)).sum().backward()
        ...     optimizer.step()
    """
    before = fingerprint(model, buffers=buffers)
    weights = [weight for weight, _ in walk(model, "base_frozen").tensors]
    for pattern in [exclude] if isinstance(exclude, str) else exclude:
        hits = [weight.name for weight in weights if matches(pattern, weight)]
        if not hits:
            raise TargetError(f'exclude "{pattern}" matches no original; mend it, or drop it')
        for name in hits:
            before.pop(name, None)
    yield
    assert_frozen(model, before)


def bytes_of(name: str, tensor: Tensor) -> Any:
    """Return a tensor's bytes, to hash or write, without a copy, or raise if it has none."""
    plain = type(tensor) in (Tensor, nn.Parameter, nn.Buffer) and tensor.layout is torch.strided
    # As DeepSpeed and FSDP mark what they leave a part of, or nothing, in its place.
    whole = getattr(tensor, "ds_shape", tensor.shape) == tensor.shape
    size, there = tensor.numel() * tensor.element_size(), plain and whole and not tensor.is_meta
    if there := there and not hasattr(tensor, "_fsdp_flattened"):
        tensor = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    if not there or (size and not tensor.data_ptr()):
        what = f"a {type(tensor).__name__} of {tensor.layout} on {tensor.device}"
        fix = "do this before the model is sharded, offloaded or converted"
        raise LoRAError(f"{name}: {what} has no bytes of its own; {fix}")
    if not size:
        return b""
    content: Any = (ctypes.c_char * size).from_address(tensor.data_ptr())
    content.tensor = tensor  # keeps the memory
    return content


def digest_of(name: str, tensor: Tensor) -> str:
    """Return the SHA-256 digest of a tensor, over its bytes, dtype and shape."""
    found = digest(tensor.dtype, tensor.shape)
    for piece in pieces_of(tensor):
        if piece.layout is torch.sparse_coo:
            parts = [piece._indices(), piece._values()]
        elif piece.layout is torch.sparse_csr:
            parts = [piece.crow_indices(), piece.col_indices(), piece.values()]
        else:
            parts = parts_of(piece)
        for part in parts:
            found.update(bytes_of(name, part))
    return found.hexdigest()


def digest(dtype: torch.dtype, shape: Sequence[int]) -> hashlib._Hash:
    """Begin the digest of a tensor, which its bytes then go through."""
    return hashlib.sha256(f"{dtype} {tuple(shape)} ".encode())
