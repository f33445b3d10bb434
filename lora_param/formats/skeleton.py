"""A model's outline without the model: from names and shapes alone, as a checkpoint has them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from ..layers import TABLE, layer_of

Shape = tuple[int, ...]

CONV = {"groups": int, "dilation": tuple, "padding_mode": str}
GUESSES = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
"""What a module's `weight` of so many dimensions is taken for."""


def described(module: nn.Module) -> dict[str, Any]:
    """Return what `skeleton` needs to know of a module, for JSON."""
    extras = CONV if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else ()
    kind = _name(layer_of(type(module)).kind)
    return {"type": kind} | {name: getattr(module, name) for name in extras}


def skeleton(
    shapes: Mapping[str, Shape], layers: Mapping[str, Mapping[str, Any]] | None = None
) -> nn.Module:
    """Build a model on the meta device whose parameters have these names and shapes.

    It can be adapted and written to any format, and not run. Modules are what `described` said of
    them, by a parameter's full name in `layers`; the others are guessed.
    """
    tensors: defaultdict[str, dict[str, Shape]] = defaultdict(dict)
    for name, shape in shapes.items():
        path, _, tensor = name.rpartition(".")
        tensors[path][tensor] = shape
    known = (layers or {}).items()
    facts = {name.rpartition(".")[0]: each for name, each in known if name in shapes}
    modules = {"": _module(tensors[""], facts.get("", {}))}
    for path in list(tensors):
        for each in accumulate(path.split("."), "{}.{}".format):
            if each not in modules:
                modules[each] = _module(tensors[each], facts.get(each, {}))
                parent, _, name = each.rpartition(".")
                modules[parent]._modules[name] = modules[each]
    return modules[""]


def _module(tensors: Mapping[str, Shape], facts: Mapping[str, Any]) -> nn.Module:
    kind = KINDS.get(str(facts["type"]), nn.Module) if "type" in facts else _guess(tensors)
    if isinstance(kind, str):
        place, _, name = kind.rpartition(".")
        kind = type(name, (nn.Module,), {"__module__": place})
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        module.groups, module.padding_mode = 1, "zeros"
        module.dilation = (1,) * (len(tensors.get("weight", ())) - 2)
    for name, of in CONV.items():
        value = facts.get(name)
        value = tuple(value) if isinstance(value, list) else value
        if isinstance(value, of):
            setattr(module, name, value)
    for name, shape in tensors.items():
        module._parameters[name] = nn.Parameter(torch.empty(shape, device="meta"))
    return module


def _guess(tensors: Mapping[str, Shape]) -> type[nn.Module]:
    if "in_proj_weight" in tensors:
        return nn.MultiheadAttention
    return GUESSES.get(len(tensors.get("weight", ())), nn.Module)


def _name(kind: type[nn.Module] | str) -> str:
    return kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"


KINDS = {_name(layer.kind): layer.kind for layer in TABLE}
