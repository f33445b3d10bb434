"""What foreign formats share: keys to modules, factors to the matrix view, refusals in one list."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..base import base_parameters
from ..errors import FileError
from ..layers import CONV1D, layer_of
from ..surgery import base_modules, original_of
from ..targets import catalogue, nearest
from .pair import About, Pair
from .tensors import LONGEST_NAME, check_regular, peek

Factors = dict[str, dict[str, Tensor]]
"""By a module's name in a file: its tensors `"A"`, `"B"` and `"alpha"`."""

ROLES = {"lora_down": "A", "lora_up": "B", "down": "A", "up": "B"}
"""Which factor a file means; A and B mean themselves."""

CONFIG = "lora_adapter_metadata"
"""Where diffusers' files keep PEFT's config."""

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""What every library adapts, subclasses included."""


def about(path: Path) -> About:
    """Return the strings that somebody has put into a safetensors file."""
    own = ("format", CONFIG)
    return About(metadata={k: v for k, v in peek(path).metadata.items() if k not in own})


def refuse(path: Path, complaints: Iterable[str], done: str = "loaded") -> None:
    """Raise a `FileError` that lists all complaints, if there are any."""
    if listed := "; ".join(dict.fromkeys(complaints)):
        raise FileError(f"{path}: nothing was {done}: {listed}")


def knows(patterns: Iterable[str], names: Iterable[str]) -> bool:
    """Say whether one of the patterns is that of a whole name."""
    compiled = [re.compile(pattern) for pattern in patterns]
    return any(pattern.fullmatch(name) for name in names for pattern in compiled)


def grouped(tensors: Mapping[str, Tensor], *patterns: str) -> tuple[Factors, dict[str, Tensor]]:
    """Sort tensors by the patterns' groups `name` and `role`; return the rest by key."""
    known: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    rest = {}
    compiled = [re.compile(pattern) for pattern in patterns]
    for key, tensor in tensors.items():
        match = next((m for pattern in compiled if (m := pattern.fullmatch(key))), None)
        role = ROLES.get(match["role"], match["role"]) if match else ""
        if match and role not in known[match["name"] or ""]:
            known[match["name"] or ""][role] = tensor
        else:
            rest[key] = tensor
    return dict(known), rest


def halves(factors: Factors) -> Iterator[str]:
    """Yield modules without both factors, and factors that are no matrices."""
    for name, found in factors.items():
        for role in "AB":
            if role not in found:
                yield f"{name} has no lora_{role}"
            elif found[role].ndim < 2 or not found[role].is_floating_point():
                yield f"lora_{role} of {name} is {found[role].dtype} of {tuple(found[role].shape)}"


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
    return module is not None and layer_of(type(module)).kind == CONV1D


def is_transposed(module: nn.Module | None) -> bool:
    """Tell whether a weight is stored `(fan_in, fan_out)`."""
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or is_conv1d(module)


def turned(A: Tensor, B: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    """Turn factors `(rank, in, ...)`, `(out, rank, ...)` to those of the stored weight, or back."""
    A, B = A.flatten(1), B.flatten(1)
    return (B.T.contiguous(), A.T.contiguous()) if transposed else (A, B)


def unflattened(A: Tensor, B: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Give the factors of a convolution its kernel, as the libraries keep them."""
    kernel = () if weight is None else weight.shape[2:]
    return A.reshape(len(A), -1, *kernel), B.reshape(*B.shape, *[1] * len(kernel))


def weight_of(module: nn.Module | None) -> Tensor | None:
    """Return a module's weight, if there is one."""
    return None if module is None else original_of(module, "weight")


def misfit(name: str, weight: Tensor | None, A: Tensor, B: Tensor, transposed: bool) -> list[str]:
    """Complain of factors that aren't those of a weight, kernel and all."""
    got = (B.shape[0], *A.shape[1:])
    wanted = got if weight is None else tuple(weight.shape)[:: -1 if transposed else 1]
    if _trimmed(got) == _trimmed(wanted) and _trimmed(B.shape[1:]) == _trimmed(A.shape[:1]):
        return []
    return [f"{name} has factors {tuple(A.shape)} and {tuple(B.shape)} for a weight of {wanted}"]


def differing(tensors: Mapping[str, Tensor], model: nn.Module | None) -> list[str]:
    """Complain of a base's tensors in a file, unless the model has the same."""
    if model is None:
        return []
    own = {name: tensor for name, _, _, tensor in base_parameters(model)}
    own |= dict(model.named_buffers())
    return [
        f"{key} is neither a factor nor equal to the model's"
        for key, tensor in tensors.items()
        if key not in own or own[key].is_meta or not torch.equal(own[key].cpu(), tensor)
    ]


def paired(
    path: Path, factors: Factors, places: Mapping[str, str | None], model: nn.Module | None
) -> list[Pair]:
    """Build the pairs of linear and convolution layers; no alpha, or 0, means the rank."""
    modules, pairs, complaints = modules_of(model), [], []
    refuse(path, [*halves(factors), *missing([n for n in factors if places[n] is None], model)])
    for name, found in factors.items():
        module = modules.get(places[name] or "") if model is not None else None
        A, B, alpha = found["A"], found["B"], found.get("alpha", torch.zeros(()))
        if module is not None and not isinstance(module, LAYERS):
            complaints.append(f"{name} is a {type(module).__name__}, not a linear or convolution")
        elif alpha.numel() != 1 or alpha.is_complex():
            complaints.append(f"alpha of {name} is {tuple(alpha.shape)}, not one number")
        else:
            complaints += misfit(name, weight_of(module), A, B, False)
            full = f"{places[name]}.weight".removeprefix(".")
            pairs.append(Pair(full, *turned(A, B, False), float(alpha.item()) or float(len(A))))
    refuse(path, complaints)
    return pairs


def load_pickle(path: Path) -> dict[str, Tensor]:
    """Load a state dict with `weights_only=True`: tensors and plain containers, no code."""
    check_regular(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # damage can make anything of a pickle
        raise FileError(
            f"{path}: no state dict that can be read safely: damaged, or more than tensors"
        ) from None
    if isinstance(content, dict) and set(content) == {"model_state_dict"}:
        content = content["model_state_dict"]  # as microsoft/LoRA's own example saves it
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and len(key) <= LONGEST_NAME and isinstance(value, Tensor)
        for key, value in content.items()
    ):
        raise FileError(
            f"{path}: a state dict must hold tensors by names of up to {LONGEST_NAME} characters"
        )
    return content


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Drop trailing ones: a 1x1 convolution and a linear layer have each other's factors."""
    while shape[-1:] == (1,):
        shape = shape[:-1]
    return shape
