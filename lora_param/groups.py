"""Weight space for a routed batch: a module runs once for each group of rows that are alike."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 as everybody calls it
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only, tree_unflatten

from .chains import chains_of, type_before
from .layers import MASKS, layer_of
from .ops import PLAIN
from .places import Places
from .routing import Routing, routed_here, routing_of

Dims = Mapping[Any, int]
"""Where rows are: by an argument's name, and by the place of an output. Counted from the end, a
tensor without that dimension has no rows."""

ATTENTION: Dims = {**dict.fromkeys(("query", "key", "value", 0), 1), **MASKS}
SHAPE = {"__get__", "size", "dim", "stride", "numel", "nelement", "is_floating_point", "is_complex"}
SHAPE |= {"element_size", "get_device", "is_contiguous", "ndimension", "__len__"}
"""What may be asked of a weight that is another one for each row."""


def run_by_groups(routing: Routing, module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Call a module's forward once for each group of rows, and put their results in order."""
    routing.check_fixed()
    places, layer, call = routing.places, layer_of(type_before(module)), type(module).forward
    if layer.moving and module.training:
        reason = f"a {type_before(module).__name__} in training mixes the rows of a batch"
        raise places.error(module, f"{reason}; put it into eval mode, or train one at a time")
    named = _named(call, (module, *args), kwargs)
    if any(isinstance(each, PackedSequence) for each in named.values()):
        reason = "a packed sequence mixes rows, which can't be routed; pad it instead"
        raise places.error(module, reason)
    named = tree_map_only(Tensor, functools.partial(places.spread, module), named)
    first = _first(named.values())
    if first is None:
        return call(module, *args, **kwargs)
    places.inside.update(each for each in module.modules() if each is not module)
    dim = places.dim_of(module, first, _candidates(module, first))
    return _in_groups(routing, module, call, named, {**dict.fromkeys(named, dim), **layer.rows_of})


def _first(values: Any) -> Tensor | None:
    return next((leaf for leaf in tree_flatten([*values])[0] if isinstance(leaf, Tensor)), None)


def _candidates(module: nn.Module, x: Tensor) -> int:
    """Return how many of an input's first dimensions could have the rows."""
    if isinstance(module, _ConvNd):
        return max(0, x.dim() - len(module.kernel_size) - 1)
    if isinstance(module, (nn.MultiheadAttention, nn.RNNBase, nn.EmbeddingBag)):
        # Of one sequence, or of bags that lie one after the other, none has them.
        return x.dim() - 1 if x.dim() == 3 - isinstance(module, nn.EmbeddingBag) else 0
    return x.dim() - x.is_floating_point()


def _named(call: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any]:
    return dict(inspect.signature(call).bind(*args, **kwargs).arguments)


def _in_groups(routing: Routing, module: nn.Module, call: Any, named: Any, dims: Dims) -> Any:
    first = _first(value for name, value in named.items() if name in dims)

    def take(name: str, rows: list[int], leaf: Any) -> Any:
        if isinstance(leaf, ByRow):
            value: Tensor = getattr(*leaf.reader[1:])  # of the rows that are routed alike here
            return value
        if leaf is first or _has_rows(routing.places, module, name, leaf, dims, first):
            return _picked(leaf, dims[name], rows, routing)
        return leaf

    results = []
    for rows, one in routing.groups:
        with routed_here(one):
            own = {n: tree_map(functools.partial(take, n, rows), v) for n, v in named.items()}
            bound = inspect.BoundArguments(inspect.signature(call), own)
            results.append(call(*bound.args, **bound.kwargs))
    flat, structures = zip(*map(tree_flatten, results), strict=True)
    tops = results[0] if isinstance(results[0], tuple) else (results[0],)
    usual = next(iter(dims.values()))
    where = [dims.get(place, usual) for place, top in enumerate(tops) for _ in tree_flatten(top)[0]]
    joined = [
        _joined(routing, module, parts, dim) for *parts, dim in zip(*flat, where, strict=True)
    ]
    return tree_unflatten(joined, structures[0])


def _has_rows(places: Places, module: Any, name: str, leaf: Any, dims: Dims, first: Any) -> bool:
    """Say whether an argument behind the first has the rows too, or raise where that is a guess.

    What has one entry there, or no such dimension, is shared.
    """
    dim = dims.get(name)
    if not isinstance(leaf, Tensor) or dim is None or leaf.dim() <= (~dim if dim < 0 else dim):
        return False
    n, shape = places.rows, tuple(leaf.shape)
    if dim < 0 and shape[dim] % n == 0:
        return True
    if dim >= 0 and shape[dim] == 1:
        return False
    if dim < 0 or shape[dim] not in (n, first.shape[dim]):
        doubt = f"with no {n} rows in dimension {dim}"
    elif places.known[module].said or shape.count(n) < 2:
        return True
    else:
        doubt = f"where more than one dimension could be that of the {n} rows"
    fix = "pass it by row, say where rows are by dims=, or take the adapters off this layer"
    raise places.error(module, f"{name} is {shape}, {doubt}; {fix}")


def _picked(whole: Tensor, dim: int, rows: Sequence[int], routing: Routing) -> Tensor:
    """Return what some of the rows have of a tensor, each with all its neighbours."""
    copies = torch.arange(whole.shape[dim] // routing.rows, device=whole.device)
    index = routing.on(whole.device, rows)[:, None] * len(copies) + copies
    return whole.index_select(dim, index.flatten())


def _joined(routing: Routing, module: nn.Module, parts: Sequence[Any], dim: int) -> Any:
    """Join the groups' results, and put their rows in the batch's order."""
    if not isinstance(parts[0], Tensor):
        return parts[0]
    groups = [rows for rows, _ in routing.groups]
    sizes = [part.shape[dim] if part.dim() > dim else 0 for part in parts]
    share = sum(sizes) // routing.rows
    if not share or sizes != [len(rows) * share for rows in groups]:
        shapes = [tuple(part.shape) for part in parts]
        reason = f"gives {shapes[:3]} for {[len(rows) for rows in groups][:3]} rows, which can't be"
        raise routing.places.error(module, f"it {reason} told apart; take the adapters off it")
    order = torch.tensor([row for rows in groups for row in rows]).argsort().tolist()
    return _picked(torch.cat(list(parts), dim), dim, order, routing)


class ByRow(Tensor):
    """A weight that is another one for each row of the batch, as whoever reads it gets it.

    It has a shape, a dtype and a device, and `F.linear` and torch's attention can compute with it.
    """

    reader: tuple[Routing, nn.Module, str]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer what is asked of the weight itself, compute by groups, or raise."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if getattr(func, "__name__", "") in SHAPE:
                answer = func(*args, **kwargs)
                if not isinstance(answer, Tensor):
                    return answer
            leaves = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, cls)]
            routing, module, name = leaves[0].reader
            if func is F.multi_head_attention_forward:
                return _in_groups(routing, module, func, _named(func, args, kwargs), ATTENTION)
            if func is F.linear:
                named = _named(_linear, args, kwargs)
                x = named["input"] = routing.places.spread(module, named["input"])
                dims = {"input": routing.places.dim_of(module, x, x.dim() - 1)}
                return _in_groups(routing, module, _linear, named, dims)
        reason = "is another one for each row of a routed batch, and is read outside of its layer"
        fix = "compute by the layer, or run the rows in groups, each under lora_selected"
        raise routing.places.error(module, f"its {name} {reason}, for {func.__name__}; {fix}")


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(input, weight, bias)


def weight_by_row(routing: Routing, module: nn.Module, name: str, like: Tensor) -> Tensor:
    """Return what reading a weight gives while rows differ."""
    routing.places.check_not_inside(module, chains_of(module)[name])
    values = like.detach()
    if type(like) in PLAIN:  # scripted code asks no class, and computes with these
        values = like.new_full((), torch.nan).expand(like.shape)
    weight = values.as_subclass(ByRow)
    weight.reader = routing, module, name
    return weight


def by_rows(base: Any, own: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """Make the forward of a type in weight space, while rows differ its own forward by groups."""

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        routing = routing_of(self) if Routing.used else None
        if routing is not None and routing.separates(self):
            run: Any = run_by_groups
            if torch.compiler.is_compiling():
                run = torch.compiler.disable(run)  # type: ignore[no-untyped-call]
            return run(routing, self, args, kwargs)
        return (own or base.forward)(self, *args, **kwargs)

    return forward
