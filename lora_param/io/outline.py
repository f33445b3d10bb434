"""What is known of a model: its outline, from itself, a checkpoint or an adapter's file."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..activation import acts
from ..chains import type_before
from ..errors import FileError, TargetError, shortened
from ..layers import CONV1D, CONVOLUTIONS, TABLE, UNLISTED, Layer, layer_of
from ..rows import split_rows
from ..walk import WRAPPERS, Walk
from ..weight import Weight, join
from .tensors import OpenFile, Tensors, open_file, read_json

Facts = Mapping[str, Any]

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


class Unknown(nn.Module):
    """Stands for a module of which nothing is known."""


def kind_name(layer: Layer) -> str:
    """Return what a row's kind is called in a file."""
    kind = layer.kind
    return kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"


TYPES: dict[str, Any] = {kind_name(row): row.kind for row in TABLE}
for _home, _, _name in (name.rpartition(".") for name, kind in TYPES.items() if name == kind):
    TYPES[f"{_home}.{_name}"] = type(_name, (nn.Module,), {"__module__": _home})  # not imported
"""The types of rows by what they are called in a file."""


def facts_of(module: nn.Module) -> Facts:
    """Say what `FACTS` names of a module, for JSON; of one that is guessed, nothing."""
    if (facts := module.__dict__.get("_facts")) is not None:
        return facts  # type: ignore[no-any-return]
    layer = layer_of(type(module))
    facts = {"type": kind_name(layer)}
    if isinstance(module, CONVOLUTIONS):
        facts |= {name: getattr(module, name) for name in ("groups", "dilation", "padding_mode")}
    if layer is UNLISTED:
        facts["is_transposed"] = bool(getattr(module, "is_transposed", False))
    return facts


def class_name(module: nn.Module) -> str:
    """Return what a module's class is called."""
    return type_before(module).__name__


def is_plain(weight: Weight) -> bool:
    """Say whether a weight is of a layer that every library adapts."""
    return weight.layer.kind in LINEARS + CONVOLUTIONS


def drops(weight: Weight) -> bool:
    """Say whether dropout can act on a weight's layer's input."""
    able = weight.layer.drops and weight.layer.run is not None
    return able and ("_facts" in weight.module.__dict__ or acts(weight.module, weight.tensor))


class Outline:
    """What is known of a model's modules and weights, by path and name in model order.

    Where there is no model, modules without a forward and children stand in for its own, on the
    meta device where only shapes are known. Of an `unknown` model every name may be one of its own:
    nothing is known but what a file says. `live` is whether it is a model's, and no file's.
    """

    def __init__(self, walk: Walk, *, live: bool = False, unknown: bool = False) -> None:
        self.walk, self.live, self.unknown = walk, live, unknown
        self.modules = dict(walk.modules)
        known = (w for w in walk.weights + walk.moving if live or w.original is not None)
        self.weights = {weight.name: weight for weight in known}
        # Buffers too, if with values.
        self.tensors = {w.name: each for w, each in walk.tensors if live or not each.is_meta}

    @cached_property
    def shared(self) -> set[str]:
        """Paths of modules that the model has in several places."""
        slots = Counter(id(child) for each in self.walk.owners for child in each._modules.values())
        return {path for path, module in self.modules.items() if slots[id(module)] > 1}

    def weight(self, name: str) -> Weight | None:
        """Return a weight or a block of its rows; `None` if there is none."""
        whole, said = (name, None) if name in self.weights else split_rows(name)
        weight = self.weights.get(whole)
        if weight is None and self.unknown:
            path, _, tensor = name.rpartition(".")
            return Weight(path, Unknown(), tensor)
        if weight is None or said is None:
            return weight
        try:
            return weight.block(said) if weight.shape else None
        except TargetError:
            return None

    def layer_weight(self, *paths: str) -> Weight | None:
        """Return the `weight` of the first module that there may be."""
        found = (self.weight(join(path, "weight")) for path in paths)
        return next(filter(None, found), None)


UNKNOWN = Outline(Walk(nn.Module()), unknown=True)
"""The outline of a model of which there is nothing but the adapter's file."""


def outline_of_tensors(
    tensors: Tensors | Mapping[str, Sequence[int]], facts: Mapping[str, Facts]
) -> Outline:
    """Make the outline of the model whose tensors, or whose tensors' shapes, these are.

    Modules are what `facts` says of them, by their paths; the others are guessed.
    """
    own: dict[str, dict[str, Tensor]] = {"": {}}
    for name, said in tensors.items():
        path, _, tensor = name.rpartition(".")
        for parent in accumulate(path.split("."), "{}.{}".format):
            own.setdefault(parent, {})
        value = said if isinstance(said, Tensor) else torch.empty(said, device="meta")
        own[path][tensor] = value
    model, *inner = (_stand_in(path, inside, facts) for path, inside in own.items())
    model._modules.update(zip([*own][1:], inner, strict=True))
    return Outline(Walk(model))


def _stand_in(path: str, own: Tensors, facts: Mapping[str, Facts]) -> nn.Module:
    """Make a module of what is said of one, or of what its tensors' shapes look like."""
    given = facts.get(path, {})
    said = {name: given[name] for name in given if isinstance(given[name], FACTS.get(name, ()))}
    weight, bias = (own[name].shape if name in own else () for name in ("weight", "bias"))
    linear = kind_name(TABLE[0])  # attention's
    if "type" in said:
        cls = TYPES.get(said["type"], nn.Module)
    elif "in_proj_weight" in own:  # another's attention has a plain layer behind it
        behind = facts.get(join(path, "out_proj"), {}).get("type", linear)
        cls = nn.MultiheadAttention if behind == linear else nn.Module
    elif "running_mean" in own:
        cls = nn.BatchNorm1d
    elif len(weight) == 2 and bias == weight[1:] != weight[:1]:
        cls = TYPES[CONV1D]
    else:
        cls = GUESSES.get(len(weight), nn.Module)
    module: nn.Module = cls.__new__(cls)
    nn.Module.__init__(module)
    moving = layer_of(cls).moving
    for name, tensor in own.items():
        if name in moving:
            module._buffers[name] = tensor
        else:
            module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    module.__dict__.update({**said, "_facts": said})
    return module


INDEX = ".index.json"
FILES = (f"*{INDEX}", "*.safetensors", "*.bin", "*.pt")
"""What a folder's checkpoint can be called, the first kind of which there is one."""


@dataclass(frozen=True)
class Base:
    """An open checkpoint: in which file each tensor is, and the model's name for it, by its key."""

    path: Path
    files: Mapping[str, OpenFile]
    names: Mapping[str, str]

    def __post_init__(self) -> None:
        """Raise where two keys have the same name."""
        if twice := [name for name, count in Counter(self.names.values()).items() if count > 1]:
            rule = f"more than one tensor is {shortened(twice)}; keep one of them"
            raise FileError(f"{self.path}: {rule}")

    def with_prefix(self, prefix: str) -> "Base":
        """Return it with a prefix taken from its names, or given to them."""
        return replace(self, names=_with_prefix(self.names, prefix))

    def prefix_for(self, adapted: Set[str]) -> str:
        """Return the prefix with which, or without, most adapted weights have one of its names."""
        names, first = self.names.values(), next(iter(adapted), "")
        choices = {first.removesuffix(name) for name in names if first.endswith(f".{name}")}
        choices |= {n.removesuffix(first) for n in names if first and n.endswith(f".{first}")}

        def count(prefix: str) -> int:
            return len(adapted & {*_with_prefix(self.names, prefix).values()})

        return max(["", *sorted(choices)], key=count)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by the model's names, read when they are used."""
        return {name: self.files[key].tensors[key] for key, name in self.names.items()}

    @property
    def metadata(self) -> Mapping[str, str]:
        """The strings of its first file, of a pickle those that transformers asks for."""
        first = next(iter(self.files.values()), None)
        return first.metadata if first and not first.fault else {"format": "pt"}


@contextmanager
def open_checkpoint(path: Path) -> Iterator[Base]:
    """Open a checkpoint for a block: a file, an index of shards, or a folder with one of these."""
    with ExitStack() as stack:
        files: dict[str, OpenFile] = {}
        for shard in _shards(path):
            opened = stack.enter_context(open_file(shard))
            names = opened.tensors if opened.fault else opened.entries
            files |= dict.fromkeys(names, opened)
        yield Base(path, files, {key: plain_name(key) for key in files})


def plain_name(key: str) -> str:
    """Return the plain model's name of a key of a state dict."""
    plain = join(*(part for part in key.split(".") if part not in WRAPPERS))
    return re.sub(r"parametrizations\.([^.]+)\.original$", r"\1", plain)


def _shards(path: Path) -> list[Path]:
    """List the files of a checkpoint."""
    if path.is_dir():
        found = next(filter(None, (sorted(path.glob(pattern)) for pattern in FILES)), [])
        if len(found) != 1:
            listed = ", ".join(each.name for each in found) or ", ".join(FILES)
            count = "several" if found else "none"
            raise FileError(f"{path}: has {count} of {listed}; name a file")
        path = found[0]
    if not path.name.endswith(INDEX):
        return [path]
    names = read_json(path).get("weight_map")
    if not isinstance(names, dict) or {*map(type, names.values())} != {str}:
        raise FileError(f"{path}: no index of shards")
    if strange := [name for name in names.values() if Path(name).name != name]:
        raise FileError(f"{path}: {strange[0]!r:.80} is no file beside it")
    return [path.with_name(name) for name in dict.fromkeys(names.values())]


def _with_prefix(names: Mapping[str, str], prefix: str) -> dict[str, str]:
    """Take a prefix from the names that have it, or where none has it give it to all."""
    if any(name.startswith(prefix) for name in names.values()):
        return {key: name.removeprefix(prefix) for key, name in names.items()}
    return {key: prefix + name for key, name in names.items()}
