"""The arithmetic of updates: sums of products, products of less rank, and what they miss."""

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .deltas.numbers import real
from .errors import LoRAError

Rank: TypeAlias = int | float
"""A rank, or a share below 1 of the squared singular values' sum, for the least that holds it."""

LARGE = 512
"""The smaller side from which a matrix is decomposed by its range, where a few values will do."""


class Product(NamedTuple):
    """`B @ A` in the place of a matrix, and the norm of the difference as a share of its norm."""

    A: Tensor  # [*batch, rank, in]
    B: Tensor  # [*batch, out, rank]
    error: float = 0.0


def check_rank_or_share(rank: Any) -> Rank:
    """Return `rank` as a positive integer, or a share between 0 and 1, or raise."""
    whole, value = isinstance(rank, Integral), real(rank)
    if not (value >= 1 if whole else 0 < value < 1):
        rule = "a positive integer, or a share of the squared norm such as 0.95"
        raise LoRAError(f"rank must be {rule}, got {rank!r:.40}")
    return int(rank) if whole else value


def summed(pairs: Sequence[tuple[Tensor, Tensor, float]]) -> Product:
    """Return `sum(B @ A * scale)` as one product, exactly: ranks add up."""
    As, Bs = zip(*((A, B * scale) for A, B, scale in pairs), strict=True)
    return Product(torch.cat(As, -2), torch.cat(Bs, -1))


def recompressed(A: Tensor, B: Tensor, rank: Rank) -> Product:
    """Return the product nearest to `B @ A` of a rank, by QR and a small SVD, in float64.

    `B = Q_B R_B`, `A^T = Q_A R_A`, `U S V^T = svd(R_B R_A^T)`; of these the largest are kept.

    Source:
        Eckart and Young, "The approximation of one matrix by another of lower rank", 1936.
    """
    Q_B, R_B = torch.linalg.qr(B.double())
    Q_A, R_A = torch.linalg.qr(A.double().mT)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    return _truncated(Q_B @ U, S, Vh @ Q_A.mT, 0.0, rank)


def factorised(matrix: Tensor, rank: Rank) -> Product:
    """Return the product nearest to a matrix of a rank; of a large one by its range, within 1 %.

    Source:
        Halko, Martinsson and Tropp, "Finding structure with randomness", SIAM Review 53 (2011),
        algorithms 4.4 and 5.1.
    """
    total, side = matrix.double().square().sum().item(), min(matrix.shape[-2:])
    count = rank + rank // 4 + 8 if isinstance(rank, int) else side // 32
    while side >= LARGE and 4 * count <= side:
        Q = _range_of(matrix, count)
        U, S, Vh = torch.linalg.svd(Q.mT @ matrix, full_matrices=False)
        held = S.double().square().sum().item()
        if isinstance(rank, int) or held >= rank * total:
            return _truncated(Q @ U, S, Vh, max(0.0, total - held), rank)
        count *= 2
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return _truncated(U, S, Vh, 0.0, rank)


def _range_of(matrix: Tensor, count: int) -> Tensor:
    """Return an orthonormal basis of what a matrix's largest singular values reach."""
    shape, fixed = (*matrix.shape[:-2], matrix.shape[-1], count), torch.Generator().manual_seed(0)
    draws = torch.randn(shape, generator=fixed, dtype=matrix.dtype)
    Q: Tensor = torch.linalg.qr(matrix @ draws.to(matrix.device))[0]
    for _ in range(4):
        Q = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ Q)[0])[0]
    return Q


def _truncated(U: Tensor, S: Tensor, Vh: Tensor, rest: float, rank: Rank) -> Product:
    """Keep the largest of singular values, in front of those whose squares add up to `rest`."""
    squares = S.double().square()
    squares = squares.flatten(0, -2).sum(0) if squares.ndim > 1 else squares
    total = squares.sum().item() + rest
    if isinstance(rank, float):
        rank = 1 + int((squares.cumsum(0) < rank * total).sum())
    root = S[..., :rank].sqrt()
    A, B = root.unsqueeze(-1) * Vh[..., :rank, :], U[..., :rank] * root.unsqueeze(-2)
    missed = math.sqrt((squares[rank:].sum().item() + rest) / (total or 1.0))
    return Product(A.contiguous(), B.contiguous(), missed)


def ties(updates: Sequence[Tensor], strengths: Sequence[float], density: float) -> Tensor:
    """Trim each update to its largest entries, elect signs, and average those that agree.

    Each keeps a share `density` of its entries. An entry's sign is that of the weighted sum, and
    its value the mean, weighted by the strengths' sizes, of those that have this sign.

    Source:
        Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", arXiv:2306.01708,
        section 3.2 and algorithm 1.
    """
    size = updates[0].numel()
    drop = size - max(1, math.ceil(density * size))
    total = torch.zeros_like(updates[0])
    parts = []
    for update, strength in zip(updates, strengths, strict=True):
        sizes = update.abs()
        bound = sizes.flatten().kthvalue(drop).values if drop else -1.0
        parts.append(torch.where(sizes > bound, update, 0) * strength)
        total += parts[-1]
    kept, share = torch.zeros_like(total), torch.zeros_like(total)
    for part, strength in zip(parts, strengths, strict=True):
        agrees = part * total > 0
        kept += torch.where(agrees, part, 0)
        share += agrees * abs(strength)
    return kept / share.where(share > 0, 1)


def dare(
    updates: Sequence[Tensor],
    strengths: Sequence[float],
    density: float,
    generator: torch.Generator | None,
) -> Tensor:
    """Drop each entry of each update with probability `1 - density`, scale up the rest, and add.

    Source:
        Yu et al., "Language Models are Super Mario", arXiv:2311.03099, section 3.2.
    """
    total = torch.zeros_like(updates[0])
    for update, strength in zip(updates, strengths, strict=True):
        draws = torch.rand(update.shape, generator=generator).to(update.device)
        total += (draws < density) * update * (strength / density)
    return total
