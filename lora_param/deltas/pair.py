"""What kinds of low-rank factors have in common: the pair, its numbers, and where it starts."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn

from ..errors import LoRAError, StateDictError
from ..sharding import is_sharded, spread, whole
from .inits import DRAWS, STARTS, Init, factors_at_start
from .numbers import SCALINGS, Scaling, check_alpha, check_dropout, check_rank, check_scaling
from .protocol import Delta, Parts, Shape
from .switching import Switched

Self = TypeVar("Self", bound="Pair")

CHECKS: dict[str, Callable[[Any, int], Any]] = {
    "alpha": check_alpha,
    "scaling": lambda scaling, rank: check_scaling(scaling),
    "dropout": lambda dropout, rank: check_dropout(dropout),
}
"""Its numbers beside the rank, and what makes of a given one, and the rank, the one that is set."""


class Pair(Delta):
    """Two factors whose product, times a scale, is a low-rank change: `(lora_B @ lora_A) * scale`.

    Where it starts from factors `B0`, `A0` whose product isn't zero, it is anchored there: what is
    trained is how far each has moved, `shift_B` and `shift_A`, both zero at first, and

        B A - B0 A0 = [shift_B, B0] [A0 + shift_A; shift_A] = lora_B @ lora_A

    is one product of twice the rank, zero at the start to the bit. Weight decay pulls towards that.
    """

    options = ("rank", "alpha", "scaling", "dropout", "init", "generator", "dtype", "transposed")
    least_dimensions = 2
    parts: ClassVar[Parts] = ("lora_A", "lora_B"), ()
    rank, alpha, scaling, dropout = 1, 1.0, "lora", 0.0
    _init = "kaiming"

    def __init__(
        self,
        fan_out: int,
        fan_in: int,
        rank: int = 8,
        alpha: float | None = None,
        *,
        scaling: Scaling = "lora",
        batch: tuple[int, ...] = (),
        adapter: str = "default",
        dropout: float = 0.0,
        init: Init = "kaiming",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(adapter, dtype)
        rank = check_rank(rank, fan_out, fan_in)
        self.__dict__.update(rank=rank, alpha=check_alpha(alpha, rank))
        self.__dict__.update(scaling=check_scaling(scaling), dropout=check_dropout(dropout))
        if not isinstance(generator, (torch.Generator, type(None))):
            got = type(generator).__name__
            raise LoRAError(f"generator must be a torch.Generator or None, got {got}")
        if not isinstance(init, str) or init not in DRAWS:
            others = f"one of {[*STARTS]} or a function, which start from the weight"
            raise LoRAError(
                f"init must be one of {[*DRAWS]}, or in register_lora {others}, got {init!r:.60}"
            )
        self.__dict__.update(_init=init, _generator=generator)
        A = torch.empty(*batch, rank, fan_in, device=device, dtype=dtype)
        self._keep(A, torch.empty(*batch, fan_out, rank, device=device, dtype=dtype))
        self.reset_parameters()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "rank" and (type(value) is not int or value != self._kept[1].shape[-1]):
            rule = f"its rank must be {self._kept[1].shape[-1]}, got {value!r:.40}"
            raise StateDictError(f"{rule}; resize_lora gives a pair another")
        if name in CHECKS:
            value = CHECKS[name](value, self.rank)
            Switched.switched = object()
        super().__setattr__(name, value)

    def reset_parameters(self) -> None:
        """Draw the factors as `init` said, on the meta device when they leave that."""
        kept: list[Any] = [*self._parameters.values()][:2]
        if kept[0].is_meta:
            return
        for start in self._buffers.values():
            start.fill_(math.nan)  # type: ignore[union-attr]  # the weight's, not to be had again
        generator = self.__dict__.pop("_generator", None)
        like = {"device": (generator or kept[0]).device, "dtype": kept[0].dtype}
        A, B = torch.zeros(kept[0].shape, **like), torch.zeros(kept[1].shape, **like)
        if not self._buffers:
            DRAWS[self._init](A, B, generator)
        sharded = is_sharded(kept[0])
        for own, value in zip(kept, (A, B), strict=True):
            own.detach().copy_(spread(value, own) if sharded else value)

    def _keep(self, A: Tensor, B: Tensor, anchored: bool = False) -> None:
        """Have these factors for its tensors, or begin at them."""
        name = "shift" if anchored else "lora"
        if anchored:
            self._parameters.clear()
            self._buffers.update(start_A=A, start_B=B)
            A, B = torch.zeros_like(A), torch.zeros_like(B)
        # Past torch's setter, for which the two names are taken, by properties.
        self._parameters.update({f"{name}_A": nn.Parameter(A), f"{name}_B": nn.Parameter(B)})

    @classmethod
    def make(cls, weight: Tensor, view: Shape, **options: Any) -> Pair:
        """Build a fresh pair; `transposed`, where the columns of the matrix view are outputs."""
        *batch, fan_out, fan_in = view
        options["dtype"] = dtype = options.get("dtype") or weight.dtype
        init, transposed = options.get("init", "kaiming"), options.pop("transposed", False)
        if not callable(init) and init not in STARTS:
            return cls(fan_out, fan_in, batch=tuple(batch), device=weight.device, **options)
        given = options | {"init": "kaiming", "device": "meta"}  # draws nothing
        generator = given.pop("generator", None)
        pair = cls(fan_out, fan_in, batch=tuple(batch), **given)
        numbers = pair.rank, pair.scale
        found = factors_at_start(init, whole(weight), view, *numbers, generator, transposed)
        B, A = (each.to(weight.device, dtype, copy=True).contiguous() for each in found)
        pair._keep(A, B, anchored=bool(A.any() and B.any()))
        return pair

    @property
    def lora_A(self) -> Tensor:
        """The factor that meets the input of a stored matrix, `[*batch, rank, fan_in]`."""
        if (own := self._parameters.get("lora_A")) is not None:
            return own
        start, shift = cast("Tensor", self.start_A), cast("Tensor", self.shift_A)
        return torch.cat([start + shift, shift], -2)  # [*batch, 2 rank, fan_in]

    @property
    def lora_B(self) -> Tensor:
        """The factor that makes its rows, `[*batch, fan_out, rank]`."""
        if (own := self._parameters.get("lora_B")) is not None:
            return own
        start, shift = cast("Tensor", self.start_B), cast("Tensor", self.shift_B)
        return torch.cat([shift, start], -1)  # [*batch, fan_out, 2 rank]

    @property
    def _both(self) -> tuple[Tensor, Tensor]:
        own: Any = self._parameters
        return (own["lora_A"], own["lora_B"]) if "lora_A" in own else (self.lora_A, self.lora_B)

    @property
    def anchored(self) -> bool:
        """Whether it starts from factors whose product isn't zero."""
        return "shift_A" in self._parameters

    @classmethod
    def restore(
        cls, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], parts: Parts | None = None
    ) -> Delta:
        """Build the pair of these factors, of any rank, or raise `StateDictError`."""
        names = ("shift", "start") if "start_A" in tensors else ("lora",)
        pairs = {name: (tensors[f"{name}_A"], tensors[f"{name}_B"]) for name in names}
        for name, (A, B) in pairs.items():
            if min(A.ndim, B.ndim) < 2 or A.shape[:-1] != (*B.shape[:-2], B.shape[-1]):
                got = f"{name}_A {tuple(A.shape)} and {name}_B {tuple(B.shape)}"
                raise StateDictError(f"{got} are no pair")
            if [A.shape, B.shape] != [each.shape for each in pairs[names[0]]]:
                raise StateDictError(f"{name}_A and {name}_B aren't of the shapes of what moved")
        if names[1:]:
            shifts = tuple(name.replace("lora", "shift") for name in cls.parts[0])
            parts = shifts, ("start_A", "start_B")
        return super().restore(tensors, numbers, parts)

    @property
    def numbers(self) -> dict[str, Any]:
        """Rank, alpha, scaling and dropout."""
        return {name: getattr(self, name) for name in ("rank", *CHECKS)}

    @numbers.setter
    def numbers(self, numbers: Mapping[str, Any]) -> None:
        Delta.numbers.__set__(self, {"scaling": "lora", **numbers})  # type: ignore[attr-defined]

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        return self.alpha / SCALINGS[self.scaling](self.rank)

    @scale.setter
    def scale(self, scale: float) -> None:
        self.alpha = check_alpha(scale, 1, "scale") * SCALINGS[self.scaling](self.rank)

    def _factor(self) -> Any:
        return self.scale * self.now().strength

    @property
    def _kept(self) -> tuple[Tensor, Tensor]:
        """The factors that it trains."""
        both = (self.shift_A, self.shift_B) if self.anchored else (self.lora_A, self.lora_B)
        return cast("tuple[Tensor, Tensor]", both)

    def along(self, name: str, dim: int) -> int | None:
        """Return the rows' in what ends in B, the columns' in A, and else the same dimension."""
        batch, side = self._kept[0].ndim - 2, name[-2:]
        if dim < batch or side not in ("_A", "_B"):
            return dim
        return {("_A", False): batch + 1, ("_B", True): batch}.get((side, dim == batch))

    def misfit(self, shape: Shape, view: Shape) -> str | None:
        """Say why the factors can't be those of a weight of this matrix view."""
        if len(view) < 2:
            return f"a pair needs a matrix, and the weight is {shape}"
        *batch, fan_out, fan_in = view
        got = tuple(tuple(each.shape) for each in self._kept)
        wanted = (*batch, self.rank, fan_in), (*batch, fan_out, self.rank)
        return None if got == wanted else f"its factors are {got}, should be {wanted}"

    def value(self, weight: Tensor) -> Tensor:
        """Return the adapted weight, with a warning where a dropout is left out."""
        if self.dropout and self.training and torch.is_grad_enabled():
            warnings.warn(
                f"adapter {self.adapter!r} has dropout, which needs its layer's input; what reads "
                "the weight without calling the layer gets the update without dropout",
                stacklevel=2,
            )
        return self.formula(weight)

    def formula(self, weight: Tensor) -> Tensor:
        """Return the adapted weight, computed in the wider dtype and rounded once to `W`'s."""
        raise NotImplementedError

    def plain(self: Self, scaling: Scaling | None = None) -> Self:
        """Return the same update, of another scaling if told, as two factors alone of all ranks."""
        if not self.anchored and scaling in (None, self.scaling):
            return self
        return self.with_factors(self.lora_A, self.lora_B, scaling)

    def with_factors(self: Self, A: Tensor, B: Tensor, scaling: str | None = None) -> Self:
        """Return the same with other factors, which have the same scale."""
        rank, scaling = B.shape[-1], scaling or self.scaling
        numbers = {"rank": rank, "scaling": scaling, "alpha": self.scale * SCALINGS[scaling](rank)}
        others = {n: t for n, t in self._parameters.items() if n[:-2] not in ("lora", "shift")}
        tensors = cast("dict[str, Tensor]", {**others, "lora_A": A, "lora_B": B})
        return cast("Self", self.made_of(tensors, self.numbers | numbers))

    def lowered(self: Self, rank: int) -> Self:
        """Return the same update, within rounding, as a pair whose rank is the smaller side."""
        tall = self.lora_B.shape[-2] > self.lora_A.shape[-1]
        product = (self.lora_B.double() @ self.lora_A.double()).to(self.lora_A.dtype)
        eye = torch.eye(rank).to(product).repeat(*product.shape[:-2], 1, 1)
        return self.with_factors(*((eye, product) if tall else (product, eye)))

    def block(self, start: int, stop: int) -> Delta:
        """Return the update of some of the weight's rows, of a stack that of some of its slices."""
        own = cast("dict[str, Tensor]", {**self._parameters, **self._buffers})
        cut = {n: t if n[-2:] == "_A" and t.ndim == 2 else t[start:stop] for n, t in own.items()}
        return self.made_of(cut, self.numbers)

    def singular_values(self, shape: Shape) -> Tensor:
        """Return the update's singular values, `[*batch, rank]`, without forming it."""
        sides = self.lora_A.mT, self.lora_B
        A, B = (torch.linalg.qr(each.detach().double())[1] for each in sides)
        return cast("Tensor", torch.linalg.svdvals(B @ A.mT) * abs(self.scale * self.strength))


def joined(y: Tensor, x: Tensor, run: Any, pairs: Sequence[Pair], factors: Any) -> Tensor:
    """Add the product with all pairs' factors `(A, B)` at once; where rows differ, weighed by row.

    `((x [A1; A2; ...]^T) * M) [B1, B2, ...]^T`, or with those of each row alone.
    """
    routed, (As, Bs) = run.routing is not None and run.routing.rows > 1, zip(*factors, strict=True)
    if routed and (gathered := run.gathered(y, x, pairs, As, Bs)) is not None:
        return cast("Tensor", gathered)
    # [sum of ranks, fan_in] and [fan_out, the same]
    A, B = (torch.cat(As), torch.cat(Bs, 1)) if len(As) > 1 else (*As, *Bs)
    inner, outer = run.factors(A, B)
    low = run.down(x, inner)
    if routed:
        low = run.by_row(low, run.routing.table(pairs, [len(A) for A in As], low))
    return cast("Tensor", run.up(y, low, outer, 1.0))
