"""A model's outline: what a format knows of its weights, from a model, a checkpoint or a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..activation import acts
from ..chains import type_before
from ..errors import TargetError
from ..layers import CONV1D, TABLE, UNLISTED, Layer, layer_of, stack
from ..rows import Rows, Said, split_rows
from ..targets import nearest
from ..walk import Walk
from ..weight import Weight, join, tensor_names

Shape = tuple[int, ...]
Facts = Mapping[str, Any]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LINEARS: Any = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
LINEARS += tuple(layer.kind for layer in TABLE if layer.dense is nn.Linear)
GUESSES: dict[int, Any] = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
"""What a module's `weight` of so many dimensions is taken for."""

FACTS: dict[str, Any] = {
    "type": str,
    "groups": int,
    "dilation": (list, tuple),
    "padding_mode": str,
    "is_transposed": bool,  # whether its stacks are stored `(in, out)`, as some experts'
}
"""What another outline needs to know of a module."""


def kind_name(layer: Layer) -> str:
    """Return what a row's kind is called in a file."""
    kind = layer.kind
    return kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"


ROWS = {kind_name(layer): layer for layer in TABLE}
NOTHING = Layer("nothing", tensors=(), view=stack)
"""The row of a module of which nothing is known."""


@dataclass(frozen=True)
class ModuleOutline:
    """What is known of one module: by default, nothing."""

    path: str
    layer: Layer = NOTHING
    tensors: tuple[str, ...] = ()  # the names of its own, in their order
    class_name: str = "module"
    facts: Facts = field(default_factory=dict)  # what `FACTS` names, for JSON; of a guess, none
    own_forward: bool = False  # whether it is linear and computes otherwise than `nn.Linear`
    shared: bool = False  # whether the model has it in several places

    @property
    def is_plain(self) -> bool:
        """Whether it is a layer that every library adapts."""
        return self.layer.kind in LINEARS + CONVOLUTIONS

    @property
    def computes_otherwise(self) -> bool:
        """Whether it does otherwise than a plain layer of its kind without dilation or padding."""
        dilated = any(each != 1 for each in self.facts.get("dilation", ()))
        return self.own_forward or dilated or self.facts.get("padding_mode", "zeros") != "zeros"


@dataclass(frozen=True)
class WeightOutline:
    """What is known of one tensor of a module, or of a block of its `rows`.

    Its `source` is the model's weight, a checkpoint's tensor, a shape, or `None` for nothing.
    """

    module: ModuleOutline
    tensor: str
    source: Weight | Tensor | Shape | None = None
    rows: Rows | None = None

    @property
    def name(self) -> str:
        """Its full name in the plain model, of a block that of the whole tensor."""
        return join(self.module.path, self.tensor)

    @property
    def full_name(self) -> str:
        """Its name with its rows."""
        return self.name if self.rows is None else f"{self.name}[{self.rows}]"

    @cached_property
    def shape(self) -> Shape | None:
        """Its shape; `None` if it isn't known or there is no such tensor."""
        source = self.source
        if isinstance(source, Weight):
            absent = not source.chain and (source.original is None or is_lazy(source.original))
            source = None if absent else source.like
        return None if source is None else _shape(source)

    @property
    def value(self) -> Tensor | None:
        """Its values without any delta, as far as they are known."""
        source = self.source.like if isinstance(self.source, Weight) else self.source
        return source if isinstance(source, Tensor) else None

    @property
    def is_buffer(self) -> bool:
        """Whether it is a buffer that training moves."""
        return self.tensor in self.module.layer.moving

    @property
    def dim(self) -> int:
        """Which dimension of the whole tensor counts output features."""
        is_transposed = self.module.facts.get("is_transposed", False)
        return self.module.layer.features_of(self.shape or (), is_transposed)

    def block(self, said: Said) -> WeightOutline | None:
        """Return what is known of a block of rows; `None` if there is no such block."""
        if not (shape := self.shape):
            return None
        try:
            rows = Rows.of(said, shape[self.dim])
        except TargetError:
            return None
        source: Any = self.source
        if isinstance(source, Weight):
            source = replace(source, rows=rows)
        elif isinstance(source, Tensor):
            source = rows.take(source, self.dim)
        else:
            source = (*shape[: self.dim], len([*rows]), *shape[self.dim + 1 :])
        return replace(self, rows=rows, source=source)

    @property
    def view(self) -> Shape:
        """The shape of its matrix view, of a vector its own."""
        shape = self.shape or ()
        return self.module.layer.view(shape) if len(shape) > 1 else shape

    @property
    def drops(self) -> bool:
        """Whether dropout can act on its layer's input."""
        able = self.module.layer.drops and self.module.layer.run is not None
        source = self.source
        return able and (not isinstance(source, Weight) or acts(source.module, self.tensor))


@dataclass(frozen=True)
class Outline:
    """What is known of a model's modules and weights, by path and name in model order.

    Its `parameters`, and all its `tensors`, buffers too, are there as far as they have values. Of
    an `unknown` model every name may be one of its own: nothing is known but what a file says.
    """

    modules: Mapping[str, ModuleOutline] = field(default_factory=dict)
    weights: Mapping[str, WeightOutline] = field(default_factory=dict)
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    unknown: bool = False
    live: bool = False  # whether it is a model's, and no file's

    def module(self, path: str) -> ModuleOutline | None:
        """Return what is known of the module at a path; `None` if there is none."""
        return ModuleOutline(path) if self.unknown else self.modules.get(path)

    def weight(self, name: str) -> WeightOutline | None:
        """Return what is known of a weight or a block of its rows; `None` if there is none."""
        whole, said = (name, None) if name in self.weights else split_rows(name)
        weight = self.weights.get(whole)
        if weight is not None and said is not None:
            return weight.block(said)
        if weight is None and self.unknown:
            path, _, tensor = name.rpartition(".")
            return WeightOutline(ModuleOutline(path), tensor)
        return weight

    def layer_weight(self, *paths: str) -> WeightOutline | None:
        """Return what is known of the `weight` of the first module that there may be."""
        found = (self.weight(join(path, "weight")) for path in paths)
        return next(filter(None, found), None)

    def nearest(self, name: str) -> str:
        """Quote up to three names of weights that are the most like one."""
        nowhere = nn.Module()
        matrices = [each for each in self.weights.values() if len(each.shape or (0, 0)) > 1]
        return nearest(name, {w.name: Weight(w.module.path, nowhere, w.tensor) for w in matrices})


UNKNOWN = Outline(unknown=True)
"""The outline of a model of which there is nothing but the adapter's file."""


def outline_of_model(walk: Walk) -> Outline:
    """Take the outline of a model."""
    slots = Counter(id(child) for owner in walk.owners for child in owner._modules.values())
    modules = {}
    for path, module in walk.modules:
        cls = type_before(module)
        layer = layer_of(cls)
        facts: dict[str, Any] = {"type": kind_name(layer)}
        if isinstance(module, CONVOLUTIONS):
            facts |= {
                name: getattr(module, name) for name in ("groups", "dilation", "padding_mode")
            }
        if layer is UNLISTED:
            facts["is_transposed"] = bool(getattr(module, "is_transposed", False))
        own_forward = issubclass(cls, nn.Linear) and cls.forward is not nn.Linear.forward
        own_forward = own_forward and not layer.dense
        modules[path] = ModuleOutline(
            *(path, layer, tuple(tensor_names(module)), cls.__name__, facts),
            *(own_forward, slots[id(module)] > 1),
        )
    return Outline(
        modules,
        {w.name: WeightOutline(modules[w.path], w.tensor, w) for w in walk.weights + walk.moving},
        {weight.name: tensor for weight, tensor in walk.parameters},
        {weight.name: tensor for weight, tensor in walk.tensors},
        live=True,
    )


def outline_of_tensors(
    tensors: Mapping[str, Tensor] | Mapping[str, Shape], facts: Mapping[str, Facts]
) -> Outline:
    """Make the outline of the model whose tensors, or whose tensors' shapes, these are.

    Modules are what `facts` says of them, by their paths; the others are guessed.
    """
    own: dict[str, dict[str, Tensor | Shape]] = {"": {}}
    for name, source in tensors.items():
        path, _, tensor = name.rpartition(".")
        for parent in accumulate(path.split("."), "{}.{}".format):
            own.setdefault(parent, {})
        own[path][tensor] = source
    modules = {path: _module(path, inside, facts) for path, inside in own.items()}
    weights = {
        join(path, tensor): WeightOutline(modules[path], tensor, source)
        for path, inside in own.items()
        for tensor, source in inside.items()
    }
    values = {name: each for name, each in tensors.items() if isinstance(each, Tensor)}
    parameters = {name: each for name, each in values.items() if not weights[name].is_buffer}
    return Outline(modules, weights, parameters, values)


def _module(
    path: str, own: Mapping[str, Tensor | Shape], facts: Mapping[str, Facts]
) -> ModuleOutline:
    """Return what is said of a module, or what its tensors' shapes look like."""
    said = {
        name: fact
        for name, fact in facts.get(path, {}).items()
        if isinstance(fact, FACTS.get(name, ()))
    }
    weight, bias = (_shape(own.get(name, ())) for name in ("weight", "bias"))
    linear = kind_name(TABLE[0])  # attention's
    if "type" in said:
        layer = ROWS.get(said["type"], UNLISTED)
    elif "in_proj_weight" in own:  # another's attention has a plain layer behind it
        behind = facts.get(join(path, "out_proj"), {}).get("type", linear)
        layer = layer_of(nn.MultiheadAttention) if behind == linear else UNLISTED
    elif "running_mean" in own:
        layer = layer_of(nn.BatchNorm1d)
    elif len(weight) == 2 and bias == weight[1:] != weight[:1]:
        layer = ROWS[CONV1D]
    else:
        layer = layer_of(GUESSES.get(len(weight), nn.Module))
    return ModuleOutline(path, layer, tuple(own), kind_name(layer).rpartition(".")[2], said)


def _shape(source: Tensor | Shape) -> Shape:
    return tuple(source.shape) if isinstance(source, Tensor) else source
