"""The kinds of deltas: a row each in one table."""

from .dense import DenseDelta
from .dora import DoRA
from .lora import LoRAParametrization
from .pair import Pair
from .protocol import Delta
from .statistics import StatisticsDelta

KINDS: dict[str, type[Delta]] = {
    each.kind: each for each in (LoRAParametrization, DoRA, DenseDelta, StatisticsDelta)
}
"""By what `register_lora(kind=...)`, state dicts and files call them."""

__all__ = ["KINDS", "Delta", "DenseDelta", "DoRA", "LoRAParametrization", "Pair", "StatisticsDelta"]
