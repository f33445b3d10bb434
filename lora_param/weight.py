"""The noun: one tensor of one module, and the walk over a model that finds them all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from .chains import Record, chains_of, originals_of, record_of, run_through, type_before
from .deltas.protocol import Delta, Shape
from .errors import LoRAError
from .install import parametrized_class, properties_of
from .layers import UNLISTED, Layer, layer_of, listed_tensors
from .undo import GONE, change, in_order, reorder, rewrite, set_class


@dataclass(frozen=True)
class Weight:
    """One tensor of one module of a model, or a block of its rows.

    Attributes:
        path: The module's path in the plain model; the model's own is empty.
        module: The module.
        tensor: What the module calls it.
        rows: The block of its first dimension; `None` for the whole tensor.
    """

    path: str
    module: nn.Module
    tensor: str
    rows: slice | None = None

    @cached_property
    def name(self) -> str:
        """The full name, as `model.named_parameters()` gives it for the plain model."""
        name = f"{self.path}.{self.tensor}" if self.path else self.tensor
        return name if self.rows is None else f"{name}[{self.rows.start}:{self.rows.stop}]"

    @property
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
        found = [entry for entry in self.chain if isinstance(entry, Delta)]
        return [each for each in found if self.rows in (None, each.rows)]

    @property
    def original(self) -> Tensor | None:
        """The tensor beneath any parametrization; `None` if it isn't one tensor."""
        if (chain := chains_of(self.module).get(self.tensor)) is None:
            found = self.module._parameters.get(self.tensor, self.module._buffers.get(self.tensor))
        else:
            found = getattr(chain, "original", None)
        return found if found is None or self.rows is None else found[self.rows]

    @property
    def originals(self) -> list[Tensor]:
        """The tensors at the start of its chain, several for some of others' parametrizations."""
        return originals_of(chains_of(self.module)[self.tensor])

    @property
    def value(self) -> Tensor:
        """What reading it gives, without a graph and without advancing anyone's state."""
        if not (chain := self.chain):
            return cast("Tensor", self.original)
        with without_side_effects(chain):
            value = run_through(chain, self.originals)
        return value if self.rows is None else value[self.rows]

    @property
    def like(self) -> Tensor:
        """A tensor of its shape, dtype and device; free where deltas are alone."""
        if all(isinstance(entry, Delta) for entry in self.chain):
            return cast("Tensor", self.original)
        return self.value

    @property
    def view(self) -> Shape:
        """The shape of its matrix view, `(*batch, fan_out, fan_in)`; of a vector its own."""
        shape = tuple(self.like.shape)
        return self.layer.view(shape) if len(shape) > 1 else shape

    def attach(self, delta: Delta, undo: ExitStack) -> None:
        """Append a delta to the tensor's chain; the original stays the same object."""
        module, name, base = self.module, self.tensor, type_before(self.module)
        delta.rows = self.rows
        if "_lora" not in module.__dict__:
            found = Record(type(module), tuple(module._parameters))
            change(undo, module.__dict__, "_lora", found)
        if (chain := chains_of(module).get(name)) is not None:
            change(undo, chain._modules, str(len(chain)), delta.train(module.training))
        else:
            if "parametrizations" not in module._modules:
                change(undo, module._modules, "parametrizations", nn.ModuleDict())
            # Past ModuleDict's own check, which refuses a parameter called "keys" or "values".
            chains = cast("nn.ModuleDict", module._modules["parametrizations"])._modules
            original = module._parameters[name]
            change(undo, chains, name, _new_chain(delta, original).train(module.training))
            change(undo, module._parameters, name)
        set_class(undo, module, parametrized_class(base, tuple(chains_of(module))))

    def detach(self, delta: Delta, undo: ExitStack) -> None:
        """Take a delta off the chain; without its last delta the module is as it was found."""
        chain = chains_of(self.module)[self.tensor]
        remaining = [entry for entry in chain if entry is not delta]
        if remaining:
            entries = {str(index): entry for index, entry in enumerate(remaining)}
            rewrite(undo, chain._modules, entries)
            _restore_class(self.module, type_before(self.module), undo)
        else:
            is_parameter = isinstance(chain.original, nn.Parameter)
            table = self.module._parameters if is_parameter else self.module._buffers
            self.make_plain(chain.original, table, undo)

    def make_plain(self, tensor: Tensor, table: dict[str, Any], undo: ExitStack) -> None:
        """Put a tensor into its module's table in the place of the chain."""
        module, base, order = self.module, type_before(self.module), record_of(self.module).order
        change(undo, cast("dict[str, Any]", chains_of(module)), self.tensor)
        _restore_class(module, base, undo)
        change(undo, table, self.tensor, tensor)
        if isinstance(module, nn.RNNBase):
            for own in ("_flat_weights", "_flat_weight_refs"):
                change(undo, module.__dict__, own, module.__dict__.get(own, GONE))
            module._init_flat_weights()  # its own list of its weights
        reorder(undo, module._parameters, order)


def _new_chain(delta: Delta, original: nn.Parameter | None) -> ParametrizationList:
    # Built around a stand-in: torch's constructor calls set_() on the tensor that it is given,
    # which would invalidate any graph that has saved the original.
    stand_in = nn.Parameter(torch.empty(0), requires_grad=False)
    chain = ParametrizationList([delta], stand_in, unsafe=True)
    chain._parameters["original"] = original
    return chain


def _restore_class(module: nn.Module, base: type[nn.Module], undo: ExitStack) -> None:
    """Give a module the class that suits the chains it has left."""
    chains, before = chains_of(module), record_of(module).type
    adapted = any(isinstance(entry, Delta) for each in chains.values() for entry in each)
    if not adapted:
        change(undo, module.__dict__, "_lora")
    if not chains:
        change(undo, module._modules, "parametrizations")
        set_class(undo, module, base)
    elif not adapted and before and properties_of(before) == set(chains):
        set_class(undo, module, before)
    else:
        set_class(undo, module, parametrized_class(base, tuple(chains)))


@contextmanager
def without_side_effects(chain: list[nn.Module]) -> Iterator[None]:
    """Evaluate a chain without a graph, without autocast, and without advancing its state."""
    modules = [(each, each.training) for entry in chain for each in entry.modules()]
    devices = {tensor.device.type for entry in chain for tensor in entry.parameters()} - {"meta"}
    with ExitStack() as contexts:
        contexts.enter_context(torch.no_grad())
        for device in devices:
            contexts.enter_context(torch.autocast(device, enabled=False))
        try:
            for each, _ in modules:
                each.training = False  # in training, spectral_norm advances its power iteration
            yield
        finally:
            for each, training in modules:
                each.training = training


WRAPPERS = ("", "_orig_mod")
"""What stands in a path for a wrapper around a module: `torch.compile`'s."""


def without_wrappers(path: str) -> str:
    """Drop from a path what wraps a module without being a part of the plain model."""
    return ".".join(name for name in path.split(".") if name not in WRAPPERS)


merged_for_now: WeakSet[nn.Module] = WeakSet()
"""Modules whose chains `lora_merged` has put away."""


class Walk:
    """One walk over a model: what every verb takes and passes on.

    Attributes:
        model: The model.
        places: Paths and modules of the base, a shared one at each of its places.
        owners: Every module once, with the path that it has without deltas: those of the base, and
            the parametrizations of others.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.places: list[tuple[str, nn.Module]] = []
        self.owners: list[tuple[str, nn.Module]] = []
        self._seen: set[int] = set()
        self._visit("", model, [])

    def _visit(self, path: str, module: nn.Module, above: list[nn.Module]) -> None:
        if isinstance(module, Delta) or module in above:
            return
        new = id(module) not in self._seen
        self._seen.add(id(module))
        self.places.append((path, module))
        if new:
            self.owners.append((path, module))
        chains = chains_of(module)
        for name, child in module._modules.items():
            if chains and name == "parametrizations":
                for tensor, chain in chains.items() if new else ():
                    self._visit_chain(join(path, name, tensor), chain)
            elif child is not None:
                inner = path if name in WRAPPERS else join(path, name)
                self._visit(inner, child, [*above, module])

    def _visit_chain(self, path: str, chain: nn.Module) -> None:
        self.owners.append((path, chain))
        others = [entry for entry in chain._modules.values() if not isinstance(entry, Delta)]
        for index, entry in enumerate(others):  # its number in the chain without deltas
            for inside, module in cast("nn.Module", entry).named_modules(prefix=f"{path}.{index}"):
                if id(module) not in self._seen:
                    self._seen.add(id(module))
                    self.owners.append((inside, module))

    @cached_property
    def modules(self) -> list[tuple[str, nn.Module]]:
        """Paths and modules of the base, each once."""
        first: dict[nn.Module, str] = {}
        for path, module in self.places:
            first.setdefault(module, path)
        return [(path, module) for module, path in first.items()]

    @cached_property
    def weights(self) -> list[Weight]:
        """Every parameter of the base, and every tensor that its row expects, there or not."""
        return [
            Weight(path, module, tensor)
            for path, module in self.modules
            for tensor in self._catalogued(module)
        ]

    @staticmethod
    def _catalogued(module: nn.Module) -> list[str]:
        present, layer = tensor_names(module), layer_of(type(module))
        if layer is UNLISTED:
            return [name for name in present if "." not in name]
        names = dict.fromkeys([*listed_tensors(layer, present), *present])
        return [name for name in names if "." not in name]

    @cached_property
    def deltas(self) -> list[tuple[Weight, Delta]]:
        """Every delta with its weight, in model order and chain order."""
        return [
            (Weight(weight.path, weight.module, weight.tensor, delta.rows), delta)
            for weight in self.weights
            for delta in (weight.deltas if chains_of(weight.module) else ())
        ]

    def tensors(self, *, buffers: bool = False) -> Iterator[Weight]:
        """Yield the base's parameters, and its buffers, those of others' parametrizations too."""
        for path, module in self.owners:
            names = tensor_names(module) + ([*module._buffers] if buffers else [])
            for name in names:
                weight = Weight(path, module, name)
                if isinstance(module, ParametrizationList) and name == "original":
                    continue  # which goes by its owner's name
                if buffers or isinstance(weight.original, nn.Parameter):
                    if weight.original is not None:
                        yield weight


def join(*names: str) -> str:
    """Join the parts of a name, of which the model's own is empty."""
    return ".".join(filter(None, names))


def walk(model: object, call: str) -> Walk:
    """Walk a model once.

    Raises:
        LoRAError: It is no module.
    """
    if not isinstance(model, nn.Module):
        raise LoRAError(f"{call} takes a torch.nn.Module, got {type(model).__name__}; pass a model")
    return Walk(model)


def tensor_names(module: nn.Module) -> list[str]:
    """List the names of a module's own parameters, in the order they had before any delta."""
    present = [name for name, value in module._parameters.items() if value is not None]
    if not (chains := chains_of(module)):
        return present
    return list(in_order(dict.fromkeys([*present, *chains]), record_of(module).order))
