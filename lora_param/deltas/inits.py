"""Where a pair of factors starts: from a draw alone, or from the weight that it adapts."""

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ..errors import LoRAError
from ..lowrank import factorised

Factors: TypeAlias = tuple[Tensor, Tensor]
Start: TypeAlias = Callable[[Tensor, int, float, "torch.Generator | None"], Factors]
"""`(matrix view, rank, scale, generator)` to `(B0, A0)`."""

Init: TypeAlias = Literal["kaiming", "gaussian", "orthogonal", "pissa", "milora", "olora"] | Start


def kaiming(A: Tensor, B: Tensor, generator: torch.Generator | None) -> None:
    """Draw `A` as torch draws a Linear's weight: uniform in ±1/sqrt(fan_in)."""
    bound = A.shape[-1] ** -0.5
    A.uniform_(-bound, bound, generator=generator)


def gaussian(A: Tensor, B: Tensor, generator: torch.Generator | None) -> None:
    """Draw `A` with a standard deviation of 1/rank."""
    A.normal_(0, 1 / A.shape[-2], generator=generator)


def orthogonal(A: Tensor, B: Tensor, generator: torch.Generator | None) -> None:
    """Draw `A` in one half of the rank and `B` in the other: both learn, and `B A` is zero.

    Source: datta0, "Rethinking LoRA initialisation", whose factors are these in a rotated basis, in
    which their product is zero but for rounding.
    """
    half = A.shape[-2] // 2
    A[..., half:, :].normal_(0, 0.1, generator=generator)
    B[..., :half].normal_(0, 0.1, generator=generator)


DRAWS = {"kaiming": kaiming, "gaussian": gaussian, "orthogonal": orthogonal}
"""By name, what fills a pair of zeros so that its product is zero."""


def pissa(W: Tensor, rank: int, scale: float, generator: torch.Generator | None) -> Factors:
    """Return `U sqrt(S / s), sqrt(S / s) V^T` of the largest singular values.

    Source: Meng et al., "PiSSA", arXiv:2404.02948, section 3.
    """
    root, product = abs(scale) ** 0.5, factorised(W, rank)
    return product.B / root, product.A / root


def milora(W: Tensor, rank: int, scale: float, generator: torch.Generator | None) -> Factors:
    """Return the same of the smallest singular values.

    Source: Wang et al., "MiLoRA", arXiv:2406.09044, section 3.
    """
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    root = (S[..., -rank:] / abs(scale)).sqrt()
    return U[..., -rank:] * root[..., None, :], root[..., None] * Vh[..., -rank:, :]


def olora(W: Tensor, rank: int, scale: float, generator: torch.Generator | None) -> Factors:
    """Return the first columns of Q and rows of R of `W = Q R`, over `sqrt(s)` each.

    Source: Büyükakyüz, "OLoRA", arXiv:2406.01775, section 3.
    """
    Q, R = torch.linalg.qr(W)
    root = abs(scale) ** -0.5 if scale else torch.inf
    return Q[..., :rank] * root, R[..., :rank, :] * root


STARTS: dict[str, Start] = {"pissa": pissa, "milora": milora, "olora": olora}
"""By name, what starts from the weight."""


@torch.no_grad()
def factors_at_start(
    init: str | Start,
    weight: Tensor,
    view: tuple[int, ...],
    rank: int,
    scale: float,
    generator: torch.Generator | None,
    transposed: bool,
) -> Factors:
    """Return `B0` and `A0` of a weight's matrix view, computed in float32 at least.

    What has a name sees outputs by inputs, also of a weight that is stored `transposed`.
    """
    named, said = STARTS[init] if isinstance(init, str) else None, f"init={init!r:.60}"
    if weight.is_meta:
        raise LoRAError(f"{said} starts from the weight's values, and it is on meta")
    W = weight.detach().reshape(view)
    # A copy, because what a caller gives may work in place.
    W = W.to(torch.promote_types(W.dtype, torch.float32), copy=True)
    with torch.autocast(W.device.type, enabled=False):
        try:
            if named and transposed:
                A, B = (each.mT for each in named(W.mT, rank, scale, generator))
            else:
                B, A = (named or init)(W, rank, scale, generator)  # type: ignore[operator]
        except Exception as error:  # of a caller's function, any
            raise LoRAError(f"{said} fails on this weight: {error!s:.200}") from error
    wanted = (*view[:-1], rank), (*view[:-2], rank, view[-1])
    got = tuple(tuple(each.shape) if isinstance(each, Tensor) else None for each in (B, A))
    if got != wanted:
        raise LoRAError(f"init must return B0 and A0 of {wanted}, got {got}")
    if not (B.isfinite().all() and A.isfinite().all()):
        raise LoRAError(f"{said} gives factors that aren't finite, at a scale of {scale:g}")
    return B, A
