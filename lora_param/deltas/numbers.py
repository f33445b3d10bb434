"""What a pair's numbers can be: rank, alpha, scaling and dropout."""

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, Literal

from ..errors import LoRAError

Scaling = Literal["lora", "rslora"]

SCALINGS: dict[str, Callable[[int], float]] = {"lora": float, "rslora": math.sqrt}
"""What alpha is divided by, given the rank."""


def check_rank(rank: Any, fan_out: int, fan_in: int) -> int:
    """Return `rank` as an integer that a `(fan_out, fan_in)` matrix can have, or raise."""
    limit = min(fan_out, fan_in)
    whole = type(rank) is int or (isinstance(rank, Integral) and not isinstance(rank, bool))
    number = int(rank) if whole else 0
    if not 1 <= number <= limit:
        fix = "lower the rank" if number > limit else "give an integer from 1 up"
        bounds = f"1 <= rank <= min({fan_out}, {fan_in}) = {limit}"
        raise LoRAError(f"rank must satisfy {bounds}, got {rank!r}; {fix}")
    return number


def check_alpha(alpha: object, rank: int, name: str = "alpha") -> float:
    """Return `alpha` as a finite float, `rank` for `None`, or raise."""
    if alpha is None and name == "alpha":
        return float(rank)
    if not math.isfinite(value := real(alpha)):
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
    if not 0 <= (value := real(dropout)) < 1:
        raise LoRAError(f"dropout must satisfy 0 <= dropout < 1, got {dropout!r}")
    return value


def real(value: Any) -> float:
    """Return a real number as a float, and anything else as NaN."""
    known = isinstance(value, (float, Real)) and not isinstance(value, bool)
    try:
        return float(value) if known else math.nan
    except OverflowError:
        return math.inf
