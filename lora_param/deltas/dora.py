"""The kind whose direction is low-rank and whose lengths are its own: DoRA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F  # noqa: N812 as everybody calls it

from ..ops import autocasts
from ..quantised import dense
from .pair import Pair, joined
from .protocol import Shape

SMALL = 1 << 16
"""Up to how many elements a sum is formed for its lengths: fewer calls are then quicker."""

CANCELLED = 0.1
"""Beneath which share of `|W|^2` the length of a row's sum is computed from the sum itself."""

_lengths: WeakKeyDictionary[DoRA, tuple[tuple[Any, ...], Tensor]] = WeakKeyDictionary()
"""The memory and the state of `W`, and its `|W|`, by the delta on it."""


class DoRA(Pair):
    """Turn a weight's rows by a low-rank update, and give each a length of its own: `m * V / |V|`.

    `V = W + (B @ A).view_as(W) * scale`, and `magnitude`, at first `|W|`, is `m`: one number for
    each output, a row of the weight, or a column of one that is stored `(in, out)`. `|V|` gets no
    gradient. It is computed in float32 at least, in activation space without `B @ A`, and nothing
    of the weight's size is kept. With `h = m / |V| - 1`, of a fresh one exactly zero, a layer's
    output `y` with bias `b` becomes

        y + h (y - b) + (1 + h) scale (x A^T) B^T

    Example:
        >>> layer = torch.nn.Linear(20, 10)
        >>> register_lora(layer, rank=2, kind="dora")
        ['weight']
        >>> layer.parametrizations.weight[0].magnitude.shape
        torch.Size([10, 1])

    Source:
        Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353, eq. 5, and
        section 4.3 for the gradient.
    """

    kind = "dora"
    of_values = True
    parts = (*Pair.parts[0], "magnitude"), ()
    magnitude: Tensor

    @classmethod
    def make(cls, weight: Tensor, view: Shape, **options: Any) -> DoRA:
        """Build a fresh pair with the lengths of the weight's outputs."""
        transposed = options.get("transposed", False)
        delta = cast("DoRA", super().make(weight, view, **options))
        rows = len(view) - 1  # dimensions that count a stored matrix's rows
        shape = [n if transposed == (i >= rows) else 1 for i, n in enumerate(weight.shape)]
        lengths = _length(weight.detach(), shape).to(delta._kept[0].dtype)
        delta._parameters["magnitude"] = nn.Parameter(lengths)
        return delta

    @property
    def by_rows(self) -> bool:  # type: ignore[override]
        """Whether each length is of one row or of a part of it."""
        return self.magnitude.shape[0] > 1 or self.magnitude.numel() == 1

    def misfit(self, shape: Shape, view: Shape) -> str | None:
        """Say why the tensors can't be those of a weight of this shape and matrix view."""
        m = tuple(self.magnitude.shape)
        if len(m) == len(shape) and all(n in (1, size) for n, size in zip(m, shape, strict=True)):
            return super().misfit(shape, view)
        return f"its magnitude is {m}, for a weight of {shape}"

    def reset_parameters(self) -> None:
        """Draw the pair, and wait for the base whose lengths are to be taken."""
        super().reset_parameters()
        if "magnitude" in self._parameters:
            self.magnitude.detach().fill_(torch.nan)
            self.__dict__["_waits"] = True

    def rebased(self, old: Tensor, new: Tensor) -> dict[str, Tensor]:
        """Return the lengths of a new base, if training has not moved those of the old one."""
        own = self.magnitude.detach()
        same = self.__dict__.pop("_waits", False) or (
            not own.is_meta and _unchanged(own, _length(old.detach(), own.shape), own.dtype).all()
        )
        return {"magnitude": _length(new.detach(), own.shape).to(own.dtype)} if same else {}

    def formula(self, weight: Tensor) -> Tensor:
        """Return `m V / |V|`, computed in float32 at least and rounded once to `W`'s dtype."""
        V = self._direction(weight)
        return (V * (1 + self._change(_length(V, self.magnitude.shape)))).to(weight.dtype)

    def _direction(self, weight: Tensor) -> Tensor:
        A, B = self.lora_A, self.lora_B
        dtype = torch.promote_types(torch.promote_types(weight.dtype, A.dtype), torch.float32)
        update = B.to(dtype) @ A.to(dtype)
        return weight.to(dtype) + update.view_as(weight) * self.scale

    def _change(self, length: Tensor) -> Tensor:
        """Return `m / |V| - 1`, in the dtype of `|V|`; where `V` is zero, `m`."""
        m = self.magnitude.to(length.dtype).view(length.shape)
        with torch.no_grad():
            same = _unchanged(m, length, self.magnitude.dtype)  # then exactly nothing happens
            length = torch.where(same, m, length)
            divisor = length.where(length > 0, 1)
        return (m - length) / divisor

    def routes(self, routing: Any, before: Sequence[Any], transposed: bool) -> bool:
        """Say whether it acts on outputs, and on its rows nothing in front of it does."""
        return not (self._is_of_inputs(transposed) or routing.mixes(self, before))

    def _is_of_inputs(self, transposed: bool) -> bool:
        m, of_tokens = self.magnitude, self.rows is not None and self.dim != transposed
        return of_tokens or m.numel() > m.shape[transposed]

    def act(self, y: Tensor, x: Tensor, run: Any, others: Sequence[DoRA]) -> Any:
        """Scale a layer's output by the lengths, and add the pair's part scaled alike.

        Those that never meet are one product: blocks of one adapter, or what each row has.
        """
        routed, own, rest = run.routing is not None and run.routing.rows > 1, [self], [*others]
        while rest and rest[0]._turn(routed) == self._turn(routed):
            own.append(rest.pop(0))
        y = self._act(y, x, run, own, routed)
        return rest[0].act(y, x, run, rest[1:]) if rest else y

    def _turn(self, routed: bool) -> tuple[str, float]:
        return "" if routed else self.adapter, self.dropout if self.training else 0.0

    def _act(self, y: Tensor, x: Tensor, run: Any, own: Sequence[DoRA], routed: bool) -> Any:
        weight, before = dense(run.weight), [delta for each in run.acting for delta in each]
        before = [] if routed else before[: before.index(self)]
        dropout, of_inputs = self.dropout * self.training, self._is_of_inputs(run.transposed)
        with torch.set_grad_enabled(torch.is_grad_enabled() and bool(dropout or of_inputs)):
            for delta in before:
                weight = delta(weight)
        x = F.dropout(x, dropout) if dropout else x
        if of_inputs:
            return y + sum(run.product(x, each(weight) - weight) for each in own)
        base = run.product(x, weight) if dropout else run.unbiased(y)
        changes, factors = zip(*(each._gated(weight, run, not before) for each in own), strict=True)
        if routed:
            here = run.routing.table(own, [1] * len(own), y).t()[:, :, None]  # [deltas, rows, 1]
            y = y + run.by_row(base, sum(map(torch.mul, here, changes)))  # by [rows, out]
        else:
            change = sum(changes[1:], changes[0])  # [out]
            y = torch.addcmul(y, base, run.across(change.to(y.dtype)))
        return joined(y, x, run, own, factors)

    def _gated(self, weight: Tensor, run: Any, alone: bool) -> tuple[Tensor, Any]:
        """Return `m / |V| - 1`, `[out]`, and both factors, of which one is scaled."""
        change = self._change(self._length_of(weight, run, alone))
        gate, A, B = (1 + change) * self.scale, self.lora_A, self.lora_B
        A, B = (A * gate, B) if run.transposed else (A, B * gate[:, None])
        if self.rows is not None:
            change = self.rows.spread(change, 0, run.shape[self.dim])
        return change, run.whole(A, B, self.rows, self.dim)

    @torch.no_grad()
    def _length_of(self, weight: Tensor, run: Any, alone: bool) -> Tensor:
        """Return `|V|`, `[out]`, where it costs less without forming `V`."""
        if autocasts(weight):
            with torch.autocast(weight.device.type, enabled=False):
                return self._length_of(weight, run, alone)
        base, shape = weight, self.magnitude.shape
        if self.rows is not None:
            weight = self.rows.take(weight, self.dim)
        # What is known of a weight is no trace's; on an accelerator, to look at a sum stops it.
        if not (alone and run.in_place and weight.is_cpu) or weight.numel() <= SMALL:
            return _length(self._direction(weight), shape).flatten()
        A, B, W = self.lora_A, self.lora_B, weight.flatten(1)
        A, B, W = (B.t(), A.t(), W.t()) if run.transposed else (A, B, W)
        own = self._length_of_base(weight, base).flatten()
        return length_of_sum(W, own, A.to(own.dtype), B.to(own.dtype), self.scale)

    def _length_of_base(self, weight: Tensor, base: Tensor) -> Tensor:
        """Return `|W|`, computed once for as long as the base, of which it is rows, is the same."""
        if base.requires_grad or base.is_inference():  # fused optimizers' steps aren't counted
            _lengths.pop(self, None)
            return _length(weight, self.magnitude.shape)
        # By a reference to the memory, because its address could be another's by now.
        memory = StorageWeakRef(weight.untyped_storage()), weight.data_ptr()  # type: ignore[no-untyped-call]
        state = *memory, weight._version, weight.shape, weight.stride(), weight.dtype
        if (known := _lengths.get(self)) is None or known[0] != state:
            known = _lengths[self] = state, _length(weight, self.magnitude.shape)
        return known[1]


def length_of_sum(W: Tensor, own: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Return `|W + B A s|` by rows, given `own = |W|`, without `B A`.

    `|W + B A s|^2 = |W|^2 + 2 s <W A^T, B> + s^2 <B (A A^T), B>`. Rows of which little is left,
    whose digits that has lost, are summed.
    """
    product = W.to(own.dtype) @ A.t()
    change = (torch.addmm(product, B, A @ A.t(), beta=2, alpha=scale) * B).sum(1) * scale
    squares = own * own + change
    length = torch.where(change == 0, own, squares.clamp_min(0).sqrt())
    rows = (squares < CANCELLED * own * own).nonzero().flatten()
    if len(rows):
        summed = W[rows].to(own.dtype) + B[rows] @ A * scale
        length[rows] = torch.linalg.vector_norm(summed, dim=1)
    return length


@torch.no_grad()
def _length(V: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the lengths over the dimensions that `shape` has not, in float32 at least."""
    gone = [index for index, size in enumerate(shape) if size == 1]
    dtype = torch.promote_types(V.dtype, torch.float32)
    lengths: Tensor = torch.linalg.vector_norm(V, dim=gone, keepdim=True, dtype=dtype)
    return lengths


def _unchanged(m: Tensor, length: Tensor, dtype: torch.dtype) -> Tensor:
    """Say where `m`, kept in a dtype, is the length but for rounding."""
    error = (m.to(length.dtype) - length).abs()
    close = error <= 4 * torch.finfo(length.dtype).eps * length
    return close | (length.to(dtype) == m.to(dtype))
