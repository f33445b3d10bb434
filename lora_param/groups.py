"""Weight space for a routed batch: a module runs once for each group of rows that are alike."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 as everybody calls it
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .chains import type_before
from .errors import LoRAError
from .layers import layer_of
from .routing import Routing, routed_here, routing_of

Dims = Mapping[Any, int]
"""Where rows are: by an argument's name, and by the place of an output. Counted from the end, a
tensor without that dimension has no rows."""

ATTENTION: Dims = {
    "query": 1,
    "key": 1,
    "value": 1,
    "key_padding_mask": -2,
    "attn_mask": -3,
    0: 1,
    1: 0,
}
SHAPE = {"__get__", "size", "dim", "stride", "numel", "nelement", "is_floating_point", "is_complex"}
SHAPE |= {"element_size", "get_device", "is_contiguous", "ndimension", "__len__"}
"""What may be asked of a weight that is another one for each row."""


def run_by_groups(
    routing: Routing, module: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    """Call a module's forward once for each group of rows, and put their results in order."""
    named = _named(call, (module, *args), kwargs)
    layer = layer_of(type_before(module))
    if layer.moving and module.training:
        path = routing.paths[module]
        reason = f"a {type_before(module).__name__} in training mixes the rows of a batch"
        raise LoRAError(f"{path}: {reason}; put it into eval mode, or train one adapter at a time")
    own = [value for name, value in list(named.items())[1:] if not isinstance(value, (bool, int))]
    if any(isinstance(each, PackedSequence) for each in own):
        reason = "a packed sequence mixes rows, which can't be routed; pad it instead"
        raise LoRAError(f"{routing.paths[module]}: {reason}")
    tensors = [leaf for leaf in tree_flatten(own)[0] if isinstance(leaf, Tensor)]
    if not tensors:
        return call(module, *args, **kwargs)
    dim = routing.dim_of(module, tensors[0], _candidates(module, tensors[0]))
    dims: dict[Any, int] = {**dict.fromkeys(named, dim), **layer.rows_of}
    return _in_groups(routing, module, call, named, dims, dim)


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


def _in_groups(
    routing: Routing,
    module: nn.Module,
    call: Callable[..., Any],
    named: Mapping[str, Any],
    dims: Dims,
    dim: int,
) -> Any:
    results = []
    for rows, one in routing.groups:
        with routed_here(one):
            own = {}
            for name, value in named.items():

                def take(leaf: Any, name: str = name, rows: list[int] = rows) -> Any:
                    if isinstance(leaf, ByRow):
                        return leaf.read()
                    return _taken(routing, module, name, leaf, rows, dims.get(name))

                own[name] = tree_map(take, value)
            results.append(_called(call, own))
    flat = [tree_flatten(result) for result in results]
    order = torch.tensor([row for rows, _ in routing.groups for row in rows]).argsort()
    parts = zip(*(leaves for leaves, _ in flat), strict=True)
    tops = results[0] if isinstance(results[0], tuple) else (results[0],)
    places = [place for place, top in enumerate(tops) for _ in tree_flatten(top)[0]]
    joined = [
        _joined(part, order, dims.get(place, dim))
        for part, place in zip(parts, places, strict=True)
    ]
    return tree_unflatten(joined, flat[0][1])


def _called(call: Callable[..., Any], named: Mapping[str, Any]) -> Any:
    bound = inspect.signature(call).bind_partial()
    bound.arguments.update(named)
    return call(*bound.args, **bound.kwargs)


def _taken(
    routing: Routing, module: nn.Module, name: str, leaf: Any, rows: list[int], dim: int | None
) -> Any:
    """Return a group's part of an argument; what has no rows is shared."""
    if not isinstance(leaf, Tensor) or dim is None or (dim < 0 and leaf.dim() < -dim):
        return leaf
    n = routing.rows
    if dim >= leaf.dim() or leaf.shape[dim] % n:
        path, shape = routing.paths[module], tuple(leaf.shape)
        reason = f"{name} is {shape}, with no {n} rows or a multiple in dimension {dim}"
        raise LoRAError(f"{path}: {reason}; take the adapters off this layer, or pass it by row")
    copies = torch.arange(leaf.shape[dim] // n)
    index = (torch.tensor(rows)[:, None] * len(copies) + copies).flatten()
    return leaf.index_select(dim, index.to(leaf.device))


def _joined(parts: Sequence[Any], order: Tensor, dim: int) -> Any:
    """Join the groups' results, and put their rows in the batch's order."""
    if not isinstance(parts[0], Tensor):
        return parts[0]
    whole = torch.cat(list(parts), dim)
    copies = torch.arange(whole.shape[dim] // len(order))
    index = (order[:, None] * len(copies) + copies).flatten()
    return whole.index_select(dim, index.to(whole.device))


class ByRow(Tensor):
    """A weight that is another one for each row of the batch, as whoever reads it gets it.

    It has a shape, a dtype and a device, and `F.linear` and torch's attention can compute with it.
    """

    reader: tuple[Routing, nn.Module, str]

    def read(self) -> Tensor:
        """Return the weight of the rows that are routed alike here."""
        value: Tensor = getattr(*self.reader[1:])
        return value

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
                return _in_groups(routing, module, func, _named(func, args, kwargs), ATTENTION, 1)
            if func is F.linear:
                x, *rest = args
                named = {"input": x, "weight": rest[0], "bias": [*rest[1:], None][0]} | kwargs
                dim = routing.dim_of(module, x, x.dim() - 1)
                return _in_groups(routing, module, _linear, named, {"input": dim}, dim)
        path = routing.paths[module]
        reason = "is another one for each row of a routed batch, and is read outside of its layer"
        fix = "compute by the layer, or run the rows in groups, each under lora_selected"
        raise LoRAError(f"{path}: its {name} {reason}, for {func.__name__}; {fix}")


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(input, weight, bias)


def weight_by_row(routing: Routing, module: nn.Module, name: str, like: Tensor) -> Tensor:
    """Return what reading a weight gives while rows differ."""
    weight = like.detach().as_subclass(ByRow)
    weight.reader = routing, module, name
    return weight


def by_rows(base: Any, own: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """Make the forward of a type in weight space: by groups, while rows differ."""

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = own or base.forward
        if Routing.used:
            routing = routing_of(self)
            if routing is not None and routing.separates(self):
                return routing.run(routing, self, call, args, kwargs)
        return call(self, *args, **kwargs)

    return forward
