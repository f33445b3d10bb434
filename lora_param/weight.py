"""The noun: one tensor of one module, and the walk over a model that finds them all."""

from __future__ import annotations

import itertools
import sys
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .chains import Record, chains_of, originals_of, record_of, run_through, type_before
from .deltas.protocol import Delta, Shape
from .deltas.switching import Chain
from .errors import TargetError
from .install import METHODS, parametrized_class, properties_of
from .layers import Layer, layer_of
from .quantised import dense, in_reach, is_packed, logical
from .routing import left_out
from .rows import Rows, Said
from .sharding import is_sharded, lay_out
from .undo import in_order, keep_entries


@dataclass(frozen=True)
class Weight:
    """One tensor of one module of a model, or a block of its `rows`.

    `path` is the module's in the plain model, of which the model's own is empty.
    """

    path: str
    module: nn.Module
    tensor: str
    rows: Rows | None = None

    @cached_property
    def name(self) -> str:
        """The full name, as `model.named_parameters()` gives it for the plain model."""
        name = join(self.path, self.tensor)
        return name if self.rows is None else f"{name}[{self.rows}]"

    @property
    def whole(self) -> Weight:
        """The tensor of which it is a block."""
        return self if self.rows is None else replace(self, rows=None)

    def block(self, said: Said) -> Weight:
        """Return the block of some rows of the tensor, or raise a `TargetError`."""
        try:
            return replace(self, rows=Rows.of(said, self.like.shape[self.dim]))
        except TargetError as error:
            raise TargetError(f"{self.name}: {error}") from None

    def overlaps(self, rows: Rows | None) -> bool:
        """Say whether it has one of these rows of the tensor, of which `None` means all."""
        return self.rows is None or rows is None or self.rows.overlaps(rows)

    @property
    def dim(self) -> int:
        """Which dimension of the tensor counts output features, in which `rows` are numbered."""
        is_transposed = getattr(self.module, "is_transposed", False)
        return self.layer.features_of(tuple(self.whole.like.shape), is_transposed)

    @cached_property
    def layer(self) -> Layer:
        """Its module's row of the table."""
        return layer_of(type(self.module))

    @property
    def chain(self) -> list[nn.Module]:
        """The parametrizations of the tensor, in the order in which they apply."""
        chain = chains_of(self.module).get(self.tensor)
        return list(chain._modules.values()) if chain is not None else []

    @property
    def deltas(self) -> list[Delta]:
        """The deltas among them, of a block those on the block."""
        deltas = [entry for entry in self.chain if isinstance(entry, Delta)]
        return [delta for delta in deltas if self.rows in (None, delta.rows)]

    @property
    def original(self) -> Tensor | None:
        """The tensor beneath any parametrization; `None` if it isn't one tensor."""
        module, name = self.module, self.tensor
        tensor: Tensor | None = module._parameters.get(name, module._buffers.get(name))
        if tensor is None:
            tensor = getattr(chains_of(module).get(name), "original", None)
        if tensor is not None and not tensor.is_floating_point():
            in_reach(tensor, module)
        return tensor if tensor is None or self.rows is None else self._rows_of(tensor)

    @property
    def is_buffer(self) -> bool:
        """Whether it is a buffer of its module and no parameter."""
        chain = chains_of(self.module).get(self.tensor)
        return "original" in chain._buffers if chain else self.tensor in self.module._buffers

    @property
    def originals(self) -> list[Tensor]:
        """The tensors at the start of its chain, several for some of others' parametrizations."""
        return originals_of(chains_of(self.module)[self.tensor])

    @property
    def value(self) -> Tensor:
        """What reading it gives, without a graph and without advancing anyone's state."""
        return self._read(chain) if (chain := self.chain) else cast("Tensor", self.original)

    def _read(self, chain: list[nn.Module]) -> Tensor:
        with without_side_effects(chain):
            value = run_through(chain, self.originals)
        return self._rows_of(value)

    def _rows_of(self, tensor: Tensor) -> Tensor:
        return tensor if self.rows is None else self.rows.take(dense(tensor), self.dim)

    @property
    def like(self) -> Tensor:
        """What reading it gives without deltas, of their shape, dtype and device."""
        plain = self.tensor in self.module._parameters
        others = [] if plain else [each for each in self.chain if not isinstance(each, Delta)]
        tensor: Any = self._read(others) if others else self.original
        return tensor if tensor is None or tensor.is_floating_point() else logical(tensor)

    @property
    def shape(self) -> Shape | None:
        """Its shape; `None` if it isn't there or has none yet."""
        like = None if not self.chain and is_lazy(self.original) else self.like  # type: ignore[arg-type]
        return None if like is None else tuple(like.shape)

    @property
    def view(self) -> Shape:
        """The shape of its matrix view, `(*batch, fan_out, fan_in)`; of a vector its own."""
        shape = tuple(self.like.shape)
        return self.layer.view(shape) if len(shape) > 1 else shape

    def attach(self, delta: Delta, undo: ExitStack) -> None:
        """Append a delta to the tensor's chain; the original stays the same object."""
        self._keep(undo)
        module, name, base = self.module, self.tensor, type_before(self.module)
        delta.__dict__.update(rows=self.rows, dim=self.dim if self.rows else 0)
        if "_lora" not in module.__dict__:
            order = (*module._parameters, *module._buffers)
            module.__dict__["_lora"] = Record(type(module), order)
        if "parametrizations" not in module._modules:
            module._modules["parametrizations"] = nn.ModuleDict()
        # Past ModuleDict's own check, which refuses a parameter called "keys" or "values".
        chains: Any = module._modules["parametrizations"]._modules  # type: ignore[union-attr]
        if name not in chains:
            chains[name] = Chain(self.whole.original, module.training)
        if is_sharded(original := chains[name]._parameters.get("original")):
            lay_out(delta, original, delta.along)
        chains[name]._modules[str(len(chains[name]._modules))] = delta
        if isinstance(chains[name], Chain):
            chains[name].note()
        left_out(module, chains[name], delta)
        if delta.training != module.training:
            delta.train(module.training)
        module._parameters.pop(name, None)
        module._buffers.pop(name, None)
        object.__setattr__(module, "__class__", parametrized_class(base, tuple(chains)))

    def detach(self, deltas: Collection[nn.Module], undo: ExitStack) -> None:
        """Take deltas off the chain; without its last delta the module is as it was found."""
        chain = chains_of(self.module)[self.tensor]
        if remaining := [entry for entry in self.chain if entry not in deltas]:
            self._keep(undo)
            chain._modules = {str(index): entry for index, entry in enumerate(remaining)}
            _settle(self.module, type_before(self.module))
        else:
            self.make_plain(chain.original, undo)

    def make_plain(self, tensor: Tensor, undo: ExitStack) -> None:
        """Put a tensor into its module's tables in the place of the chain."""
        self._keep(undo)
        module, base, order = self.module, type_before(self.module), record_of(self.module).order
        if self.layer.dense and self.tensor == "weight" and not is_packed(tensor):
            base = self.layer.dense
        table: Any = module._parameters if isinstance(tensor, nn.Parameter) else module._buffers
        del chains_of(module)[self.tensor]
        _settle(module, base)
        table[self.tensor] = tensor
        if isinstance(module, nn.RNNBase) and "_flat_weights" in module.__dict__:
            module._init_flat_weights()  # its own list of its weights
        for name in in_order(table, order):
            table[name] = table.pop(name)

    def _keep(self, undo: ExitStack) -> None:
        """Push what brings the tensor's place in its module back: tables, record and class."""
        module, holder = self.module, self.module._modules.get("parametrizations")
        places: list[tuple[Any, list[str]]] = [
            (module.__dict__, ["_lora", "_flat_weights", "_flat_weight_refs"]),
            (module._parameters, [self.tensor]),
            (module._buffers, [self.tensor]),
            (module._modules, ["parametrizations"]),
        ]
        if holder is not None:
            places.append((holder._modules, [self.tensor]))
        if (chain := chains_of(module).get(self.tensor)) is not None:
            undo.callback(setattr, chain, "_modules", dict(chain._modules))
        undo.callback(object.__setattr__, module, "__class__", type(module))
        keep_entries(undo, *places)


def _shown_plain(base: Any) -> Any:
    def named_modules(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        compiling = torch.compiler.is_compiling()
        if not compiling and sys._getframe(1).f_code.co_name == "distribute_module":
            return _laid_out_anew(self)  # because torch's layouts are of plain layers
        return base.named_modules(self, *args, **kwargs)

    return named_modules


def _laid_out_anew(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield a module without its deltas, which then get the layout that their weights have got."""
    weights = [Weight("", module, name) for name in chains_of(module)]
    pairs = [(weight, delta) for weight in weights for delta in weight.deltas]
    with ExitStack() as undo:
        for weight in weights:
            weight.detach(set(weight.deltas), undo)
        undo.pop_all()
        try:
            yield "", module
        finally:
            for weight, delta in pairs:
                replace(weight, rows=delta.rows).attach(delta, undo)
            undo.pop_all()


METHODS["named_modules"] = _shown_plain


def _settle(module: nn.Module, base: type[nn.Module]) -> None:
    """Give a module the class that suits the chains it has left."""
    chains, before = chains_of(module), record_of(module).type
    adapted = any(isinstance(entry, Delta) for chain in chains.values() for entry in chain)
    cls = parametrized_class(base, tuple(chains)) if chains else base
    if chains and not adapted and before and properties_of(before) == set(chains):
        cls = before
    if not adapted:
        module.__dict__.pop("_lora", None)
    if not chains:
        module._modules.pop("parametrizations", None)
    object.__setattr__(module, "__class__", cls)


@contextmanager
def without_side_effects(chain: list[nn.Module]) -> Iterator[None]:
    """Evaluate a chain without a graph, without autocast, and without advancing its state."""
    devices = {tensor.device.type for entry in chain for tensor in entry.parameters()} - {"meta"}
    with ExitStack() as contexts:
        contexts.enter_context(torch.no_grad())
        for device in devices:
            contexts.enter_context(torch.autocast(device, enabled=False))
        for module in {inside: None for entry in chain for inside in entry.modules()}:
            contexts.callback(module.__dict__.__setitem__, "training", module.training)
            module.training = False  # in training, spectral_norm advances its power iteration
        yield


merged_for_now: WeakSet[nn.Module] = WeakSet()
"""Modules whose chains `lora_merged` has put away."""


def overlapping(weights: Iterable[Weight]) -> Iterator[tuple[Weight, Weight]]:
    """Yield pairs of blocks of one tensor that have rows in common."""
    blocks: defaultdict[Weight, list[Weight]] = defaultdict(list)
    for weight in weights:
        blocks[weight.whole].append(weight)
    pairs = (pair for own in blocks.values() for pair in itertools.combinations(own, 2))
    return ((one, other) for one, other in pairs if one.overlaps(other.rows))


def join(*names: str) -> str:
    """Join the parts of a name, of which the model's own is empty."""
    return ".".join(filter(None, names))


def tensor_names(module: nn.Module, buffers: bool = False) -> list[str]:
    """List the names of a module's own parameters or buffers, in the order before any delta."""
    present = []
    for name, value in (module._buffers if buffers else module._parameters).items():
        if value is not None:
            present.append(name)
    if "parametrizations" in module._modules and (chains := chains_of(module)):
        for name, chain in chains.items():
            if ("original" in chain._buffers) == buffers:
                present.append(name)
        return list(in_order(dict.fromkeys(present), record_of(module).order))
    return present
