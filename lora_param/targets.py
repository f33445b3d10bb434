"""Which weights: patterns, types and predicates, resolved to a list before anything is changed."""

import difflib
import fnmatch
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, TypeAlias, TypeVar, cast

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .errors import WORDS, TargetError
from .layers import UNLISTED, layer_of, listed_tensors
from .rows import Said, split_rows
from .walk import Walk
from .weight import Weight, join, overlapping, tensor_names

Predicate: TypeAlias = Callable[[str, nn.Module], bool]
Selector: TypeAlias = str | type[nn.Module] | Predicate
Ranged: TypeAlias = tuple[Selector, Said]
Target: TypeAlias = Selector | Iterable[Selector | Ranged]
Number = TypeVar("Number", int, float, float | None)


def resolve(
    walk: Walk,
    target: Target | None,
    exclude: Target | None = None,
    train: Target | None = None,
    least: int = 2,
) -> tuple[list[Weight], list[Weight]]:
    """List the weights of `target` without `exclude`'s, and those of `train`, in model order.

    A glob of `target` that also covers biases and norms takes those of at least `least` dimensions,
    and a selector with rows gives blocks. Beside `train` a target may be empty, and `exclude` is
    left out of `train` then. What both name is `train`'s.
    """
    nothing = isinstance(target, (list, tuple)) and not target
    whole = [] if train is None else named(walk, "train", train, exclude if nothing else None)
    if whole and nothing:
        return [], whole
    chosen = _chosen(_Names(walk, least), "target", target, exclude)
    both = [weight.name for weight in whole if chosen.pop(weight.name, None)]
    if both and target is not None:
        listing = ", ".join(both)
        warnings.warn(f"target and train both name {listing}: trained whole", stacklevel=4)
    chosen = {name: _disjoint(own) if own[1:] else own for name, own in chosen.items()}
    return [each for own in chosen.values() for each in own], whole


def named(walk: Walk, option: str, target: Target, exclude: Target | None = None) -> list[Weight]:
    """List the parameters that an option names, of a module all, in model order."""
    return [own[0] for own in _chosen(_Names(walk, 0), option, target, exclude).values()]


def number_for_each(
    option: str, value: Number | Mapping[str, Number], weights: Sequence[Weight]
) -> list[Number]:
    """Give each weight its number: the one for all, or that of the first pattern to match it."""
    if not isinstance(value, Mapping):
        return [value] * len(weights)
    for pattern in value:
        if not isinstance(pattern, str):
            raise TargetError(f"{option}: a pattern must be a string, got {pattern!r}")
        if not any(matches(pattern, weight) for weight in weights):
            raise TargetError(_unmatched(option, pattern, {w.name: w for w in weights}))
    deciders = [next((p for p in value if matches(p, weight)), None) for weight in weights]
    if None in deciders:
        unmatched = f'no pattern matches "{weights[deciders.index(None)].name}"'
        raise TargetError(f'{option}: {unmatched}; end the mapping with "*" for the rest')
    if idle := [pattern for pattern in value if pattern not in deciders]:
        reason = f'"{idle[0]}" decides nothing, because earlier patterns match all its weights'
        raise TargetError(f"{option}: {reason}; put it in front of them, or drop it")
    return [value[pattern] for pattern in deciders if pattern is not None]


class _Names:
    """What can be named in a model: by each path, a module's or a weight's, the weights' names.

    A module's names the tensors of its row, or of an unlisted module those of at least `least`
    dimensions; with a `least` of 0 all below it. One that is shared has several paths.
    """

    def __init__(self, walk: Walk, least: int) -> None:
        there = [w for w in walk.weights if least or w.chain or w.original is not None]
        self.weights = {weight.name: weight for weight in there}
        self.places, self.least = walk.places, least
        own: defaultdict[nn.Module, list[Weight]] = defaultdict(list)
        for weight in there:
            own[weight.module].append(weight)
        self.named: defaultdict[str, set[str]] = defaultdict(set)
        for path, module in self.places:
            above = [] if least else ["", *accumulate(path.split("."), "{}.{}".format)]
            for weight in own[module]:
                for each in (join(path, weight.tensor), *above):
                    self.named[each].add(weight.name)
        for path, module in self.places if least else ():
            for tensor in _row_tensors(module, least):
                self.named[path] |= self.named.get(join(path, tensor), set())

    def chosen(self, option: str, target: Target) -> dict[str, list[Weight]]:
        """Return the weights, or blocks of them, that a target names, by the weights' names."""
        chosen: defaultdict[str, list[Weight]] = defaultdict(list)
        for selector, rows in _selectors(option, target):
            if isinstance(selector, str) and rows is None and not self.named.get(selector):
                selector, rows = split_rows(selector)
            if rows is not None and option != "target":
                rule = "can't have rows; only target names blocks"
                raise TargetError(f"{option} {_show(selector)} {rule}")
            hits = self._hits(option, selector)
            every = option != "target" or selector is _by_default
            broad = [w for w in hits if every or not is_flat(w.original, self.least)]
            if not broad:
                flat = ", ".join(sorted(weight.name for weight in hits))
                said = f"target {_show(selector)} matches only {flat}"
                raise TargetError(f"{said}: an adapter needs a tensor of two or more dimensions")
            for weight in broad:
                block = weight if rows is None or weight.shape is None else weight.block(rows)
                chosen[weight.name].append(block)
        return chosen

    def _hits(self, option: str, selector: Selector) -> list[Weight]:
        """Return the weights that a selector names, in model order, or raise if it names none."""
        if not isinstance(selector, str):
            paths = [path for path, m in self.places if _selects(option, selector, path, m)]
        elif "[" in selector and self.named.get(selector):  # a name that looks like a glob
            paths = [selector]
        else:
            paths = [path for path in self.named if _glob(selector, path)]
        if not (hits := set[str]().union(*[self.named[path] for path in paths])):
            raise TargetError(_unmatched(option, selector, self.weights, self.places))
        return [weight for name, weight in self.weights.items() if name in hits]


def _chosen(
    names: _Names, option: str, target: Target | None, exclude: Target | None
) -> dict[str, list[Weight]]:
    """Return what a target names and `exclude` doesn't, in model order."""
    chosen = names.chosen(option, _by_default if target is None else target)
    kept = chosen.keys() - (names.chosen("exclude", exclude) if exclude is not None else ())
    chosen = {name: chosen[name] for name in names.weights if name in kept}
    if not chosen:
        verb = "adapt" if option == "target" else option
        raise TargetError(f"exclude leaves nothing to {verb}; narrow it, or drop the call")
    return chosen


def _by_default(path: str, module: nn.Module) -> bool:
    return layer_of(type(module)).default


def _disjoint(blocks: Sequence[Weight]) -> list[Weight]:
    """List one adapter's blocks of a tensor in order, or raise if two have a row in common."""
    blocks = list(dict.fromkeys(blocks))
    for one, other in overlapping(blocks):
        reason = f"{other.name} overlaps it, and an adapter changes a row once"
        raise TargetError(f"{one.name}: {reason}; give blocks that don't, or another adapter")
    return sorted(blocks, key=lambda block: block.rows.parts if block.rows else ())


def _row_tensors(module: nn.Module, least: int) -> list[str]:
    """List the tensors that naming a module names, a child's by its path."""
    layer, present = layer_of(type(module)), tensor_names(module)
    if layer is not UNLISTED:
        return listed_tensors(layer, present)
    return [name for name in present if not is_flat(Weight("", module, name).original, least)]


def _selects(
    option: str, selector: type[nn.Module] | Predicate, path: str, module: nn.Module
) -> bool:
    if isinstance(selector, type):
        return isinstance(module, selector)
    try:
        return bool(selector(path, module))
    except Exception as error:
        fault = f'the predicate {_show(selector)} failed at "{path}" with {error!r}'
        fix = "it takes (path, module) and returns a bool"
        raise TargetError(f"{option}: {fault}; {fix}") from error


def _selectors(option: str, target: Target) -> list[tuple[Selector, Said | None]]:
    """List what was given as one selector or as several, with rows, all of them of a right type."""
    if isinstance(target, (str, type)) or (callable(target) and not isinstance(target, Iterable)):
        target = [target]
    if not isinstance(target, Iterable) or isinstance(target, (nn.Module, Mapping)):
        rule = "a pattern, a module type, a predicate or several of these"
        raise TargetError(f"{option} must be {rule}, got {type(target).__name__}")
    selectors: list[tuple[Selector, Said | None]] = []
    for each in cast("Iterable[Any]", target):
        ranged = isinstance(each, tuple) and len(each) == 2
        selector, rows = each if ranged else (each, None)
        if ranged and not (isinstance(rows, (slice, Iterable)) or callable(rows)):
            rule = "text, a slice, numbers or a function from how many there are"
            raise TargetError(f"{option} {_show(selector)}: rows must be {rule}, got {rows!r:.60}")
        is_type = isinstance(selector, type) and issubclass(selector, nn.Module)
        is_predicate = callable(selector) and not isinstance(selector, (type, nn.Module))
        if not (isinstance(selector, str) or is_type or is_predicate):
            rule = "a pattern, a subclass of torch.nn.Module or a predicate (path, module) -> bool"
            raise TargetError(f"{option}: a selector must be {rule}, got {selector!r}")
        selectors.append((selector, rows))
    if not selectors:
        fix = "give None, or at least one pattern, type or predicate"
        raise TargetError(f"{option} is empty; {fix}")
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
    option: str,
    selector: Selector,
    weights: Mapping[str, Weight],
    places: Sequence[tuple[str, nn.Module]] = (),
) -> str:
    """Say why a selector comes to nothing, and what is near."""
    said = f"{option} {_show(selector)}"
    if selector is _by_default:
        none = "target=None finds no linear, convolution, attention or recurrent layer"
        return f"{none}; name the weights, for example {nearest('', weights)}"
    if not isinstance(selector, str):
        return f"{said} matches no weight; there are {nearest('', weights)}"
    if selector == "all-linear":
        return f"{said} matches no weight; {WORDS[selector]}"
    parts = [weight.path.split(".") for weight in weights.values()]
    parents = [".".join(each[:end]) for each in parts for end in range(1, len(each))]
    if any(_glob(selector, parent) for parent in parents):
        return f'{said} has no weight of its own; for all below it, write "{selector}.*"'
    if known := {type(module).__name__ for path, module in places if _glob(selector, path)}:
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
