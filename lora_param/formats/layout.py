"""What foreign formats share: keys to modules, factors to the matrix view, refusals in one list."""

from __future__ import annotations

import pickle
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..base import base_parameters
from ..errors import FileError
from ..layers import layer_of
from ..surgery import base_modules
from ..targets import catalogue, nearest

Factors = dict[str, dict[str, Tensor]]
"""By module: its tensors by their role, `"A"`, `"B"` and what else a format has."""


def refuse(path: Path, complaints: Iterable[str], done: str = "loaded") -> None:
    """Raise a `FileError` that lists all complaints, if there are any."""
    if listed := "; ".join(dict.fromkeys(complaints)):
        raise FileError(f"{path}: nothing was {done}: {listed}")


def grouped(tensors: Mapping[str, Tensor], *patterns: str) -> tuple[Factors, dict[str, Tensor]]:
    """Sort tensors by module and role.

    Args:
        tensors: A file's tensors by key.
        patterns: Expressions with groups `name` and `role` that a whole key is held against.

    Returns:
        The tensors that a pattern knows, by name and role, and the rest by key.
    """
    known: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    rest = {}
    compiled = [re.compile(pattern) for pattern in patterns]
    for key, tensor in tensors.items():
        match = next((m for pattern in compiled if (m := pattern.fullmatch(key))), None)
        if match:
            known[match["name"] or ""][match["role"]] = tensor
        else:
            rest[key] = tensor
    return dict(known), rest


def halves(factors: Factors) -> list[str]:
    """Complain of modules without both factors, and of factors that are no matrices."""
    lacking = [
        f"{name} has no lora_{role}"
        for name, found in factors.items()
        for role in "AB"
        if role not in found
    ]
    return lacking + [
        f"lora_{role} of {name} is {tuple(found[role].shape)}"
        for name, found in factors.items()
        for role in "AB"
        if role in found and (found[role].ndim < 2 or not found[role].is_floating_point())
    ]


def modules_of(model: nn.Module | None) -> dict[str, nn.Module]:
    """Return a model's modules by path."""
    return dict(base_modules(model)) if model is not None else {}


def missing(names: Sequence[str], model: nn.Module | None) -> list[str]:
    """Complain of names in a file that find no module, with what is nearest to the first."""
    if not names or model is None:
        return []
    near = nearest(names[0], {weight.name: weight for weight in catalogue(model)})
    return [f"no module for {', '.join(names)}; the nearest to the first are {near}"]


def is_conv1d(module: nn.Module | None) -> bool:
    """Tell transformers' Conv1D, a linear layer that stores its weight `(in, out)`."""
    return module is not None and layer_of(type(module)).kind == "transformers.pytorch_utils.Conv1D"


def is_transposed(module: nn.Module | None) -> bool:
    """Tell whether a weight is stored `(fan_in, fan_out)`."""
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or is_conv1d(module)


def turned(module: nn.Module | None, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Turn factors `(rank, in, ...)`, `(out, rank, ...)` to those of the stored weight, or back."""
    A, B = A.flatten(1), B.flatten(1)
    return (B.T, A.T) if is_transposed(module) else (A, B)


def misfit(
    name: str, module: nn.Module | None, weight: Tensor | None, A: Tensor, B: Tensor
) -> list[str]:
    """Complain of factors that aren't those of a module's weight, kernel and all."""
    got, wanted = (B.shape[0], *A.shape[1:]), None
    if weight is not None:
        wanted = tuple(weight.shape)[:: -1 if is_transposed(module) else 1]
    fits = wanted is None or _trimmed(got) == _trimmed(wanted)
    if fits and _trimmed(B.shape[1:]) == _trimmed(A.shape[:1]):
        return []
    owner = "" if module is None else f" for a {type(module).__name__} of {wanted}"
    return [f"{name} has factors {tuple(A.shape)} and {tuple(B.shape)}{owner}"]


def differing(tensors: Mapping[str, Tensor], model: nn.Module | None) -> list[str]:
    """Complain of a base's tensors in a file, unless the model has the same."""
    own = {name: tensor for name, _, _, tensor in base_parameters(model)} if model else {}
    own |= dict(model.named_buffers()) if model else {}
    return [
        f"{key} is neither a factor nor equal to the model's"
        for key, tensor in tensors.items()
        if key not in own or own[key].is_meta or not torch.equal(own[key].cpu(), tensor)
    ]


def load_pickle(path: Path) -> dict[str, Tensor]:
    """Load a state dict with `weights_only=True`: tensors and plain containers, no code.

    Args:
        path: The file.

    Returns:
        Tensors by key.

    Raises:
        FileError: It is damaged, or holds anything but tensors by name.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, OSError, RuntimeError, *_DAMAGED) as error:
        reason = str(error).split("\n")[0]
        raise FileError(f"{path}: no state dict that can be read safely: {reason}") from None
    if isinstance(content, dict) and set(content) == {"model_state_dict"}:
        content = content["model_state_dict"]  # as microsoft/LoRA's own example saves it
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise FileError(f"{path}: a state dict must hold tensors by name")
    return content


_DAMAGED = (ValueError, TypeError, LookupError, AttributeError, AssertionError, ImportError)


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Drop trailing ones: a 1x1 convolution and a linear layer have each other's factors."""
    while shape[-1:] == (1,):
        shape = shape[:-1]
    return shape
