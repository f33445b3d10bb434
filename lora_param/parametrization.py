"""The formula: one low-rank update of one tensor."""

from __future__ import annotations

import math
import warnings
from numbers import Integral, Real
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from .errors import AdapterError, LoRAError

Init = Literal["kaiming", "gaussian"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The dtypes that weights and factors can have."""


class LoRAParametrization(nn.Module):
    """Add a low-rank update to a weight: `W + (B @ A).view_as(W) * scale`, `scale = alpha / rank`.

    `W` is any tensor that reads as a matrix `(fan_out, fan_in)` in row-major order, or with `batch`
    as a stack of such matrices. There is no `right_inverse`: registering leaves the original as it
    is, and assigning to the weight is refused.

    Args:
        fan_out: Rows of the weight's matrix view.
        fan_in: Columns of the weight's matrix view.
        rank: Rank of the update, `1 <= rank <= min(fan_out, fan_in)`.
        alpha: Finite numerator of the scale; `None` means `rank`, a scale of one.
        batch: Leading dimensions of a stack of matrices, each of which gets a pair of its own.
        adapter: The adapter's name, by which `enable_lora` and the like find it.
        dropout: Probability, `0 <= dropout < 1`, with which entries of a layer's input are dropped
            in front of `lora_A` in training. Weight space can't do that: in training, reading the
            weight with a graph warns.
        init: How `lora_A` is drawn: `"kaiming"`, uniform with a = sqrt(5), that is in
            ±1/sqrt(fan_in), or `"gaussian"` with a standard deviation of 1/rank.
            `lora_B` is zero, so a fresh adapter changes nothing.
        generator: Source of the draws; the global one of the device if `None`.
        device: Device of both factors.
        dtype: Dtype of both factors, one of float16, bfloat16, float32 and float64.

    Attributes:
        lora_A: Parameter `[*batch, rank, fan_in]`.
        lora_B: Parameter `[*batch, fan_out, rank]`.
        scale: `alpha / rank`; setting it changes the update at once.
        enabled: While `False`, the weight passes through untouched, as the same object.

    Raises:
        LoRAError: `rank`, `alpha` or `dropout` is out of range; `init`, `dtype` or `generator` is
            unknown.
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
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685,
        section 4.1, equation 3.
    """

    def __init__(
        self,
        fan_out: int,
        fan_in: int,
        rank: int = 8,
        alpha: float | None = None,
        *,
        batch: tuple[int, ...] = (),
        adapter: str = "default",
        dropout: float = 0.0,
        init: Init = "kaiming",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_adapter(adapter)
        self.rank = check_rank(rank, fan_out, fan_in)
        self.scale = check_alpha(alpha, self.rank) / self.rank
        self.dropout = check_dropout(dropout)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise LoRAError(
                f"generator must be a torch.Generator or None, got {type(generator).__name__}"
            )
        if init not in ("kaiming", "gaussian"):
            raise LoRAError(f'init must be "kaiming" or "gaussian", got {init!r}')
        check_dtype(dtype or torch.get_default_dtype())
        self.adapter = adapter
        self.enabled = True
        self.lora_A = nn.Parameter(
            torch.empty(*batch, self.rank, fan_in, device=device, dtype=dtype)
        )
        self.lora_B = nn.Parameter(
            torch.zeros(*batch, fan_out, self.rank, device=device, dtype=dtype)
        )
        self._draw(init, generator)

    @property
    def alpha(self) -> float:
        """The numerator of the scale, without the last digits' rounding of `scale * rank`."""
        return float(f"{self.scale * self.rank:.12g}")

    def _draw(self, init: Init, generator: torch.Generator | None) -> None:
        device = self.lora_A.device if generator is None else generator.device
        # torch reads fan_in off a matrix, so a stack is drawn as the tall matrix of its slices.
        tall = torch.empty_like(self.lora_A, device=device).flatten(0, -2)
        if init == "kaiming":
            nn.init.kaiming_uniform_(tall, a=math.sqrt(5), generator=generator)
        else:
            nn.init.normal_(tall, std=1 / self.rank, generator=generator)
        with torch.no_grad():
            self.lora_A.copy_(tall.view_as(self.lora_A))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the adapted weight, in the weight's shape and dtype.

        The update is computed in the wider of the two dtypes, also inside autocast, and the sum is
        rounded once, to the weight's dtype. In bfloat16 that rounding loses what is smaller than
        about 1/256 of the weight's entry.
        """
        if not self.enabled:
            return weight
        if self.dropout and self.training and torch.is_grad_enabled():
            warnings.warn(
                f"adapter {self.adapter!r} has dropout, which needs its layer's input; what reads "
                "the weight without calling the layer gets the update without dropout",
                stacklevel=2,
            )
        if not weight.is_meta and torch.is_autocast_enabled(weight.device.type):
            with torch.autocast(weight.device.type, enabled=False):
                return adapted(weight, self.lora_A, self.lora_B, self.scale)
        return adapted(weight, self.lora_A, self.lora_B, self.scale)

    def extra_repr(self) -> str:
        """Name, rank, scale and state, for `print(model)`."""
        state = "enabled" if self.enabled else "disabled"
        dropout = f", dropout={self.dropout:g}" if self.dropout else ""
        return f"{self.adapter!r}, rank={self.rank}, alpha={self.alpha:g}{dropout}, {state}"


def adapted(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float) -> Tensor:
    """Add an update to a weight, or to some of its rows that of these rows."""
    dtype = torch.promote_types(weight.dtype, lora_A.dtype)
    update = lora_B.to(dtype) @ lora_A.to(dtype)
    return (weight + update.view_as(weight) * scale).to(weight.dtype)


def check_rank(rank: object, fan_out: int, fan_in: int) -> int:
    """Return `rank` as an integer that a `(fan_out, fan_in)` matrix can have, or raise."""
    limit = min(fan_out, fan_in)
    whole = isinstance(rank, Integral) and not isinstance(rank, bool)
    if not whole or not 1 <= int(cast(Any, rank)) <= limit:
        too_high = whole and int(cast(Any, rank)) > limit
        fix = "lower the rank" if too_high else "give an integer from 1 up"
        raise LoRAError(
            f"rank must satisfy 1 <= rank <= min({fan_out}, {fan_in}) = {limit}, got {rank!r}; "
            f"{fix}"
        )
    return int(cast(Any, rank))


def check_alpha(alpha: object, rank: int) -> float:
    """Return `alpha` as a finite float, `rank` for `None`, or raise."""
    if alpha is None:
        return float(rank)
    try:
        value = float(cast(Any, alpha)) if isinstance(alpha, Real) else math.nan
    except OverflowError:
        value = math.inf
    if not math.isfinite(value) or isinstance(alpha, bool):
        raise LoRAError(
            f"alpha must be a finite number, or None for the rank, got {alpha!r:.40}; give a number"
        )
    return value


def check_dropout(dropout: object) -> float:
    """Return `dropout` as a float, or raise."""
    if isinstance(dropout, bool) or not isinstance(dropout, Real) or not 0 <= float(dropout) < 1:
        raise LoRAError(f"dropout must satisfy 0 <= dropout < 1, got {dropout!r}")
    return float(dropout)


def check_adapter(adapter: object) -> None:
    """Raise unless `adapter` can be an adapter's name."""
    if not isinstance(adapter, str) or not adapter or "." in adapter:
        raise AdapterError(
            f"an adapter's name must be a non-empty string without dots, got {adapter!r}"
        )


def check_dtype(dtype: object) -> None:
    """Raise unless `dtype` is one that factors can be trained in."""
    if dtype not in FLOATS:
        raise LoRAError(f"an adapter's dtype must be one of {show_dtypes(*FLOATS)}, got {dtype}")


def show_dtypes(*dtypes: torch.dtype) -> str:
    """Return the dtypes' names without `torch.`, comma-separated."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
