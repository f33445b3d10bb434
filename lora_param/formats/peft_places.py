"""Where PEFT keeps a pair: the names of its wrappers, and what it can't wrap."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Literal, NamedTuple

from torch import Tensor, nn

from ..layers import UNLISTED, layer_of
from ..surgery import original_of, tensor_names
from . import layout
from .peft_config import Config
from .skeleton import is_outline

WRAPPED, OUT_PROJ = ".base_layer", ".base_layer.out_proj"
IN_OUT = "is_transposed"  # by which transformers' experts say that they are stored `(in, out)`


class Place(NamedTuple):
    """Where PEFT keeps the pair of a weight."""

    name: str  # the middle of its keys
    weight: str
    key: str  # what the config's patterns are held against
    module: nn.Module | None = None
    tensor: Tensor | None = None
    kind: Literal["layer", "in_proj", "out_proj", "alone", "parameter"] = "layer"

    @property
    def stacked(self) -> bool:
        """Whether it is a stack of experts' matrices."""
        return self.kind == "parameter" and self.tensor is not None and self.tensor.ndim == 3

    @property
    def is_outline(self) -> bool:
        """Whether how its module computes isn't known."""
        return is_outline(self.module) and not hasattr(self.module, IN_OUT)


def place_of(name: str, modules: Mapping[str, nn.Module] | None, config: Config) -> Place | None:
    """Resolve a name in a file; PEFT nests wrappers around several parameters of one module."""
    if modules is None:
        return Place(name, f"{name}.weight", name.removesuffix(OUT_PROJ))
    part = f"{name.removesuffix(OUT_PROJ)}.out_proj"
    if name.endswith(OUT_PROJ) and part in modules:
        return home_of(f"{part}.weight", modules, ())._replace(name=name)
    path = re.sub(rf"({re.escape(WRAPPED)})+$", "", name)
    depth = name.count(WRAPPED, len(path))
    if (module := modules.get(path)) is None:
        return None
    ends = tuple(f".{target}" for target in config.get("target_parameters") or ())
    own = [each for each in tensor_names(module) if f".{path}.{each}".endswith(ends)]
    if depth < len(own):  # the last parameter's wrapper is the outermost
        place = home_of(f"{path}.{own[-1 - depth]}", modules, ())
        return place._replace(name=name, key=place.weight, kind="parameter")
    tensor = "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"
    place = home_of(f"{path}.{tensor}", modules, ())
    kind = "alone" if place.kind == "out_proj" else place.kind
    return None if depth else place._replace(name=name, key=path, kind=kind)


def home_of(weight: str, modules: Mapping[str, nn.Module], names: Collection[str]) -> Place:
    """Say where PEFT keeps a weight's pair, beside those of `names`."""
    path, _, tensor = weight.rpartition(".")
    module, (attention, _, leaf) = modules[path], path.rpartition(".")
    place = Place(path, weight, path, module, original_of(module, tensor))
    if leaf == "out_proj" and isinstance(whole := modules.get(attention), nn.MultiheadAttention):
        if original_of(whole, "in_proj_weight") is None:
            return place._replace(kind="alone")
        return place._replace(name=f"{attention}{OUT_PROJ}", key=attention, kind="out_proj")
    if isinstance(module, nn.MultiheadAttention) and tensor == "in_proj_weight":
        return place._replace(kind="in_proj")
    if layer_of(type(module)) is UNLISTED and weight in names:
        later = tensor_names(module)[tensor_names(module).index(tensor) + 1 :]
        depth = sum(f"{path}.{each}" in names for each in later)
        return place._replace(name=path + WRAPPED * depth, key=weight, kind="parameter")
    return place


def refusals(place: Place, *, idle: bool = False, written: bool = False) -> Iterator[str]:
    """Yield why PEFT has no place for a pair, or doesn't use it; an idle one has no effect."""
    module, weight = place.module, place.weight
    if module is None:
        return
    if place.tensor is None or not _has_place(place, module, place.tensor):
        yield f"{weight}: PEFT has no place for this tensor of a {type(module).__name__}"
    elif "." not in weight:
        yield f"{weight}: PEFT adapts what is inside a model, not the model itself"
    elif getattr(module, "groups", 1) > 1:
        yield f"{weight}: PEFT's update of a grouped convolution is no change of its weight"
    elif place.kind == "alone" and not idle:
        yield f"{weight}: PEFT never applies an adapter of an attention's out_proj alone"
    elif written and place.stacked and place.is_outline:
        yield f"{weight}: PEFT's layout of a stack depends on the module, and this is an outline"


def _has_place(place: Place, module: nn.Module, tensor: Tensor) -> bool:
    if place.kind == "parameter":
        bare = layer_of(type(module)) in (UNLISTED, layer_of(nn.Linear))
        return bare and tensor.ndim in (2, 3)
    known = isinstance(module, (*layout.LAYERS, nn.Embedding)) or layout.is_conv1d(module)
    return place.kind != "layer" or (known and place.weight.rpartition(".")[2] == "weight")
