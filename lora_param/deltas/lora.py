"""The first kind: `W + (B @ A) * scale`, one low-rank update of one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 as everybody calls it

from ..ops import is_unseen
from .pair import Pair, joined


class LoRAParametrization(Pair):
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
            standard deviation of 1/rank. `lora_B` is zero, so a fresh adapter changes nothing; or
            with `"orthogonal"` both are drawn, each in one half of the rank, which changes nothing
            either. `register_lora` has more, for which a pair is anchored (`Pair`).
        generator: Source of the draws; the global one of the device if `None`.
        device: Device of both factors.
        dtype: Dtype of both factors, one of float16, bfloat16, float32 and float64.

    Raises:
        LoRAError: `rank`, `alpha` or `dropout` is out of range; `scaling`, `init`, `dtype` or
            `generator` is unknown.
        AdapterError: `adapter` is no usable name.

    Example:
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
    adds = True

    @property
    def width(self) -> int:  # type: ignore[override]
        """Rank of the product, twice as much where it is anchored."""
        return self.rank * (1 + self.anchored)

    def formula(self, weight: Tensor) -> Tensor:
        """Return `W + (B @ A) * scale`, computed in the wider dtype and rounded once to `W`'s.

        In bfloat16 that rounding loses what is smaller than about 1/256 of the weight's entry.
        """
        A, B = self._both
        dtype, factor = torch.promote_types(weight.dtype, A.dtype), self._factor()
        update = B.to(dtype) @ A.to(dtype)
        if type(factor) is float and weight.is_contiguous() and is_unseen(weight):
            value = update.mul_(factor).add_(weight.view_as(update))  # with the same bits
        else:
            value = weight + update.view_as(weight) * factor
        return value.view_as(weight).to(weight.dtype)

    def sum(self, weight: Tensor) -> Tensor:
        """Return the same within rounding, of float32 or float64 in one pass."""
        A, B = self._both
        if self.rows is not None or A.dtype != weight.dtype or not weight.is_contiguous():
            return cast("Tensor", self(weight))
        factor, flat = self.scale * self._switch.strength, weight.dim() == 2
        matrix = weight if flat else weight.flatten(1)
        value = torch.addmm(matrix, B, A, alpha=factor)
        return value if flat else value.view_as(weight)

    def routes(self, *how: Any) -> bool:
        """Say that rows may differ in any way."""
        return True

    def act(self, y: Tensor, x: Tensor, run: Any, others: Sequence[LoRAParametrization]) -> Any:
        """Add `((x A^T) B^T) * scale` to a layer's output; `B @ A` is never formed.

        Those of `others` that meet the same input are one product: all that drop nothing of it, and
        the blocks of one adapter; where rows differ, all that drop as much.
        """
        routing = run.routing
        if routing is None and not others:
            x = F.dropout(x, self.dropout) if self.dropout and self.training else x
            A, B = self._both
            inner, outer = run.factors(
                *(run.whole(A, B, self.rows, self.dim) if self.rows else (A, B))
            )
            factor = self.scale * self._switch.strength  # without a call more
            return run.up(y, run.down(x, inner), outer, factor)
        routed = routing is not None and routing.rows > 1
        mixing = not routed or routing.choices is None  # else those that drop alike never meet
        meeting: dict[tuple[str, float], list[LoRAParametrization]] = {}
        for pair in (self, *others):
            dropout = pair.dropout if pair.training else 0.0
            meeting.setdefault((pair.adapter if dropout and mixing else "", dropout), []).append(
                pair
            )
        for (_, dropout), pairs in meeting.items():
            factors = [
                run.whole(p.lora_A, p.lora_B * (p.scale if routed else p._factor()), p.rows, p.dim)
                for p in pairs
            ]
            y = joined(y, F.dropout(x, dropout) if dropout else x, run, pairs, factors)
        return y
