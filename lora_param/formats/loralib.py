"""loralib's state dicts, read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import FileError
from . import layout, peft
from .pair import Pair
from .tensors import peek

KEYS = (r"(?:(?P<name>.+)\.)?lora_(?P<role>[AB])",)
SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")


def recognises(path: Path) -> bool:
    """Say whether a file is called as a pickle is, and not as PEFT's; it isn't opened."""
    named = path.is_file() and path.suffix in SUFFIXES and path.name != peft.PICKLED
    return named and not peek(path).tensors


def read(
    path: Path,
    model: nn.Module | None,
    *,
    alpha: float | None = None,
    enable_lora: Sequence[bool] | None = None,
) -> list[Pair]:
    """Read what `torch.save(loralib.lora_state_dict(model), path)` wrote.

    Biases and other tensors of the base that are in it have to be the model's own, to the bit.

    Args:
        path: The file.
        model: The model with plain layers in the place of loralib's; `None` for the file's names.
        alpha: The `lora_alpha` that it was trained with, which the file doesn't hold.
        enable_lora: Which slices of each `MergedLinear` are adapted; not needed if all are.

    Returns:
        A pair per weight. That of a `MergedLinear` has `r` times the enabled slices for a rank, and
        that of a `ConvLoRA`, whose own view is `(out * k, in * k)`, has `r * k * k`.

    Raises:
        FileError: There is no alpha; or lists what is misshapen, finds no module, isn't the model's
            or needs `enable_lora`.
    """
    if alpha is None:
        raise FileError(f"{path}: the file doesn't hold its lora_alpha; pass it as alpha=")
    factors, rest = layout.grouped(layout.load_pickle(path), *KEYS)
    modules = layout.modules_of(model)
    places = {name: _place(name, modules) if model is not None else name for name in factors}
    complaints = layout.missing([name for name in factors if places[name] is None], model)
    base = {_in_plain(key, places): tensor for key, tensor in rest.items()}
    layout.refuse(path, [*complaints, *layout.halves(factors), *layout.differing(base, model)])
    pairs = []
    for name, found in factors.items():
        module = modules.get(places[name] or "") if model is not None else None
        weight = layout.weight_of(module)
        try:
            A, B, r = _whole(module, weight, found["A"], found["B"], enable_lora)
        except ValueError as error:
            complaints.append(f"{name} {error}")
            continue
        complaints += layout.misfit(name, weight, A, B, layout.is_transposed(module))
        full = f"{places[name]}.weight".removeprefix(".")
        pairs.append(
            Pair(full, *layout.turned(A, B, layout.is_transposed(module)), alpha * len(A) / r)
        )
    layout.refuse(path, complaints)
    return pairs


def _place(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """Find the layer; a ConvLoRA has it inside."""
    places = (name, f"{name}.conv".removeprefix("."))
    return next((each for each in places if layout.weight_of(modules.get(each)) is not None), None)


def _in_plain(key: str, places: Mapping[str, str | None]) -> str:
    """Name a tensor as the plain model does, where a convolution takes a ConvLoRA's place."""
    owner, _, tensor = key.rpartition(".")
    outer = f".{owner}".removesuffix(".conv").removeprefix(".")
    return f"{outer}.{tensor}".removeprefix(".") if places.get(outer) == outer else key


def _whole(
    module: nn.Module | None,
    weight: Tensor | None,
    A: Tensor,
    B: Tensor,
    enable_lora: Sequence[bool] | None,
) -> tuple[Tensor, Tensor, float]:
    """Return factors of the whole weight, and the rank that alpha is divided by."""
    if module is None or weight is None or isinstance(module, nn.Embedding):
        return A, B, B.shape[1]
    if isinstance(module, nn.Conv2d):
        return *_of_convolution(weight, A, B), B.shape[1] / weight.shape[-1]
    if isinstance(module, nn.Linear) or layout.is_conv1d(module):
        out = weight.shape[1 if layout.is_conv1d(module) else 0]
        return A, _of_slices(out, A, B, enable_lora), B.shape[1]
    raise ValueError(f"is a {type(module).__name__}, for which loralib has no layer that works")


def _of_convolution(weight: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors of `(B @ A).view(weight.shape)`: row `o` is rows `s * o` to `s * (o + 1)`."""
    if A.shape[0] != B.shape[1] or B.shape[0] * A.shape[1] != weight.numel():
        raise ValueError(f"has factors {tuple(A.shape)}, {tuple(B.shape)} for {weight.shape}")
    repeats, remainder = divmod(weight[0].numel(), A.shape[1])
    if remainder:  # in groups, rows of the two views overlap
        product = (B.double() @ A.double()).to(A.dtype).view(len(weight), -1)
        eye = torch.eye(min(product.shape), dtype=A.dtype)
        A, B = (product, eye) if len(eye) == len(product) else (eye, product)
        return A.view(-1, *weight.shape[1:]), B
    A = torch.kron(torch.eye(repeats, dtype=A.dtype), A)
    return A.view(-1, *weight.shape[1:]), B.reshape(len(weight), -1)


def _of_slices(out: int, A: Tensor, B: Tensor, enable_lora: Sequence[bool] | None) -> Tensor:
    """Return the tall factor of all slices, block by block: `[out, rank * enabled]`."""
    enabled, surplus = divmod(A.shape[0], B.shape[1])
    if surplus or not 0 < enabled <= 64 or len(B) % enabled or out % (size := len(B) // enabled):
        raise ValueError(f"has factors {tuple(A.shape)}, {tuple(B.shape)} for {out} outputs")
    slices = out // size
    chosen = [True] * slices if enabled == slices else list(enable_lora or ())
    if len(chosen) != slices or sum(map(bool, chosen)) != enabled:
        raise ValueError(
            f"adapts {enabled} of {slices} slices; say which by enable_lora=, got {enable_lora}"
        )
    whole = B.new_zeros(slices, size, enabled, B.shape[1])
    index = [each for each, on in enumerate(chosen) if on]
    whole[index, :, range(enabled)] = B.view(enabled, size, -1)
    return whole.view(out, -1)
