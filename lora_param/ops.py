"""Activation space: a layer at work on one input, where an update acts and no weight is formed.

A run is one module on one input. It gives what the stock forward gives, for the weight beneath the
deltas (`base`), for a pair's inner factor in its place (`down`), and adds what the outer factor
makes of that (`up`). All is composed of torch's own operations: it compiles, exports, runs under
vmap and differentiates twice; a custom autograd function gained 0 to 3 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 as everybody calls it

from .chains import type_before
from .places import is_traced
from .quantised import as_beneath, is_packed, logical
from .rows import Rows

PLAIN = (Tensor, nn.Parameter)
"""Types whose results can be changed in place whatever the change is."""

COPY = 100
"""How many tokens' products a copy of a row's factors costs: 8 adapters pay from about 16 on."""


class _Run:
    x: Tensor
    bias: Tensor | None = None
    weight: Tensor  # beneath the deltas
    acting: Sequence[Sequence[Any]] = ()  # the deltas, in the order in which they act
    transposed: bool
    in_place: bool
    shape: Sequence[int]  # of the weight, known when the base has been computed
    lead: Sequence[int] | None = None  # the output's dimensions in front, where `x` has one instead
    routing: Any = None  # of a batch whose rows differ, which are in dimension `rows_in`
    rows_in = 0
    narrowest = 1  # the rank beneath which an inner product gets no cheaper
    forming = 0  # how many multiplications one entry of a sum costs, where forming it can pay

    def whole(self, A: Tensor, B: Tensor, rows: Rows | None, dim: int) -> tuple[Tensor, Tensor]:
        """Return a block's factors as those of the whole weight, with zeros for its other rows."""
        if rows is None:
            return A, B
        if dim:
            return rows.spread(A, 1, self.shape[dim]), B
        return A, rows.spread(B, 0, self.shape[dim])

    def factors(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Return a stored weight's factors as `down` and `up` take them."""
        return (B.t(), A) if self.transposed else (A, B.t())

    def up(self, y: Tensor, low: Tensor, outer: Tensor, scale: float) -> Tensor:
        """Return `y + low outer * scale`."""
        return plus(y, low, outer, scale, self.in_place)

    def across(self, values: Tensor) -> Tensor:
        """Return a number for each of the output's channels as they multiply `y`."""
        return values

    def unbiased(self, y: Tensor) -> Tensor:
        """Return `y - bias`."""
        return y if self.bias is None else y - self.across(self.bias.to(y.dtype))

    @property
    def batch(self) -> Sequence[int]:
        """The sizes of those dimensions of the input that could have the batch's rows."""
        return self.x.shape[:-1] if self.lead is None else self.lead

    def by_row(self, low: Tensor, table: Tensor) -> Tensor:
        """Return `low` with its columns multiplied by what a table `[rows, columns]` says."""
        batch, shape = self.batch, [1] * len(self.batch)
        if len(table) > 1:
            shape[self.rows_in] = batch[self.rows_in]
            table = repeated(table, batch[self.rows_in])
        columns = table.shape[1]
        weighed = low.reshape(*batch, columns) * table.view(*shape, columns)
        return weighed.to(low.dtype).view(low.shape)

    def gathered(self, y: Tensor, x: Tensor, pairs: Sequence[Any], As: Any, Bs: Any) -> Any:
        """Return `y` with what each row's only pair adds, where gathering these costs less."""
        return None

    def positions(self) -> int:
        """Return how often the weight's matrix meets a vector of the input; 0 for no sum of it."""
        raise NotImplementedError

    def result(self, y: Tensor) -> Tensor:
        """Return `y` in the shape of the module's output."""
        return y if self.lead is None else shaped(y, (*self.lead, y.shape[-1]))


class LinearRun(_Run):
    """`Linear`, from `[..., in]` to `[..., out]`; also with its weight stored `(in, out)`."""

    forming = 24

    def __init__(self, module: Any, x: Tensor, transposed: bool, in_place: bool) -> None:
        self.transposed, self.in_place = transposed, in_place
        self.x, own = x, module._parameters
        self.bias = own["bias"] if "bias" in own else module.bias  # noqa: SIM401, which reads both
        # As torch does it, which otherwise wouldn't give a fresh delta's output the base's bits.
        if x.dim() > 2 and x.is_contiguous():
            self.lead, self.x = x.shape[:-1], x.flatten(0, -2)  # [tokens, in]

    def positions(self) -> int:
        """Return the number of tokens, as far as torch computes alike for any weight."""
        return self.x.shape[0] if self.x.dim() == 2 else 0

    def base(self, weight: Tensor) -> Tensor:
        """Return `[tokens, out]`."""
        self.shape = weight.shape
        return F.linear(self.x, weight.t() if self.transposed else weight, self.bias)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return what the layer makes of an input by a weight, without its bias."""
        return F.linear(x, weight.t() if self.transposed else weight)

    def down(self, x: Tensor, inner: Tensor) -> Tensor:
        """Return `[tokens, rank]`."""
        return F.linear(x, inner if inner.dtype == x.dtype else inner.to(x.dtype))

    def gathered(self, y: Tensor, x: Tensor, pairs: Sequence[Any], As: Any, Bs: Any) -> Any:
        """Return `y` with what each row's only pair adds, where gathering these costs less.

        A product with all factors costs each token the ranks of the other pairs; a copy of factors
        costs a row about what `COPY` tokens do.
        """
        alike = len({A.shape for A in As}) == 1 and not self.rows_in and self.x.dim() == 2
        tokens = self.x.shape[0] // self.routing.rows
        choices = self.routing.choices if alike and tokens * (len(As) - 1) >= COPY else None
        place = {self.routing.columns[pair]: index for index, pair in enumerate(pairs)}
        if choices is None or len(place) < len(pairs):
            return None
        own = self.routing.on(x.device, [place.get(c, 0) for c, _ in choices])
        numbers = [strength * (c in place) for c, strength in choices]
        dtype = torch.promote_types(x.dtype, torch.float32)
        strengths = self.routing.on(x.device, numbers, dtype)
        factors = zip(*map(self.factors, As, Bs), strict=True)
        inner, outer = (torch.stack(each).index_select(0, own).to(x.dtype) for each in factors)
        low = torch.bmm(x.view(len(own), -1, x.shape[1]), inner.mT)  # [rows, tokens, rank]
        low = (low * strengths[:, None, None]).to(y.dtype)
        rest = y.view(len(own), -1, y.shape[1]), low, outer.to(y.dtype)
        if self.in_place and not torch.is_grad_enabled():  # autograd copies what a view changes
            rest[0].baddbmm_(*rest[1:])
            return y
        return shaped(torch.baddbmm(*rest), y.shape)


class OwnRun(LinearRun):
    """A linear layer whose own kernel alone can compute with its weight while that is packed."""

    def __init__(self, module: Any, x: Tensor, transposed: bool, in_place: bool) -> None:
        super().__init__(module, x, transposed, in_place)
        self.module, self.given = module, x

    def base(self, weight: Tensor) -> Tensor:
        """Return `[tokens, out]`."""
        if not is_packed(weight):
            return super().base(weight)
        self.shape = logical(weight).shape
        with as_beneath(self.module, self.given):
            y: Tensor = type_before(self.module).forward(self.module, self.given)
        return y if self.lead is None else y.flatten(0, -2)


class ConvolutionRun(_Run):
    """An ungrouped `Conv1d/2d/3d`: `rank` channels by the same convolution, then a product."""

    narrowest = 16
    forming = 128

    def __init__(self, module: Any, x: Tensor, transposed: bool, in_place: bool) -> None:
        self.transposed, self.in_place = transposed, in_place
        self.module, self.padding, self.bias = module, module.padding, module.bias
        if module.padding_mode != "zeros":
            x = F.pad(x, module._reversed_padding_repeated_twice, module.padding_mode)
            self.padding = 0
        self.x = x  # [batch, in, *sizes], or without a batch

    def positions(self) -> int:
        """Return about how many pixels the output has."""
        per_pixel: int = self.module.in_channels * math.prod(self.module.stride)
        return self.x.numel() // per_pixel

    def base(self, weight: Tensor) -> Tensor:
        """Return `[batch, out, *sizes]`."""
        self.shape = weight.shape
        return self._convolve(self.x, weight, self.bias)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return what the layer makes of an input by a weight, without its bias."""
        return self._convolve(x, weight, None)

    def across(self, values: Tensor) -> Tensor:
        """Return `[out, *ones]`."""
        return values.view(-1, *[1] * len(self.module.kernel_size))

    def factors(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Return both as they are, `[rank, in * kernel]` and `[out, rank]`."""
        return A, B

    def down(self, x: Tensor, inner: Tensor) -> Tensor:
        """Return `[batch, rank, *sizes]`."""
        kernel = inner.to(x.dtype).view(-1, self.module.in_channels, *self.module.kernel_size)
        return self._convolve(x, kernel, None)

    @property
    def batch(self) -> Sequence[int]:
        """The size of the batch, if there is one."""
        return self.x.shape[: self.x.dim() - len(self.module.kernel_size) - 1]

    def by_row(self, low: Tensor, table: Tensor) -> Tensor:
        """Return `low` with its channels multiplied by what a table `[rows, channels]` says."""
        table = repeated(table, len(low)) if len(table) > 1 else table
        table = table.view(*table.shape, *[1] * len(self.module.kernel_size))
        return (low * (table if self.batch else table[0])).to(low.dtype)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        convolve = getattr(F, f"conv{weight.dim() - 2}d")
        module = self.module
        y: Tensor = convolve(x, weight, bias, module.stride, self.padding, module.dilation)
        return y

    def up(self, y: Tensor, low: Tensor, outer: Tensor, scale: float) -> Tensor:
        """Return `y + outer low * scale` over the channels."""
        B, sizes = outer.to(y.dtype), len(self.module.kernel_size)
        if not y.is_contiguous():  # channels last
            y, low = y.movedim(-sizes - 1, -1), low.movedim(-sizes - 1, -1)
            return plus(y, low, B.t(), scale, self.in_place).movedim(-1, -sizes - 1)
        flat, low = y.flatten(-sizes), low.flatten(-sizes)
        batched = flat.dim() == 3
        B = B.expand(y.shape[0], -1, -1) if batched else B
        if self.in_place and not torch.is_grad_enabled():  # autograd copies what a view changes
            (flat.baddbmm_ if batched else flat.addmm_)(B, low, alpha=scale)
            return y
        add = torch.baddbmm if batched else torch.addmm
        return shaped(add(flat, B, low, alpha=scale), y.shape)


class EmbeddingRun(_Run):
    """`Embedding`, from `[...]` to `[..., width]`; the padding row gets no gradient."""

    def __init__(self, module: Any, x: Tensor, transposed: bool, in_place: bool) -> None:
        self.transposed, self.in_place = transposed, in_place
        self.lead, self.pad = x.shape, module.padding_idx
        if self.pad is not None and self.pad < 0:
            self.pad += module.num_embeddings
        self.x = x.reshape(-1)  # [lookups]

    def base(self, weight: Tensor) -> Tensor:
        """Return `[lookups, width]`."""
        self.shape = weight.shape
        return F.embedding(self.x, weight, self.pad)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return the same of a weight, for the lookups `x`."""
        return F.embedding(x, weight, self.pad)

    def across(self, values: Tensor) -> Tensor:
        """Return `[width]`, or `[lookups, width]`, to which padding gives no gradient."""
        if self.pad is None or not values.requires_grad:
            return values
        return torch.where((self.x == self.pad).unsqueeze(1), values.detach(), values)

    def by_row(self, low: Tensor, table: Tensor) -> Tensor:
        """Return the same as of any layer; padding gives no gradient."""
        return self.across(super().by_row(low, table))

    def factors(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Return `[rows, rank]` and `[rank, width]`."""
        return B, A

    def down(self, x: Tensor, inner: Tensor) -> Tensor:
        """Return `[lookups, rank]`."""
        return F.embedding(x, inner, self.pad)

    def up(self, y: Tensor, low: Tensor, outer: Tensor, scale: float) -> Tensor:
        """Return `y + low outer * scale`, in the lookup's dtype, which autocast leaves alone."""
        if autocasts(y):
            with torch.autocast(y.device.type, enabled=False):
                return self.up(y, low, outer, scale)
        if self.pad is not None:
            # Padding's own part in columns apart, past which no gradient flows.
            padded = (self.x == self.pad).unsqueeze(1)
            own = low.detach().masked_fill(~padded, 0)
            low = torch.cat([low.masked_fill(padded, 0), own], 1)  # [lookups, 2 rank]
            outer = torch.cat([outer, outer.detach()])
        return plus(y, low.to(y.dtype), outer, scale, self.in_place)


_precision = getattr(torch._C, "_get_fp32_precision_getter", None)  # from torch 2.9 on


def is_exact(x: Tensor, weight: Tensor) -> bool:
    """Say whether a product rounds a weight no further, which would lose a small update in it."""
    if not weight.is_cpu or x.dtype != weight.dtype or torch.is_autocast_enabled("cpu"):
        return False
    if weight.dtype != torch.float32:
        return weight.dtype == torch.float64
    if _precision is None:
        return torch.get_float32_matmul_precision() == "highest"
    matmul, convolution = _precision("mkldnn", "matmul"), _precision("mkldnn", "conv")
    return {matmul, convolution} <= {"none", "ieee"}


def is_unseen(weight: Tensor) -> bool:
    """Say whether no trace, transform or mode sees what is made of a weight change in place."""
    if is_traced() or type(weight) not in PLAIN:
        return False
    return not (torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack())


def repeated(table: Tensor, size: int) -> Tensor:
    """Repeat each row of a table as often as a batch does."""
    return table if size == len(table) else table.repeat_interleave(size // len(table), 0)


def autocasts(tensor: Tensor) -> bool:
    """Say whether autocast is on where a tensor is."""
    return not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)


def plus(y: Tensor, low: Tensor, up: Tensor, scale: float, in_place: bool) -> Tensor:
    """Add `low @ up * scale` over the last dimension, in one pass over `y`."""
    if up.dtype != y.dtype:  # asking costs less than converting to the same
        up = up.to(y.dtype)
    if y.dim() != 2:
        rows, low = y.reshape(-1, y.shape[-1]), low.reshape(-1, low.shape[-1])
        return shaped(torch.addmm(rows, low, up, alpha=scale), y.shape)
    if not in_place:
        return torch.addmm(y, low, up, alpha=scale)
    if up.requires_grad and up.shape[0] < 16 and y.shape[0] > 64 and y.is_cpu:
        # For its gradient: on a transpose as narrow as this, BLAS takes up to three times as long.
        up = up.contiguous()
    return y.addmm_(low, up, alpha=scale)


def shaped(y: Tensor, shape: Sequence[int]) -> Tensor:
    """Give a result its shape without making it a view, which could not be changed in place."""
    if torch._C._get_tracing_state():  # by jit, which would take the shape for a constant
        return y.view(*shape)
    result: Tensor = torch.ops.aten._unsafe_view(y, shape)
    return result
