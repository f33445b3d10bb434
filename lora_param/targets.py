"""Which weights: patterns, types and predicates, resolved to a list before anything is changed."""

from __future__ import annotations

import difflib
import fnmatch
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from torch import nn
from torch.nn.parameter import is_lazy

from .errors import TargetError
from .layers import UNLISTED, layer_of, listed_tensors
from .weight import Walk, Weight, join, tensor_names

Predicate: TypeAlias = Callable[[str, nn.Module], bool]
Selector: TypeAlias = str | type[nn.Module] | Predicate
Target: TypeAlias = Selector | Iterable[Selector]
Number = TypeVar("Number", int, float, float | None)


def resolve(
    walk: Walk, target: Target | None, exclude: Target | None, least: int = 2
) -> list[Weight]:
    """List the weights that `target` names and `exclude` doesn't, in model order.

    What names a module names the tensors of its row, or of an unlisted module every tensor of at
    least `least` dimensions. A glob that also covers biases and norms takes the weights among them.
    Whether a weight can be adapted is not checked here.

    Raises:
        TargetError: One of the selectors matches nothing, or nothing of so many dimensions.
    """
    weights = {weight.name: weight for weight in walk.weights}
    places = [] if target is None and exclude is None else _places(walk, least)
    if target is None:
        chosen = {
            join(path, tensor)
            for path, module in walk.modules
            if layer_of(type(module)).default
            for tensor in _row_tensors(path, module, least)
        }
        if not chosen:
            raise TargetError(
                "target=None finds no linear, convolution, attention or recurrent layer; name the "
                f"weights, for example {nearest('', weights)}"
            )
    else:
        chosen = set()
        for selector in _selectors("target", target):
            hits = _hits("target", selector, places)
            broad = {name for name in hits if not is_flat(weights[name], least)}
            if not broad:
                raise TargetError(_unmatched("target", selector, hits, weights, places))
            chosen |= broad
    for selector in _selectors("exclude", exclude) if exclude is not None else ():
        hits = _hits("exclude", selector, places)
        if not hits:
            raise TargetError(_unmatched("exclude", selector, hits, weights, places))
        chosen -= hits
    if not chosen:
        raise TargetError("exclude leaves nothing to adapt; narrow it, or drop the call")
    return [weight for name, weight in weights.items() if name in chosen]


def number_for_each(
    option: str, value: Number | Mapping[str, Number], weights: Sequence[Weight]
) -> list[Number]:
    """Give each weight its number: the one for all, or that of the first pattern to match it.

    Raises:
        TargetError: A pattern decides for no weight, or a weight has no pattern.
    """
    if not isinstance(value, Mapping):
        return [value] * len(weights)
    names = {weight.name: weight for weight in weights}
    for pattern in value:
        if not isinstance(pattern, str):
            raise TargetError(f"{option}: a pattern must be a string, got {pattern!r}")
        if not any(_matches(pattern, weight) for weight in weights):
            raise TargetError(_unmatched(option, pattern, set(), names, []))
    deciders = [next((p for p in value if _matches(p, weight)), None) for weight in weights]
    if None in deciders:
        name = weights[deciders.index(None)].name
        raise TargetError(
            f'{option}: no pattern matches "{name}"; end the mapping with "*" for the rest'
        )
    if idle := [pattern for pattern in value if pattern not in deciders]:
        raise TargetError(
            f'{option}: "{idle[0]}" decides nothing, because earlier patterns match all its '
            "weights; put it in front of them, or drop it"
        )
    return [value[pattern] for pattern in deciders if pattern is not None]


def _row_tensors(path: str, module: nn.Module, least: int) -> list[str]:
    """List the tensors that naming a module names, a child's by its path."""
    layer, present = layer_of(type(module)), tensor_names(module)
    if layer is not UNLISTED:
        return listed_tensors(layer, present)
    return [name for name in present if not is_flat(Weight(path, module, name), least)]


@dataclass(frozen=True)
class _Place:
    """A path at which a module is found; one that is shared has several.

    Attributes:
        path: The path.
        module: The module.
        own: The names of its own weights, by what they are called at this path.
        named: The names of the weights that naming the module names.
    """

    path: str
    module: nn.Module
    own: Mapping[str, str]
    named: frozenset[str]


def _places(walk: Walk, least: int) -> list[_Place]:
    names: defaultdict[nn.Module, dict[str, str]] = defaultdict(dict)
    for weight in walk.weights:
        names[weight.module][weight.tensor] = weight.name
    own_names = [
        {join(path, tensor): name for tensor, name in names[module].items()}
        for path, module in walk.places
    ]
    spelled = {alias: name for own in own_names for alias, name in own.items()}
    rows = [
        {join(path, tensor) for tensor in _row_tensors(path, module, least)}
        for path, module in walk.places
    ]
    return [
        _Place(path, module, own, frozenset(spelled[name] for name in row if name in spelled))
        for (path, module), own, row in zip(walk.places, own_names, rows, strict=True)
    ]


def _hits(option: str, selector: Selector, places: Sequence[_Place]) -> set[str]:
    hits: set[str] = set()
    if isinstance(selector, str) and "[" in selector:
        literal = {place.own[selector] for place in places if selector in place.own}
        literal |= {name for place in places if selector == place.path for name in place.named}
        if literal:
            return literal
    for place in places:
        if isinstance(selector, str):
            hit = _glob(selector, place.path)
            hits |= {name for alias, name in place.own.items() if _glob(selector, alias)}
        elif isinstance(selector, type):
            hit = isinstance(place.module, selector)
        else:
            hit = _asked(option, selector, place)
        if hit:
            hits |= place.named
    return hits


def _asked(option: str, predicate: Predicate, place: _Place) -> bool:
    try:
        return bool(predicate(place.path, place.module))
    except Exception as error:
        raise TargetError(
            f'{option}: the predicate {_show(predicate)} failed at "{place.path}" with {error!r}; '
            "it takes (path, module) and returns a bool"
        ) from error


def _selectors(option: str, target: Target) -> list[Selector]:
    if isinstance(target, (str, type)) or (callable(target) and not isinstance(target, Iterable)):
        target = [target]
    if not isinstance(target, Iterable) or isinstance(target, (nn.Module, Mapping)):
        raise TargetError(
            f"{option} must be a pattern, a module type, a predicate or several of these, "
            f"got {type(target).__name__}"
        )
    selectors = list(target)
    if not selectors:
        raise TargetError(
            f"{option} is empty; give None, or at least one pattern, type or predicate"
        )
    for selector in selectors:
        is_type = isinstance(selector, type) and issubclass(selector, nn.Module)
        is_predicate = callable(selector) and not isinstance(selector, (type, nn.Module))
        if not (isinstance(selector, str) or is_type or is_predicate):
            raise TargetError(
                f"{option}: a selector must be a pattern, a subclass of torch.nn.Module or a "
                f"predicate (path, module) -> bool, got {selector!r}"
            )
    return selectors


def _matches(pattern: str, weight: Weight) -> bool:
    return _glob(pattern, weight.name) or _glob(pattern, weight.path)


def _glob(pattern: str, name: str) -> bool:
    if name == pattern or name.endswith(f".{pattern}"):
        return True
    if not any(sign in pattern for sign in "*?["):
        return False
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")


def is_flat(weight: Weight, least: int = 2) -> bool:
    """Say whether a weight has fewer dimensions than a kind of delta needs."""
    tensor = weight.original
    return tensor is not None and not is_lazy(tensor) and tensor.ndim < least


def _unmatched(
    option: str,
    selector: Selector,
    hits: set[str],
    weights: Mapping[str, Weight],
    places: Sequence[_Place],
) -> str:
    if hits:
        return (
            f"{option} {_show(selector)} matches only {', '.join(sorted(hits))}: an adapter "
            "needs a tensor of two or more dimensions"
        )
    if not isinstance(selector, str):
        return f"{option} {_show(selector)} matches no weight; there are {nearest('', weights)}"
    if any(_glob(selector, path) for weight in weights.values() for path in _parents(weight.path)):
        hint = f'for all below it, write "{selector}.*"'
        return f'{option} "{selector}" has no weight of its own; {hint}'
    if known := {type(place.module).__name__ for place in places if _glob(selector, place.path)}:
        return f'{option} "{selector}" is a {", ".join(sorted(known))} with nothing to adapt'
    return f'{option} "{selector}" matches no weight; the nearest are {nearest(selector, weights)}'


def _parents(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def nearest(pattern: str, weights: Mapping[str, Weight]) -> str:
    """Quote up to three names whose ends are the most like a pattern."""
    length = pattern.count(".") + 1

    def likeness(weight: Weight) -> float:
        ends = [".".join(name.split(".")[-length:]) for name in (weight.name, weight.path)]
        return max(
            difflib.SequenceMatcher(None, pattern, end).ratio() for end in [*ends, weight.name]
        )

    candidates = [weight for weight in weights.values() if not is_flat(weight)]
    likest = sorted(candidates, key=likeness, reverse=True)[:3]
    return ", ".join(f'"{weight.name}"' for weight in likest) or "none: the model has no weights"


def _show(selector: Selector) -> str:
    if isinstance(selector, str):
        return f'"{selector}"'
    return getattr(selector, "__qualname__", repr(selector))
