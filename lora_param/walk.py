"""The walk over a model: one finds all that a verb needs to know of it."""

from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from .chains import chains_of, record_of
from .deltas.protocol import Delta
from .errors import LoRAError
from .layers import layer_of, listed_tensors
from .undo import in_order
from .weight import Weight, join, tensor_names

WRAPPERS = ("", "_orig_mod", "_checkpoint_wrapped_module")
"""What stands in a path for a wrapper around a module: of `torch.compile`, for checkpointing."""


class Walk:
    """One walk over a model: what every verb takes and passes on.

    `places` are paths and modules of the base, a shared one at each of its places; `owners` is
    every module, others' parametrizations too, with the path that it has without deltas.
    """

    def __init__(self, model: nn.Module) -> None:
        self.places: list[tuple[str, nn.Module]] = []
        self.owners: dict[nn.Module, str] = {}
        self._visit("", model, [])

    def _visit(self, path: str, module: nn.Module, above: list[nn.Module]) -> None:
        if isinstance(module, Delta) or module in above:
            return
        new = module not in self.owners
        self.places.append((path, module))
        self.owners.setdefault(module, path)
        chains = chains_of(module)
        for tensor in chains:
            if not isinstance(getattr(type(module), tensor, None), property):
                found = f"{type(module).__name__} that has taken another module's place"
                rule = f"{path or 'model'}: the adapters are in a {found}, where none acts"
                raise LoRAError(f"{rule}; replace modules before register_lora")
        for name, child in module._modules.items():
            inner = path if name in WRAPPERS else join(path, name)
            if chains and name == "parametrizations":
                for tensor, chain in chains.items() if new else ():
                    self._visit_chain(join(inner, tensor), chain)
            elif child is not None:
                self._visit(inner, child, [*above, module])

    def _visit_chain(self, path: str, chain: nn.Module) -> None:
        self.owners[chain] = path
        others = [entry for entry in chain.children() if not isinstance(entry, Delta)]
        for index, entry in enumerate(others):  # its number in the chain without deltas
            for inside, module in entry.named_modules(prefix=f"{path}.{index}"):
                self.owners.setdefault(module, inside)

    @cached_property
    def modules(self) -> list[tuple[str, nn.Module]]:
        """Paths and modules of the base, each once."""
        first = {module: path for path, module in reversed(self.places)}
        return [(first.pop(module), module) for _, module in self.places if module in first]

    @cached_property
    def weights(self) -> list[Weight]:
        """Every parameter of the base, and every tensor that its row expects, there or not."""
        weights = []
        for path, module in self.modules:
            present = tensor_names(module)
            names = dict.fromkeys([*listed_tensors(layer_of(type(module)), present), *present])
            weights += [Weight(path, module, name) for name in names if "." not in name]
        return weights

    @cached_property
    def moving(self) -> list[Weight]:
        """Every buffer that a layer's forward moves in training."""
        moving = {cls: layer_of(cls).moving for cls in {type(module) for module in self.owners}}
        weights = [Weight(path, m, name) for path, m in self.modules for name in moving[type(m)]]
        return [w for w in weights if w.is_buffer and w.original is not None]

    @cached_property
    def deltas(self) -> list[tuple[Weight, Delta]]:
        """Every delta with its weight, in model order and chain order."""
        pairs = []
        for path, module in self.modules:
            if "parametrizations" in module._modules:
                for name in in_order(chains_of(module), record_of(module).order):
                    weight = Weight(path, module, name)
                    pairs += [(replace(weight, rows=each.rows), each) for each in weight.deltas]
        return pairs

    @cached_property
    def tensors(self) -> list[tuple[Weight, Tensor]]:
        """What the base's state dict has, parameters and buffers."""
        tensors = []
        for module, path in self.owners.items():
            buffers = tensor_names(module, True) if module._buffers or module._modules else ()
            for name in dict.fromkeys([*tensor_names(module), *buffers]):
                # A chain's one original goes by its owner's name.
                twice = name == "original" and isinstance(module, ParametrizationList)
                if twice or name in module._non_persistent_buffers_set:
                    continue
                weight = Weight(path, module, name)
                if (tensor := weight.original) is not None:
                    tensors.append((weight, tensor))
        return tensors

    @cached_property
    def parameters(self) -> list[tuple[Weight, nn.Parameter]]:
        """The parameters among them."""
        return [pair for pair in self.tensors if isinstance(pair[1], nn.Parameter)]  # type: ignore[misc]

    @cached_property
    def shared(self) -> dict[str, list[Weight]]:
        """Parameters and moving buffers that have memory in common with others, with these."""
        moving: Any = [(weight, weight.original) for weight in self.moving]
        tensors = enumerate([*self.parameters, *moving])
        spans = [(*_span(tensor), index, weight) for index, (weight, tensor) in tensors]
        spans.sort()
        shared: dict[str, list[Weight]] = {}
        for place, (_, end, _, weight) in enumerate(spans):
            for later in range(place + 1, len(spans)):
                if spans[later][0] >= end:
                    break
                other = spans[later][-1]
                shared.setdefault(weight.name, []).append(other)
                shared.setdefault(other.name, []).append(weight)
        return shared

    def partners(self, weight: Weight) -> list[Weight]:
        """List the others that are the same tensor, or a part of its memory."""
        return self.shared.get(weight.whole.name, [])


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return where a tensor's bytes begin and end; of one without bytes, what is its alone."""
    start = 0
    if type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided:
        start = tensor.data_ptr()
    if not start:
        return id(tensor), id(tensor) + 1
    length = tensor.numel()
    if not tensor.is_contiguous():
        length = 1 + sum((n - 1) * k for n, k in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + length * tensor.element_size()
