"""Which weights: patterns, types and predicates, resolved to a list before anything is changed."""

from __future__ import annotations

import difflib
import fnmatch
import operator
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, combinations
from typing import NamedTuple, TypeAlias, TypeVar

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .errors import TargetError
from .layers import UNLISTED, layer_of, listed_tensors
from .rows import Said, split_rows
from .walk import Walk
from .weight import Weight, join, tensor_names

Predicate: TypeAlias = Callable[[str, nn.Module], bool]
Selector: TypeAlias = str | type[nn.Module] | Predicate
Ranged: TypeAlias = tuple[Selector, Said]
Target: TypeAlias = Selector | Iterable[Selector | Ranged]
Number = TypeVar("Number", int, float, float | None)


def resolve(
    walk: Walk,
    target: Target | None,
    exclude: Target | None = None,
    least: int = 2,
    whole: Sequence[Weight] = (),
) -> list[Weight]:
    """List the weights that `target` names and `exclude` doesn't, in model order.

    What names a module names the tensors of its row, or of an unlisted module every tensor of at
    least `least` dimensions. A glob that also covers biases and norms takes the weights among them.
    Those of `whole` are left out; beside them there may be no target. A selector with rows gives a
    block of each weight that it names.
    """
    if whole and is_nothing(target):
        return []
    weights = {weight.name: weight for weight in walk.weights}
    if target is None:
        defaults = [(path, m) for path, m in walk.modules if layer_of(type(m)).default]
        names = [join(path, name) for path, m in defaults for name in _row_tensors(m, least)]
        chosen = {name: [weights[name]] for name in names}
        if not chosen:
            none = "target=None finds no linear, convolution, attention or recurrent layer"
            raise TargetError(f"{none}; name the weights, for example {nearest('', weights)}")
    places = [] if target is None and exclude is None else _places(walk, least)
    if target is not None:
        chosen = {}
        for each in _selectors("target", target):
            selector, rows = _split("target", each, places)
            hits = _hits("target", selector, places, weights)
            broad = {name for name in hits if not is_flat(weights[name].original, least)}
            if not broad:
                said = f"target {_show(selector)} matches only {', '.join(sorted(hits))}"
                raise TargetError(f"{said}: an adapter needs a tensor of two or more dimensions")
            for name in broad:
                chosen.setdefault(name, []).append(_block(weights[name], rows))
    for each in _selectors("exclude", exclude) if exclude is not None else ():
        for name in _hits("exclude", _split("exclude", each, places)[0], places, weights):
            chosen.pop(name, None)
    if not chosen:
        raise TargetError("exclude leaves nothing to adapt; narrow it, or drop the call")
    both = [weight.name for weight in whole if weight.name in chosen]
    if both and target is not None:
        listing = ", ".join(both)
        warnings.warn(f"target and train both name {listing}: trained whole", stacklevel=4)
    blocks = [chosen[name] for name in weights if name in chosen and name not in both]
    return [each for own in blocks for each in (_disjoint(own) if own[1:] else own)]


def is_nothing(target: Target | None) -> bool:
    """Say whether a target is empty, `()` or `[]`, for training by `train` alone."""
    return isinstance(target, (list, tuple)) and not target


def resolve_whole(walk: Walk, train: Target, exclude: Target | None = None) -> list[Weight]:
    """List the parameters that `train` names and `exclude` doesn't, in model order.

    A module names all below it.
    """
    weights = {w.name: w for w in walk.weights if w.chain or w.original is not None}
    places = _places(walk, None)
    selectors = [_split("train", each, places)[0] for each in _selectors("train", train)]
    chosen = set().union(*(_hits("train", each, places, weights) for each in selectors))
    for each in _selectors("exclude", exclude) if exclude is not None else ():
        chosen -= _hits("exclude", _split("exclude", each, places)[0], places, weights)
    if not chosen:
        raise TargetError("exclude leaves nothing to train; narrow it, or drop the call")
    return [weight for name, weight in weights.items() if name in chosen]


def number_for_each(
    option: str, value: Number | Mapping[str, Number], weights: Sequence[Weight]
) -> list[Number]:
    """Give each weight its number: the one for all, or that of the first pattern to match it."""
    if not isinstance(value, Mapping):
        return [value] * len(weights)
    names = {weight.name: weight for weight in weights}
    for pattern in value:
        if not isinstance(pattern, str):
            raise TargetError(f"{option}: a pattern must be a string, got {pattern!r}")
        if not any(matches(pattern, weight) for weight in weights):
            raise TargetError(_unmatched(option, pattern, names, []))
    deciders = [next((p for p in value if matches(p, weight)), None) for weight in weights]
    if None in deciders:
        unmatched = f'no pattern matches "{weights[deciders.index(None)].name}"'
        raise TargetError(f'{option}: {unmatched}; end the mapping with "*" for the rest')
    if idle := [pattern for pattern in value if pattern not in deciders]:
        reason = f'"{idle[0]}" decides nothing, because earlier patterns match all its weights'
        raise TargetError(f"{option}: {reason}; put it in front of them, or drop it")
    return [value[pattern] for pattern in deciders if pattern is not None]


def _split(
    option: str, selector: Selector | Ranged, places: Sequence[_Place]
) -> tuple[Selector, Said | None]:
    """Split a selector from its rows, unless it is a name that only looks like one with rows."""
    rows: Said | None = None
    if isinstance(selector, tuple):
        selector, rows = selector
    elif isinstance(selector, str):
        pattern, rows = split_rows(selector)
        if rows is None or _matched(operator.eq, selector, places):
            return selector, None
        selector = pattern
    if rows is not None and option != "target":
        raise TargetError(f"{option} {_show(selector)} can't have rows; only target names blocks")
    return selector, rows


def _block(weight: Weight, rows: Said | None) -> Weight:
    missing = not weight.chain and (weight.original is None or is_lazy(weight.original))
    return weight if rows is None or missing else weight.block(rows)


def _disjoint(blocks: Sequence[Weight]) -> list[Weight]:
    """List one adapter's blocks of a tensor in order, or raise if two have a row in common."""
    blocks = list(dict.fromkeys(blocks))
    for one, other in combinations(blocks, 2):
        if one.overlaps(other.rows):
            reason = f"{other.name} overlaps it, and an adapter changes a row once"
            raise TargetError(f"{one.name}: {reason}; give blocks that don't, or another adapter")
    return sorted(blocks, key=lambda block: block.rows.parts if block.rows else ())


def _row_tensors(module: nn.Module, least: int) -> list[str]:
    """List the tensors that naming a module names, a child's by its path."""
    layer, present = layer_of(type(module)), tensor_names(module)
    if layer is not UNLISTED:
        return listed_tensors(layer, present)
    return [name for name in present if not is_flat(Weight("", module, name).original, least)]


class _Place(NamedTuple):
    """A path at which a module is found; one that is shared has several."""

    path: str
    module: nn.Module
    own: dict[str, str]  # the names of its own weights, by what they are called at this path
    named: set[str]  # the names of the weights that naming the module names


def _places(walk: Walk, least: int | None) -> list[_Place]:
    """List the places at which modules are found; without `least`, what names one names it all."""
    names: defaultdict[nn.Module, dict[str, str]] = defaultdict(dict)
    for weight in walk.weights:
        if least is not None or weight.chain or weight.original is not None:
            names[weight.module][weight.tensor] = weight.name
    places = [
        _Place(path, module, {join(path, t): name for t, name in names[module].items()}, set())
        for path, module in walk.places
    ]
    called = {alias: name for place in places for alias, name in place.own.items()}
    above: defaultdict[str, set[str]] = defaultdict(set)
    for path, module, own, named in places:
        if least is not None:
            row = [join(path, name) for name in _row_tensors(module, least)]
            named |= {called[name] for name in row if name in called}
        else:
            for outer in ("", *accumulate(path.split("."), "{}.{}".format)):
                above[outer].update(own.values())
    if least is None:
        places = [place._replace(named=above[place.path]) for place in places]
    return places


def _hits(
    option: str, selector: Selector, places: Sequence[_Place], weights: Mapping[str, Weight]
) -> set[str]:
    """Return the names of the weights that a selector names, or raise if it names none."""
    hits: set[str] = set()
    if not isinstance(selector, str):
        hits = hits.union(*(each.named for each in places if _selects(option, selector, each)))
    else:
        if "[" in selector:  # also a name that looks like a glob
            hits = _matched(operator.eq, selector, places)
        hits = hits or _matched(_glob, selector, places)
    if not hits:
        raise TargetError(_unmatched(option, selector, weights, places))
    return hits


def _matched(
    matches: Callable[[str, str], bool], pattern: str, places: Sequence[_Place]
) -> set[str]:
    names = [
        name for place in places for alias, name in place.own.items() if matches(pattern, alias)
    ]
    return set(names).union(*(place.named for place in places if matches(pattern, place.path)))


def _selects(option: str, selector: type[nn.Module] | Predicate, place: _Place) -> bool:
    if isinstance(selector, type):
        return isinstance(place.module, selector)
    try:
        return bool(selector(place.path, place.module))
    except Exception as error:
        fault = f'the predicate {_show(selector)} failed at "{place.path}" with {error!r}'
        fix = "it takes (path, module) and returns a bool"
        raise TargetError(f"{option}: {fault}; {fix}") from error


def _selectors(option: str, target: Target) -> list[Selector | Ranged]:
    """List what was given as one selector or as several, all of them of a right type."""
    if isinstance(target, (str, type)) or (callable(target) and not isinstance(target, Iterable)):
        target = [target]
    if not isinstance(target, Iterable) or isinstance(target, (nn.Module, Mapping)):
        rule = "a pattern, a module type, a predicate or several of these"
        raise TargetError(f"{option} must be {rule}, got {type(target).__name__}")
    if not (selectors := list(target)):
        fix = "give None, or at least one pattern, type or predicate"
        raise TargetError(f"{option} is empty; {fix}")
    for each in selectors:
        selector, rows = each if isinstance(each, tuple) and len(each) == 2 else (each, ":")
        if not (isinstance(rows, (slice, Iterable)) or callable(rows)):
            rule = "text, a slice, numbers or a function from how many there are"
            raise TargetError(f"{option} {_show(selector)}: rows must be {rule}, got {rows!r:.60}")
        is_type = isinstance(selector, type) and issubclass(selector, nn.Module)
        is_predicate = callable(selector) and not isinstance(selector, (type, nn.Module))
        if not (isinstance(selector, str) or is_type or is_predicate):
            rule = "a pattern, a subclass of torch.nn.Module or a predicate (path, module) -> bool"
            raise TargetError(f"{option}: a selector must be {rule}, got {selector!r}")
    return selectors


def matches(pattern: str, weight: Weight) -> bool:
    """Say whether a pattern matches a weight's name or its module's path, and its rows."""
    if pattern in (weight.name, weight.path):
        return True
    pattern, rows = split_rows(pattern)
    if rows is not None and (weight.rows is None or weight.whole.block(rows) != weight):
        return False
    return _glob(pattern, weight.whole.name) or _glob(pattern, weight.path)


def _glob(pattern: str, name: str) -> bool:
    """Say whether a pattern, or one that is a dotted suffix, matches a name."""
    if name == pattern or name.endswith(f".{pattern}"):
        return True
    if not any(sign in pattern for sign in "*?["):
        return False
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")


def is_flat(tensor: Tensor | None, least: int = 2) -> bool:
    """Say whether a tensor has fewer dimensions than a kind of delta needs."""
    return tensor is not None and not is_lazy(tensor) and tensor.ndim < least


def _unmatched(
    option: str, selector: Selector, weights: Mapping[str, Weight], places: Sequence[_Place]
) -> str:
    """Say why a selector comes to nothing, and what is near."""
    said = f"{option} {_show(selector)}"
    if not isinstance(selector, str):
        return f"{said} matches no weight; there are {nearest('', weights)}"
    parts = [weight.path.split(".") for weight in weights.values()]
    parents = [".".join(each[:end]) for each in parts for end in range(1, len(each))]
    if any(_glob(selector, parent) for parent in parents):
        return f'{said} has no weight of its own; for all below it, write "{selector}.*"'
    if known := {type(place.module).__name__ for place in places if _glob(selector, place.path)}:
        return f"{said} is a {', '.join(sorted(known))} with nothing to adapt"
    broad = [weight for weight in weights.values() if not is_flat(weight.original)]
    if any(matches(f"{selector}*", weight) for weight in broad):
        return f'{said} matches no weight, because a name is matched whole; write "{selector}*"'
    return f"{said} matches no weight; the nearest are {nearest(selector, weights)}"


def nearest(pattern: str, weights: Mapping[str, Weight]) -> str:
    """Quote up to three names whose ends are the most like a pattern."""
    length = pattern.count(".") + 1

    def likeness(weight: Weight) -> float:
        ends = [".".join(name.split(".")[-length:]) for name in (weight.name, weight.path)]
        names = (*ends, weight.name)
        return max(difflib.SequenceMatcher(None, pattern, name).ratio() for name in names)

    candidates = [weight for weight in weights.values() if not is_flat(weight.original)]
    likest = sorted(candidates, key=likeness, reverse=True)[:3]
    return ", ".join(f'"{weight.name}"' for weight in likest) or "none: the model has no weights"


def _show(selector: Selector) -> str:
    if isinstance(selector, str):
        return f'"{selector}"'
    return getattr(selector, "__qualname__", repr(selector))
