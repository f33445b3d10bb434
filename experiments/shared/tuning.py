"""A search for a learning rate that doesn't stop at an end of its grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def best_rate(
    rates: Sequence[float], test: Callable[[float], float]
) -> tuple[float, dict[float, float]]:
    """Find the best learning rate: of some, and further out while the best is at an end.

    Args:
        rates: Those to begin with, in order; a single one is taken as it is.
        test: Trains with a learning rate, and returns the accuracy.

    Returns:
        The best, the first that was tried of several, and all accuracies by learning rate.

    Example:
        >>> best_rate((1, 2, 4), lambda rate: -abs(rate - 9))
        (8.0, {1: -8, 2: -7, 4: -5, 8.0: -1.0, 16.0: -7.0})
    """
    tried = {rate: test(rate) for rate in rates}
    while True:
        best, order = max(tried, key=lambda rate: tried[rate]), sorted(tried)
        if len(order) == 1 or best not in (order[0], order[-1]):
            return best, {rate: tried[rate] for rate in order}
        inner = order[1] if best == order[0] else order[-2]
        further = float(f"{best * best / inner:.1e}")  # the same step on
        tried[further] = test(further)
