"""Tables as text."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Align a table's columns: the first to the left, the others to the right.

    Args:
        rows: Its cells, as many in each row.

    Returns:
        The table, without a final line break.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def numbers(matrix: Tensor) -> str:
    """Write a small matrix with two decimals, a row a line."""
    return "\n".join(" ".join(f"{value:6.2f}" for value in row) for row in matrix.tolist())
