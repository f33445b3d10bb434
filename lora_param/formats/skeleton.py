"""A model's outline without the model: from names and shapes alone, as a checkpoint has them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import CONV1D, TABLE, layer_of

Shape = tuple[int, ...]

CONV = {"groups": int, "dilation": tuple, "padding_mode": str}
GUESSES = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
"""What a module's `weight` of so many dimensions is taken for."""


def described(module: nn.Module) -> dict[str, Any]:
    """Return what `skeleton` needs to know of a module, for JSON; of a guess, nothing."""
    if is_outline(module):
        return dict(module.__dict__["_facts"])
    extras = CONV if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else ()
    kind = type_name(layer_of(type(module)).kind)
    return {"type": kind} | {name: getattr(module, name) for name in extras}


def is_outline(module: nn.Module | None) -> bool:
    """Say whether a module is one of `skeleton`'s."""
    return module is not None and "_facts" in module.__dict__


def skeleton(
    content: Mapping[str, Tensor | Shape], layers: Mapping[str, Mapping[str, Any]]
) -> nn.Module:
    """Build a model of these tensors, on the meta device where only their shapes are known.

    It can be written to any format, and not run. Modules are what `described` said of them, by a
    parameter's full name in `layers`; the others are guessed.
    """
    tensors: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, value in content.items():
        path, _, tensor = name.rpartition(".")
        if not isinstance(value, Tensor):
            value = torch.empty(value, device="meta")
        tensors[path][tensor] = value
    facts = {name.rpartition(".")[0]: each for name, each in layers.items() if name in content}
    for path in tensors:  # another's attention has a plain layer behind it
        behind = facts.get(f"{path}.out_proj".removeprefix("."), {}).get("type", ATTENTION_OUT)
        if "in_proj_weight" in tensors[path] and behind != ATTENTION_OUT:
            facts.setdefault(path, {"type": type_name(nn.Module)})
    modules = {"": _module(tensors[""], facts.get("", {}))}
    for path in list(tensors):
        for each in accumulate(path.split("."), "{}.{}".format):
            if each not in modules:
                modules[each] = _module(tensors[each], facts.get(each, {}))
                parent, _, name = each.rpartition(".")
                modules[parent]._modules[name] = modules[each]
    return modules[""]


def _module(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> nn.Module:
    kind = KINDS.get(str(facts["type"]), nn.Module) if "type" in facts else _guess(tensors)
    if isinstance(kind, str):
        place, _, name = kind.rpartition(".")
        kind = type(name, (nn.Module,), {"__module__": place})
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    module.__dict__["_facts"] = facts
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        module.groups, module.padding_mode = 1, "zeros"
        module.dilation = (1,) * (tensors["weight"].dim() - 2 if "weight" in tensors else 0)
    for name, of in CONV.items():
        value = facts.get(name)
        value = tuple(value) if isinstance(value, list) else value
        if isinstance(value, of):
            setattr(module, name, value)
    for name, tensor in tensors.items():
        module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    return module


def _guess(tensors: Mapping[str, Tensor]) -> type[nn.Module] | str:
    if "in_proj_weight" in tensors:
        return nn.MultiheadAttention
    weight, bias = (tuple(tensors[n].shape) if n in tensors else () for n in ("weight", "bias"))
    if len(weight) == 2 and bias == weight[1:] != weight[:1]:
        return CONV1D
    return GUESSES.get(len(weight), nn.Module)


def type_name(kind: type[nn.Module] | str) -> str:
    """Return what a row's kind is called in a file."""
    return kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"


ATTENTION_OUT = type_name(nn.modules.linear.NonDynamicallyQuantizableLinear)
KINDS = {type_name(layer.kind): layer.kind for layer in TABLE}
