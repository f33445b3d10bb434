"""A model's outline: what a format knows of its weights, from a model, a checkpoint or a file."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..activation import acts
from ..chains import type_before
from ..layers import CONV1D, TABLE, UNLISTED, Layer, layer_of
from ..targets import nearest
from ..weight import Walk, Weight, join, tensor_names

Shape = tuple[int, ...]
Facts = Mapping[str, Any]
"""What a file says of a module, as `ModuleOutline.facts` gives it; of a guess, nothing."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LINEARS = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
BLOCK = re.compile(r"(.+)\[(\d+):(\d+)\]")
"""The name of a block of a weight's rows."""


def kind_name(layer: Layer) -> str:
    """Return what a row's kind is called in a file."""
    kind = layer.kind
    return kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"


ROWS = {kind_name(layer): layer for layer in TABLE}


@dataclass(frozen=True)
class ModuleOutline:
    """What is known of one module.

    Attributes:
        path: Its path.
        layer: Its row of the table; `None` where nothing is known.
        tensors: The names of its own tensors, in their order.
        known: Whether that is so, and no guess from names and shapes.
        class_name: What its class is called.
        groups: A convolution's.
        dilation: A convolution's.
        padding_mode: A convolution's.
        is_transposed: Whether it says that its stacks are stored `(in, out)`, as some of
            transformers' experts do; `None` where that isn't known.
        own_forward: Whether it is a linear layer that computes otherwise than `nn.Linear` does.
        shared: Whether the model has it in several places.
    """

    path: str
    layer: Layer | None = None
    tensors: tuple[str, ...] = ()
    known: bool = False
    class_name: str = "module"
    groups: int = 1
    dilation: tuple[int, ...] = ()
    padding_mode: str = "zeros"
    is_transposed: bool | None = None
    own_forward: bool = False
    shared: bool = False

    @property
    def kind(self) -> type[nn.Module] | str | None:
        """The type of its row."""
        return self.layer.kind if self.layer else None

    @property
    def is_plain(self) -> bool:
        """Whether it is a layer that every library adapts."""
        return self.kind in LINEARS + CONVOLUTIONS

    @property
    def transposed(self) -> bool:
        """Whether its weight is stored `(in, out)`."""
        return self.layer is not None and self.layer.transposed

    @property
    def facts(self) -> dict[str, Any]:
        """What another outline needs to know of it, for JSON; of a guess, nothing."""
        if not self.known or self.layer is None:
            return {}
        names = ["groups", "dilation", "padding_mode"] if self.kind in CONVOLUTIONS else []
        names += ["is_transposed"] if self.layer is UNLISTED else []
        return {"type": kind_name(self.layer)} | {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class WeightOutline:
    """What is known of one tensor of a module, or of a block of its rows.

    Attributes:
        module: The module.
        tensor: What the module calls it.
        source: The model's weight, a checkpoint's tensor or a shape; `None` where none is known.
        rows: The block of its first dimension; `None` for the whole tensor.
    """

    module: ModuleOutline
    tensor: str
    source: Weight | Tensor | Shape | None = None
    rows: slice | None = None

    @property
    def name(self) -> str:
        """Its full name in the plain model, of a block that of the whole tensor."""
        return join(self.module.path, self.tensor)

    @property
    def weight(self) -> Weight | None:
        """The model's own weight, if this is the outline of a model."""
        return replace(self.source, rows=self.rows) if isinstance(self.source, Weight) else None

    @cached_property
    def shape(self) -> Shape | None:
        """Its shape; `None` if it isn't known or there is no such tensor."""
        source = self.source
        if isinstance(source, Weight):
            absent = not source.chain and (source.original is None or is_lazy(source.original))
            source = None if absent else source.like
        shape = tuple(source.shape) if isinstance(source, Tensor) else source
        if shape is None or self.rows is None:
            return shape
        return (len(range(shape[0])[self.rows]), *shape[1:])

    @property
    def view(self) -> Shape:
        """The shape of its matrix view, of a vector its own."""
        shape = self.shape or ()
        return self.module.layer.view(shape) if self.module.layer and len(shape) > 1 else shape

    @property
    def drops(self) -> bool:
        """Whether dropout can act on its layer's input."""
        layer, source = self.module.layer, self.source
        if isinstance(source, Weight):
            return source.layer.drops and acts(source.module, source.tensor)
        return layer is not None and layer.run is not None and layer.drops


@dataclass(frozen=True)
class Outline:
    """What is known of a model; without anything, every name may be one of its own.

    Attributes:
        modules: Its modules by path.
        weights: Its weights by name, in model order.
        parameters: The base's parameters, as far as their values are there.
        buffers: The base's buffers, likewise.
        shapes: Shapes of the base's parameters.
        unknown: Whether nothing is known but what a file's own names and shapes say.
    """

    modules: Mapping[str, ModuleOutline] = field(default_factory=dict)
    weights: Mapping[str, WeightOutline] = field(default_factory=dict)
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    unknown: bool = False

    def module(self, path: str) -> ModuleOutline | None:
        """Return what is known of the module at a path; `None` if there is none."""
        return ModuleOutline(path) if self.unknown else self.modules.get(path)

    def weight(self, name: str) -> WeightOutline | None:
        """Return what is known of a weight or a block of its rows; `None` if there is none."""
        if name in self.weights:
            return self.weights[name]
        if self.unknown:
            path, _, tensor = name.rpartition(".")
            return WeightOutline(ModuleOutline(path), tensor)
        block = BLOCK.fullmatch(name)
        if block is None or block[1] not in self.weights:
            return None
        return replace(self.weights[block[1]], rows=slice(int(block[2]), int(block[3])))

    def has_weight(self, path: str) -> bool:
        """Say whether there may be a module at a path that has a tensor called `weight`."""
        module = self.module(path)
        return module is not None and (self.unknown or "weight" in module.tensors)

    def nearest(self, name: str) -> str:
        """Quote up to three names of weights that are the most like one."""
        nowhere = nn.Module()
        matrices = [each for each in self.weights.values() if len(each.shape or (0, 0)) > 1]
        return nearest(name, {w.name: Weight(w.module.path, nowhere, w.tensor) for w in matrices})


UNKNOWN = Outline(unknown=True)
"""The outline of a model of which there is nothing but the adapter's file."""


def outline_of_model(walk: Walk) -> Outline:
    """Take the outline of a model."""
    slots = Counter(id(child) for _, owner in walk.owners for child in owner._modules.values())
    modules = {
        path: ModuleOutline(
            path,
            layer_of(type(module)),
            tuple(tensor_names(module)),
            known=True,
            class_name=type_before(module).__name__,
            is_transposed=bool(getattr(module, "is_transposed", False)),
            own_forward=isinstance(module, nn.Linear)
            and type_before(module).forward is not nn.Linear.forward,
            shared=slots[id(module)] > 1,
            **_convolution(vars(module) if isinstance(module, CONVOLUTIONS) else {}),
        )
        for path, module in walk.modules
    }
    parameters = {weight.name: tensor for weight, tensor in walk.parameters}
    return Outline(
        modules,
        {w.name: WeightOutline(modules[w.path], w.tensor, w) for w in walk.weights},
        parameters,
        {weight.name: tensor for weight, tensor in walk.buffers},
        {
            name: tuple(tensor.shape)
            for name, tensor in parameters.items()
            if not is_lazy(tensor) and "parametrizations" not in name.split(".")
        },
    )


def outline_of_tensors(
    tensors: Mapping[str, Tensor | Shape], facts: Mapping[str, Facts]
) -> Outline:
    """Make the outline of the model whose tensors, or whose tensors' shapes, these are.

    Modules are what `facts` says of them, by the name of a weight; the others are guessed.
    """
    shapes = {n: tuple(t.shape) if isinstance(t, Tensor) else t for n, t in tensors.items()}
    own: defaultdict[str, dict[str, Shape]] = defaultdict(dict)
    for name, shape in shapes.items():
        path, _, tensor = name.rpartition(".")
        own[path][tensor] = shape
    said = {name.rpartition(".")[0]: each for name, each in facts.items() if name in tensors}
    for path in own:  # another's attention has a plain layer behind it
        behind = said.get(join(path, "out_proj"), {}).get("type", kind_name(TABLE[0]))
        if "in_proj_weight" in own[path] and behind != kind_name(TABLE[0]):
            said.setdefault(path, {"type": kind_name(UNLISTED)})
    parents = [each for path in own for each in accumulate(path.split("."), "{}.{}".format)]
    modules = {
        path: _module_outline(path, own.get(path, {}), said.get(path, {}))
        for path in dict.fromkeys(["", *parents])
    }
    weights = {
        name: WeightOutline(modules[name.rpartition(".")[0]], name.rpartition(".")[2], tensor)
        for name, tensor in tensors.items()
    }
    values = {name: each for name, each in tensors.items() if isinstance(each, Tensor)}
    return Outline(modules, weights, values, {}, shapes)


def _module_outline(path: str, own: Mapping[str, Shape], facts: Facts) -> ModuleOutline:
    layer = ROWS.get(str(facts["type"]), UNLISTED) if "type" in facts else _guess(own)
    transposed = facts.get("is_transposed")
    return ModuleOutline(
        path,
        layer,
        tuple(own),
        known="type" in facts,
        class_name=kind_name(layer).rpartition(".")[2],
        is_transposed=transposed if isinstance(transposed, bool) else None,
        **_convolution(facts if layer.kind in CONVOLUTIONS else {}),
    )


def _convolution(facts: Facts) -> dict[str, Any]:
    """Keep of a convolution's facts those that are of their type."""
    kinds = {"groups": int, "padding_mode": str, "dilation": (list, tuple)}
    kept = {name: facts[name] for name in kinds if isinstance(facts.get(name), kinds[name])}
    return kept | {"dilation": tuple(kept["dilation"])} if "dilation" in kept else kept


def _guess(own: Mapping[str, Shape]) -> Layer:
    """Guess a module's row from the shapes of its tensors."""
    if "in_proj_weight" in own:
        return layer_of(nn.MultiheadAttention)
    weight, bias = own.get("weight", ()), own.get("bias", ())
    if len(weight) == 2 and bias == weight[1:] != weight[:1]:
        return ROWS[CONV1D]
    guesses = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
    return layer_of(guesses.get(len(weight), nn.Module))
