"""Claims that an experiment makes, and holds against what it finds: tensors bit by bit.

`torch.equal` compares values. To it 0 and -0 are the same, and so are 0 and a denormal number in a
process that flushes those. Bits are bits either way.
"""

from __future__ import annotations

import torch
from torch import Tensor


class BrokenClaimError(Exception):
    """Something that an experiment claims does not hold."""


def claim(holds: bool, text: str) -> None:
    """Insist that something holds.

    Args:
        holds: Whether it does.
        text: The claim, for the error.

    Raises:
        BrokenClaimError: It doesn't.
    """
    if not holds:
        raise BrokenClaimError(f"broken claim: {text}")


def show(holds: bool, text: str) -> None:
    """Insist that something holds, and say so.

    Args:
        holds: Whether it does.
        text: The claim.
    """
    claim(holds, text)
    print(f"  it holds: {text}", flush=True)


def same_bits(found: Tensor, expected: Tensor) -> bool:
    """Compare two tensors bit by bit.

    Args:
        found: A tensor.
        expected: Another one, on the same device.

    Returns:
        Whether they have the same shape, dtype and bits.
    """
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    bits = (each.detach().reshape(-1).view(torch.uint8) for each in (found, expected))
    return torch.equal(*bits)
