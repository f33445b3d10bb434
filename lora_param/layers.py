"""The layer table: which tensors of a layer multiply activations, as which matrices, and how."""

from __future__ import annotations

import fnmatch
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from .errors import LoRAError
from .ops import ConvolutionRun, EmbeddingRun, LinearRun, OwnRun

Shape = tuple[int, ...]
"""`(*batch, fan_out, fan_in)` of a weight's matrix view."""


def rows_by_rest(shape: Shape) -> Shape:
    """View a weight as one matrix: its first dimension by all the others."""
    return shape[0], math.prod(shape[1:])


def stack(shape: Shape) -> Shape:
    """View a weight as a stack of matrices over its last two dimensions."""
    return shape


def _embedding_rule(module: nn.Module) -> str | None:
    if getattr(module, "max_norm", None) is not None:
        return "max_norm renormalises the original at every forward; build it without max_norm"
    if getattr(module, "sparse", False):
        return "sparse gradients can't pass through W + B @ A; build it with sparse=False"
    return None


def _graph_rule(module: nn.Module) -> str | None:
    return "a traced graph can't be parametrized; adapt the model before tracing it"


def _is_ungrouped(module: Any) -> bool:
    return module.groups == 1 and "_conv_forward" not in module.__dict__


def _is_plain_lookup(module: Any) -> bool:
    return not (module.scale_grad_by_freq or _embedding_rule(module))


def _without_slices(base: Any) -> Callable[..., Any]:
    def entry(self: nn.ParameterList, index: Any) -> Any:
        if isinstance(index, slice):
            reason = "a slice of an adapted ParameterList would hold copies without adapters"
            raise LoRAError(f"{reason}; read its entries one by one")
        return base.__getitem__(self, index)

    return entry


TAKING = ("__delitem__", "clear", "pop", "popitem")


def _without_loss(base: Any) -> Callable[..., Any]:
    def take(self: nn.ParameterDict, *args: Any) -> Any:
        reason = "a ParameterDict whose entry has an adapter; call remove_lora first"
        raise LoRAError(f"nothing can be taken from {reason}")

    return take


def _without_copy(base: Any) -> Callable[..., Any]:
    def copy(self: nn.ParameterDict) -> nn.ParameterDict:
        fix = "use copy.deepcopy"
        raise LoRAError(f"a copy of an adapted ParameterDict would lose its adapters; {fix}")

    return copy if base.copy is nn.ParameterDict.copy else base.copy


def _without(base: Any) -> property:
    return property(lambda self: False)


class _OwnWeights:
    """A recurrent layer's list of its weights: what this thread reads, and no other has written."""

    def __get__(self, module: Any, owner: object) -> list[Any]:
        return [getattr(module, name, None) for name in module._flat_weights_names]

    def __set__(self, module: nn.Module, weights: list[Any]) -> None:
        module.__dict__["_flat_weights"] = weights  # for when the layer is adapted no more


@dataclass(frozen=True)
class Layer:
    """One row of the table."""

    kind: type[nn.Module] | str  # or where importing it would be too much, its `module.qualname`
    tensors: tuple[str, ...] = ("weight",)  # globs over own tensors, or a child's tensor by path
    view: Callable[[Shape], Shape] = rows_by_rest  # from a shape to that of the matrix view
    transposed: bool = False  # stored `(in, out)`, so that `lora_B` meets the input
    features: int = 0
    """The dimension in which rows are numbered: of output features, of a lookup that of tokens."""
    run: Any = None
    """`(module, x, transposed, in_place)` to the layer at work on `x`, in activation space, whose
    result may be changed in place or not; `None` where it stays in weight space."""
    suits: Callable[[Any], bool] | None = None  # whether `run` is right for one module of the type
    drops: bool = True  # whether dropout can act on its input
    default: bool = True  # whether `target=None` adapts it
    refusal: Callable[[nn.Module], str | None] = lambda module: None  # why it can't be adapted
    moving: tuple[str, ...] = ()  # buffers that its forward moves in training
    rows_of: Mapping[Any, int] = field(default_factory=dict)
    """Where a batch's rows are in arguments, by name, and outputs, by place, if not as in the first
    argument; counted from the end, a tensor without that dimension has none."""
    rereads: bool = False  # whether its forward reads one weight several times
    dense: type[nn.Module] | None = None  # what a module becomes whose weight is packed no more
    overrides: dict[str, Any] = field(default_factory=dict)
    """Methods that an adapted module has in place of its own, made from its class."""

    def features_of(self, shape: Shape, is_transposed: bool = False) -> int:
        """Return which dimension of a tensor counts output features; some stacks say theirs."""
        if is_transposed and self.features == -2:
            return len(shape) - 1
        return self.features % len(shape) if len(shape) > 1 else 0


CONV1D = "transformers.pytorch_utils.Conv1D"
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
QKV = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
ATTENTION = ("in_proj_weight", *QKV, "out_proj.weight")
MASKS = {"key_padding_mask": -2, "attn_mask": -3, 1: 0}
HIDDEN, LISTED = {"hx": -2, 1: -2}, {"_flat_weights": lambda base: _OwnWeights()}
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
KEPT = {"support_avx512bf16_for_cpu": _without}  # by which a forward would round its weight anew
LOOKUP = Layer(nn.EmbeddingBag, transposed=True, default=False, refusal=_embedding_rule)
STACKS = Layer(nn.Module, ("*",), stack, features=-2, default=False)

TABLE: tuple[Layer, ...] = (
    Layer(nn.modules.linear.NonDynamicallyQuantizableLinear, run=LinearRun),  # of an attention
    Layer(nn.Linear, run=LinearRun),
    *(Layer(kind, run=ConvolutionRun, suits=_is_ungrouped) for kind in CONVOLUTIONS),
    *(Layer(kind, features=1) for kind in TRANSPOSED_CONVOLUTIONS),
    Layer(nn.Bilinear),
    Layer(nn.MultiheadAttention, ATTENTION, run=LinearRun, rereads=True, rows_of=MASKS),
    Layer(nn.RNNBase, ("weight_*",), rereads=True, rows_of=HIDDEN, overrides=LISTED),
    Layer(nn.RNNCellBase, ("weight_ih", "weight_hh")),
    Layer(CONV1D, transposed=True, features=1, run=LinearRun),
    *(
        Layer(f"bitsandbytes.nn.modules.{kind}", run=OwnRun, dense=nn.Linear, overrides=KEPT)
        for kind in ("Linear8bitLt", "Linear4bit")
    ),
    Layer("torch_geometric.nn.dense.linear.Linear", run=LinearRun),
    replace(LOOKUP, kind=nn.Embedding, run=EmbeddingRun, suits=_is_plain_lookup, drops=False),
    LOOKUP,
    replace(STACKS, kind=_NormBase, moving=STATISTICS),
    replace(STACKS, kind=nn.ParameterList, overrides={"__getitem__": _without_slices}),
    replace(
        STACKS,
        kind=nn.ParameterDict,
        overrides={"copy": _without_copy, **dict.fromkeys(TAKING, _without_loss)},
    ),
    replace(STACKS, kind="torch.fx.graph_module.GraphModule", refusal=_graph_rule),
)

UNLISTED = Layer(nn.Module, tensors=(), view=stack, features=-2, default=False)
"""Any other module: each of its tensors of two or more dimensions, where the caller names it."""


def layer_of(cls: Any) -> Layer:
    """Return the table's row for a type of module; a subclass has its base's row."""
    return _row_and_type(cls)[0]


@functools.lru_cache(maxsize=1024)
def _row_and_type(cls: Any) -> tuple[Layer, type]:
    for base in cls.__mro__:
        for layer in TABLE:
            if layer.kind is base or layer.kind == f"{base.__module__}.{base.__qualname__}":
                return layer, base
    return UNLISTED, nn.Module


def methods_of(cls: Any) -> tuple[Any, Any]:
    """Return what computes a type of layer."""
    return getattr(cls, "forward", None), getattr(cls, "_conv_forward", None)


def computes_as_its_row(cls: Any) -> bool:
    """Say whether a type computes as its row's own type does, and nobody has patched that one."""
    _, kind = _row_and_type(cls)
    home = vars(kind)["__init__"].__code__.co_filename
    codes = [getattr(each, "__code__", None) for each in methods_of(kind) if each is not None]
    stock = all(code is not None and code.co_filename == home for code in codes)
    reads = ("bias", "__getattr__", "__getattribute__")  # past which a run takes its tensors
    alike = all(getattr(cls, each, None) is getattr(kind, each, None) for each in reads)
    return stock and alike and methods_of(cls) == methods_of(kind)


def listed_tensors(layer: Layer, present: list[str]) -> list[str]:
    """Return which of a module's tensors its row names, and dotted names as they stand.

    A row that finds nothing gives its first name, for the caller to say why it can't be adapted.
    """
    found = []
    for glob in layer.tensors:
        if "." in glob or glob in present:
            found.append(glob)
        elif "*" in glob or "[" in glob:
            found += [name for name in present if fnmatch.fnmatchcase(name, glob)]
    return found if found and found[0] in present else [*layer.tensors[:1], *found]
