"""Where PEFT keeps an update: the names of its wrappers, and what it can't wrap."""

import warnings
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from typing import Literal, NamedTuple

from torch import nn

from ...chains import type_before
from ...layers import CONV1D, UNLISTED, Shape, layer_of
from ...weight import Weight, join, tensor_names
from ..outline import LINEARS, Outline, Unknown, class_name, drops, facts_of, is_plain
from ..tensors import Config

WRAPPED, OUT_PROJ = ".base_layer", ".base_layer.out_proj"


class Place(NamedTuple):
    """Where PEFT keeps the update of a weight.

    Its `kind` is a layer's weight, a part of an attention, or a parameter by itself; `"alone"` is
    an attention's `out_proj` where PEFT wraps it without the attention.
    """

    name: str  # the middle of its keys
    key: str  # what the config's patterns are held against
    weight: Weight
    kind: Literal["layer", "in_proj", "out_proj", "alone", "parameter"] = "layer"

    @property
    def stack(self) -> Shape | None:
        """The shape of a stack of experts' matrices; `None` for all else."""
        shape = self.weight.shape
        return shape if self.kind == "parameter" and shape and len(shape) == 3 else None


def places_of_names(
    names: Iterable[str], weights: Outline, config: Config
) -> dict[str, Place | None]:
    """Resolve the names in a file, forward from the model's own weights."""
    found: dict[str, Place] = {}
    ends = tuple(f".{target}" for target in config.get("target_parameters") or ())
    parameters = {name for name in weights.weights if f".{name}".endswith(ends)}
    for weight in weights.weights.values():
        place = place_of_weight(weight, weights, parameters)
        path = weight.path
        if place.kind == "parameter":
            found[place.name] = place
        elif place.kind != "layer" or weight.tensor == "weight":
            found.setdefault(place.name, place)
        if place.kind == "out_proj":
            found.setdefault(path, place._replace(name=path, key=path, kind="alone"))
    for name in names if weights.unknown else ():
        attention = name.removesuffix(OUT_PROJ)  # nothing else has such a name
        if attention != name and (outer := weights.weight(f"{attention}.out_proj.weight")):
            found[name] = Place(name, attention, outer, "out_proj")
        elif own := weights.weight(f"{name}.weight"):
            found[name] = Place(name, name, own)
    return {name: found.get(name) for name in names}


def place_of_weight(weight: Weight, weights: Outline, parameters: Collection[str]) -> Place:
    """Say where PEFT keeps a weight's update, beside those of all `parameters` by themselves."""
    module, path = weight.module, weight.path
    place = Place(path, path, weight)
    if weight.name in parameters:  # the last one's wrapper is the outermost
        own = tensor_names(module)
        later = own[own.index(weight.tensor) + 1 :]
        depth = sum(join(path, each) in parameters for each in later)
        return place._replace(name=path + WRAPPED * depth, key=weight.name, kind="parameter")
    if weight.layer.kind is nn.MultiheadAttention and weight.tensor == "in_proj_weight":
        return place._replace(kind="in_proj")
    attention, _, leaf = path.rpartition(".")
    is_out = (leaf, weight.tensor) == ("out_proj", "weight")
    whole = weights.modules.get(attention) if is_out else None
    if whole is None or layer_of(type(whole)).kind is not nn.MultiheadAttention:
        return place
    if "in_proj_weight" not in tensor_names(whole):
        return place._replace(kind="alone")
    return place._replace(name=f"{attention}{OUT_PROJ}", key=attention, kind="out_proj")


def refusals(
    place: Place, *, dora: bool, idle: bool = False, written: bool = False
) -> Iterator[str]:
    """Yield why PEFT has no place for an update, or doesn't use it; an idle one has no effect."""
    module, name = place.weight.module, place.weight.name
    if dora and place.kind != "layer":
        yield f"{name}: PEFT has no DoRA but of layers"
    if isinstance(module, Unknown):
        return
    if not _has_place(place):
        yield f"{name}: PEFT has no place for this tensor of a {class_name(module)}"
    elif "." not in name:
        yield f"{name}: PEFT adapts what is inside a model, not the model itself"
    elif getattr(module, "groups", 1) > 1:
        yield f"{name}: PEFT's update of a grouped convolution is no change of its weight"
    elif place.kind == "alone" and not idle:
        yield f"{name}: PEFT never applies an adapter of an attention's out_proj alone"
    elif written and place.stack and facts_of(module).get("is_transposed") is None:
        yield f"{name}: PEFT's layout of a stack depends on the module, and this is an outline"
    elif written and len(place.weight.shape or ()) > 2 and not facts_of(module):
        yield (
            f"{name}: no checkpoint says how a convolution is grouped; load this file on the model "
            'and call save_lora(..., format="peft")'
        )


def _has_place(place: Place) -> bool:
    kind, shape = place.weight.layer.kind, place.weight.shape
    if place.kind == "parameter":
        return kind in (UNLISTED.kind, *LINEARS) and len(shape or ()) in (2, 3)
    known = is_plain(place.weight) or kind in (nn.Embedding, CONV1D)
    able = place.kind != "layer" or (known and place.weight.tensor == "weight")
    return able and shape is not None


def warn(places: Iterable[Place], weights: Outline, twice: str = "", dropout: float = 0.0) -> None:
    """Warn where PEFT computes something else than the formula, with what of `twice` follows."""
    reasons: defaultdict[str, list[str]] = defaultdict(list)
    for place in places:
        module, name = place.weight.module, place.weight.name
        if _computes_otherwise(module):
            how = "by other maths: it knows no dilation, padding_mode or forward of a layer's own"
            reasons[how].append(name)
        if place.weight.path in weights.shared:
            how = "in one of the places where its module is found, and here it is adapted in all"
            reasons[how].append(name)
        if twice and place.kind == "out_proj":
            reasons[f"twice, and {twice}"].append(name)
        able = drops(place.weight) or isinstance(module, Unknown) or not place.weight.layer.drops
        if dropout and place.kind == "layer" and not able:
            reasons["with dropout, and here there is none"].append(name)
    for reason, names in reasons.items():
        warnings.warn(f"PEFT adapts {', '.join(names)} {reason}", stacklevel=5)


def _computes_otherwise(module: nn.Module) -> bool:
    """Say whether it does otherwise than a plain layer of its kind without dilation or padding."""
    facts, cls = facts_of(module), type_before(module)
    dilated = any(each != 1 for each in facts.get("dilation", ()))
    own_forward = issubclass(cls, nn.Linear) and cls.forward is not nn.Linear.forward
    own_forward = own_forward and not layer_of(cls).dense
    return own_forward or dilated or facts.get("padding_mode", "zeros") != "zeros"
