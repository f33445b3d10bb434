"""The first kind: `W + (B @ A) * scale`, one low-rank update of one tensor."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 as everybody calls it

from ..errors import LoRAError, StateDictError
from ..sharding import spread
from .protocol import Delta, Shape

Init = Literal["kaiming", "gaussian"]
Scaling = Literal["lora", "rslora"]

SCALINGS: dict[str, Callable[[int], float]] = {"lora": float, "rslora": math.sqrt}
"""What alpha is divided by, given the rank."""


class LoRAParametrization(Delta):
    """Add a low-rank update to a weight: `W + (B @ A).view_as(W) * scale`, `scale = alpha / rank`.

    `W` is any tensor that reads as a matrix `(fan_out, fan_in)` in row-major order, or with `batch`
    as a stack of these. Registering leaves the original as it is; the weight can't be assigned to.
    `lora_A` is `[*batch, rank, fan_in]` and `lora_B` `[*batch, fan_out, rank]`; setting `alpha` or
    `scale` changes the update at once; while `enabled` is `False`, the weight passes untouched.

    Args:
        fan_out: Rows of the weight's matrix view.
        fan_in: Columns of the weight's matrix view.
        rank: Rank of the update, `1 <= rank <= min(fan_out, fan_in)`.
        alpha: Finite numerator of the scale; `None` means `rank`.
        scaling: What `alpha` is divided by: `"lora"`, the rank, or `"rslora"`, its square root, by
            which the size of what is learnt doesn't fall with the rank.
        batch: Leading dimensions of a stack of matrices, each of which gets a pair of its own.
        adapter: The adapter's name, by which `enable_lora` and the like find it.
        dropout: Probability, `0 <= dropout < 1`, with which entries of a layer's input are dropped
            in front of `lora_A` in training. Weight space can't: reading the weight then warns.
        init: How `lora_A` is drawn: `"kaiming"`, uniform in ±1/sqrt(fan_in), or `"gaussian"` with a
            standard deviation of 1/rank. `lora_B` is zero, so a fresh adapter changes nothing.
        generator: Source of the draws; the global one of the device if `None`.
        device: Device of both factors.
        dtype: Dtype of both factors, one of float16, bfloat16, float32 and float64.

    Raises:
        LoRAError: `rank`, `alpha` or `dropout` is out of range; `scaling`, `init`, `dtype` or
            `generator` is unknown.
        AdapterError: `adapter` is no usable name.

    Example:
        >>> import torch
        >>> from torch.nn.utils.parametrize import register_parametrization
        >>> layer = torch.nn.Linear(20, 10)
        >>> lora = LoRAParametrization(10, 20, rank=2, alpha=4)
        >>> _ = register_parametrization(layer, "weight", lora)
        >>> layer.parametrizations.weight[0] is lora
        True
        >>> lora.lora_A.shape, lora.lora_B.shape, lora.scale
        (torch.Size([2, 20]), torch.Size([10, 2]), 2.0)
        >>> torch.equal(layer.weight, layer.parametrizations.weight.original)
        True

    Source:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, eq. 3.
        Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA",
        arXiv:2312.03732, for `"rslora"`.
    """

    kind = "lora"
    options = ("rank", "alpha", "scaling", "dropout", "init", "generator", "dtype")
    least_dimensions = 2
    rank, _alpha, _scaling, _dropout = 1, 1.0, "lora", 0.0
    adds = True

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
        self.__dict__.update(rank=rank, _alpha=check_alpha(alpha, rank))
        self.__dict__.update(_scaling=check_scaling(scaling), _dropout=check_dropout(dropout))
        if not isinstance(generator, (torch.Generator, type(None))):
            got = type(generator).__name__
            raise LoRAError(f"generator must be a torch.Generator or None, got {got}")
        if init not in ("kaiming", "gaussian"):
            raise LoRAError(f'init must be "kaiming" or "gaussian", got {init!r}')
        self.__dict__.update(_init=init, _generator=generator)
        A = torch.empty(*batch, rank, fan_in, device=device, dtype=dtype)
        B = torch.empty(*batch, fan_out, rank, device=device, dtype=dtype)
        self.lora_A, self.lora_B = nn.Parameter(A), nn.Parameter(B)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw `lora_A` as `init` said, and make `lora_B` zero.

        On the meta device it waits until the factors have left that, and so does the generator.
        """
        A, B = self.lora_A.detach(), self.lora_B.detach()
        if B.is_meta:
            return
        generator = self.__dict__.pop("_generator", None)
        source = A.device if generator is None else generator.device
        drawn = torch.empty(A.shape, device=source, dtype=A.dtype)
        if self._init == "kaiming":  # with a = sqrt(5), as torch draws a Linear's weight
            drawn.uniform_(-(A.shape[-1] ** -0.5), A.shape[-1] ** -0.5, generator=generator)
        else:
            drawn.normal_(0, 1 / self.rank, generator=generator)
        A.copy_(spread(drawn, A))
        B.zero_()

    @classmethod
    def make(cls, weight: Tensor, view: Shape, **options: Any) -> LoRAParametrization:
        """Build a fresh pair on the weight's device and, unless told otherwise, of its dtype."""
        *batch, fan_out, fan_in = view
        options["dtype"] = options.get("dtype") or weight.dtype
        return cls(fan_out, fan_in, batch=tuple(batch), device=weight.device, **options)

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> Delta:
        """Build the pair of these factors, of any rank.

        Raises:
            StateDictError: The factors are no pair, or the numbers aren't theirs.
        """
        A, B = tensors["lora_A"], tensors["lora_B"]
        if min(A.ndim, B.ndim) < 2 or A.shape[:-2] != B.shape[:-2] or A.shape[-2] != B.shape[-1]:
            raise StateDictError(f"lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} are no pair")
        return super().restore(tensors, numbers)

    @property
    def numbers(self) -> dict[str, Any]:
        """Rank, alpha, scaling and dropout."""
        named = {"rank": self.rank, "alpha": self._alpha, "scaling": self._scaling}
        return {**named, "dropout": self._dropout}

    @numbers.setter
    def numbers(self, numbers: Mapping[str, Any]) -> None:
        own = self.lora_B.shape[-1]
        if (rank := numbers.get("rank", own)) != own or type(rank) is not int:
            raise StateDictError(f"its rank must be {own}, got {rank!r:.40}")
        Delta.numbers.__set__(self, {"scaling": "lora", **numbers})  # type: ignore[attr-defined]

    @property
    def alpha(self) -> float:
        """The numerator of the scale."""
        return self._alpha

    @alpha.setter
    def alpha(self, alpha: float) -> None:
        self._alpha = check_alpha(alpha, self.rank)
        Delta.switched = object()

    @property
    def scaling(self) -> str:
        """What alpha is divided by."""
        return self._scaling

    @scaling.setter
    def scaling(self, scaling: Scaling) -> None:
        self._scaling = check_scaling(scaling)
        Delta.switched = object()

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        return self._alpha / SCALINGS[self._scaling](self.rank)

    @scale.setter
    def scale(self, scale: float) -> None:
        self.alpha = check_alpha(scale, 1, "scale") * SCALINGS[self._scaling](self.rank)

    @property
    def _factor(self) -> float:
        return self.scale * self.strength

    @property
    def dropout(self) -> float:
        """The probability with which an entry of the input is dropped."""
        return self._dropout

    @dropout.setter
    def dropout(self, dropout: float) -> None:
        self._dropout = check_dropout(dropout)

    def along(self, name: str, dim: int) -> int | None:
        """Return a stack's dimension in both, the rows' in `lora_B`, the columns' in `lora_A`."""
        batch = self.lora_A.ndim - 2
        if dim < batch:
            return dim
        return {("lora_A", False): batch + 1, ("lora_B", True): batch}.get((name, dim == batch))

    def misfit(self, shape: Shape, view: Shape) -> str | None:
        """Say why the factors can't be those of a weight of this matrix view."""
        if len(view) < 2:
            return f"a pair needs a matrix, and the weight is {shape}"
        *batch, fan_out, fan_in = view
        got = tuple(self.lora_A.shape), tuple(self.lora_B.shape)
        wanted = (*batch, self.rank, fan_in), (*batch, fan_out, self.rank)
        return None if got == wanted else f"its factors are {got}, should be {wanted}"

    def value(self, weight: Tensor) -> Tensor:
        """Return `W + (B @ A) * scale`, computed in the wider dtype and rounded once to `W`'s.

        In bfloat16 that rounding loses what is smaller than about 1/256 of the weight's entry.
        """
        if self._dropout and self.training and torch.is_grad_enabled():
            warnings.warn(
                f"adapter {self.adapter!r} has dropout, which needs its layer's input; what reads "
                "the weight without calling the layer gets the update without dropout",
                stacklevel=2,
            )
        dtype = torch.promote_types(weight.dtype, self.lora_A.dtype)
        update = self.lora_B.to(dtype) @ self.lora_A.to(dtype)
        return (weight + update.view_as(weight) * self._factor).to(weight.dtype)

    def act(self, y: Tensor, x: Tensor, run: Any, others: Sequence[LoRAParametrization]) -> Any:
        """Add `((x A^T) B^T) * scale` to a layer's output; `B @ A` is never formed.

        Those of `others` that meet the same input, and so drop nothing of it, are one product.
        """
        if not others:
            x = F.dropout(x, self._dropout) if self._dropout and self.training else x
            inner, outer = run.factors(self.lora_A, self.lora_B)
            factor = self.scale * self._places[-1].switch.strength  # without a call more
            return run.up(y, run.down(x, inner), outer, factor)
        same = []
        for pair in (self, *others):
            if pair._dropout and pair.training:
                y = pair.act(y, x, run, ())
            else:
                same.append(pair)
        if same:
            inner, outer = run.factors(
                torch.cat([pair.lora_A for pair in same]),  # [sum of ranks, fan_in]
                torch.cat([pair.lora_B * pair._factor for pair in same], 1),  # [fan_out, the same]
            )
            y = run.up(y, run.down(x, inner), outer, 1.0)
        return y

    def lowered(self, rank: int) -> Delta:
        """Return the same update, within rounding, as a pair whose rank is the smaller side."""
        tall = self.lora_B.shape[-2] > self.lora_A.shape[-1]
        product = (self.lora_B.double() @ self.lora_A.double()).to(self.lora_A.dtype)
        eye = torch.eye(rank, dtype=product.dtype, device=product.device)
        eye = eye.expand(*product.shape[:-2], rank, rank).contiguous()
        A, B = (eye, product) if tall else (product, eye)
        alpha = self.scale * SCALINGS[self._scaling](rank)
        numbers = self.numbers | {"rank": rank, "alpha": alpha}
        return self.made_of({"lora_A": A, "lora_B": B}, numbers)

    def block(self, start: int, stop: int) -> Delta:
        """Return the update of some of the weight's rows, of a stack that of some of its slices."""
        A = self.lora_A[start:stop] if self.lora_A.ndim > 2 else self.lora_A
        return self.made_of({"lora_A": A, "lora_B": self.lora_B[start:stop]}, self.numbers)

    def singular_values(self, shape: Shape) -> Tensor:
        """Return the update's singular values, `[*batch, rank]`, without forming it."""
        sides = self.lora_A.mT, self.lora_B
        A, B = (torch.linalg.qr(each.detach().double())[1] for each in sides)
        return cast("Tensor", torch.linalg.svdvals(B @ A.mT) * abs(self._factor))


def check_rank(rank: object, fan_out: int, fan_in: int) -> int:
    """Return `rank` as an integer that a `(fan_out, fan_in)` matrix can have, or raise."""
    limit = min(fan_out, fan_in)
    whole = type(rank) is int or (isinstance(rank, Integral) and not isinstance(rank, bool))
    number = int(cast(Any, rank)) if whole else 0
    if not 1 <= number <= limit:
        fix = "lower the rank" if number > limit else "give an integer from 1 up"
        bounds = f"1 <= rank <= min({fan_out}, {fan_in}) = {limit}"
        raise LoRAError(f"rank must satisfy {bounds}, got {rank!r}; {fix}")
    return number


def check_alpha(alpha: object, rank: int, name: str = "alpha") -> float:
    """Return `alpha` as a finite float, `rank` for `None`, or raise."""
    if alpha is None and name == "alpha":
        return float(rank)
    if not math.isfinite(value := _real(alpha)):
        rule = "a finite number" + (", or None for the rank" if name == "alpha" else "")
        raise LoRAError(f"{name} must be {rule}, got {alpha!r:.40}; give a number")
    return value


def check_scaling(scaling: object) -> str:
    """Return `scaling`, or raise unless it is known."""
    if not isinstance(scaling, str) or scaling not in SCALINGS:
        raise LoRAError(f"scaling must be one of {[*SCALINGS]}, got {scaling!r:.40}")
    return scaling


def check_dropout(dropout: object) -> float:
    """Return `dropout` as a float, or raise."""
    if not 0 <= (value := _real(dropout)) < 1:
        raise LoRAError(f"dropout must satisfy 0 <= dropout < 1, got {dropout!r}")
    return value


def _real(value: object) -> float:
    """Return a real number as a float, and anything else as NaN."""
    real = isinstance(value, (float, Real)) and not isinstance(value, bool)
    try:
        return float(cast(Any, value)) if real else math.nan
    except OverflowError:
        return math.inf
