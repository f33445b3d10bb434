"""PEFT's `adapter_config.json`: which fields decide the numbers, and which can't be honoured."""

import functools
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from ...deltas.numbers import Scaling
from ...errors import FileError
from ..tensors import Config, read_json

NUMBERS = {
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_parameters"),
    "lora_dropout",
}
BESIDE = {"lora_bias", "modules_to_save", "trainable_token_indices", "use_dora"}
"""Fields that announce tensors beside the factors."""

NEUTRAL = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "runtime_config", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "fan_in_fan_out", "megatron_core", "loftq_config"),
    *("eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
}
"""Fields that leave a trained adapter's numbers alone. Every field of no set has to be off."""
OFF = {
    "peft_type": ("LORA",),
    "bias": ("none", "all", "lora_only"),
    # The other initialisations change the base.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica"),
}
"""What counts as off beside what is false or `None`."""

REASONS = {
    "init_lora_weights": ", which changes the base: in PEFT, give save_pretrained its "
    "path_initial_model_for_weight_conversion, and the folder fits the base as it was",
}
"""Why a field can't be honoured, and what to do."""

PATTERN = re.compile(r"([^\\()\[\]{}*+?.]|\\\W|\.\*?|(\\d|\[0-9\])\+?|\((\?:)?[\w|]+\))*")
"""What a pattern may be made of: text, `.`, `.*`, digits, and a choice of words."""

REPETITION = re.compile(r"[*+]|\)(?!\\\.|\$?$)")
"""What of it can match in several ways: not words in front of a dot or at the end."""


def load_config(path: Path) -> Config:
    """Parse a config and check it, or raise a `FileError`."""
    if not path.exists():
        raise FileError(f"{path} isn't there; PEFT's tensors need it beside them")
    config = read_json(path)
    if "peft_type" not in config:
        raise FileError(f"{path}: no config of PEFT's")
    if complaints := list(unsupported_fields(config, BESIDE)):
        raise FileError(f"{path}: not supported: {', '.join(complaints)}")
    return config


def unsupported_fields(config: Config, beside: Collection[str] = ()) -> Iterator[str]:
    """Yield each field that changes the numbers in a way that can't be honoured.

    Those of `beside` can.
    """
    for field, value in config.items():
        off = not value or (field in OFF and value in OFF[field])
        if not off and field not in NUMBERS | NEUTRAL | {*beside}:
            yield f"{field}={value!r:.60}{REASONS.get(field, '')}"
    ranks, alphas = _patterns(config, "rank_pattern"), _patterns(config, "alpha_pattern")
    for rank in (config.get("r", 8), *ranks.values()):
        if type(rank) is not int:
            yield f"a rank of {rank!r:.60}"
    for alpha in (config.get("lora_alpha", 8), *alphas.values()):
        if type(alpha) not in (int, float) or not -1e300 < alpha < 1e300:
            yield f"an alpha of {alpha!r:.60}"
    for pattern in {**ranks, **alphas}:
        if not PATTERN.fullmatch(pattern) or len(REPETITION.findall(pattern)) > 3:
            yield f"the pattern {pattern!r:.60}"
    dropout = config.get("lora_dropout") or 0
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        yield f"lora_dropout={dropout!r:.60}"
    for field in ("target_parameters", "modules_to_save"):
        names = config.get(field) or []
        if not isinstance(names, list) or not all(each and type(each) is str for each in names):
            yield f"{field}={names!r:.60}"


def costly_patterns(config: Config, names: Collection[str]) -> Iterator[str]:
    """Yield the patterns that could take minutes to match, by backtracking in long names."""
    for pattern in {**_patterns(config, "rank_pattern"), **_patterns(config, "alpha_pattern")}:
        repetitions = len(REPETITION.findall(pattern))
        if sum(len(name) ** (repetitions + 1) for name in names) > 10**10:
            yield f"the pattern {pattern!r:.60} has too many repetitions for names so many and long"


def rank_and_alpha(config: Config, key: str) -> tuple[int, float]:
    """Return the rank and the alpha of a path or parameter."""
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    # As in PEFT, the first pattern that matches the key, or its end after a dot, decides.
    ranks, alphas = _patterns(config, "rank_pattern"), _patterns(config, "alpha_pattern")
    rank = next((ranks[each] for each in ranks if _ending(each).match(key)), rank)
    alpha = next((alphas[each] for each in alphas if _ending(each).match(key)), alpha)
    return rank, float(alpha)


def dropout(config: Config) -> float:
    """Return the share of each layer's input that is dropped."""
    return float(config.get("lora_dropout") or 0)


def scaling(config: Config) -> Scaling:
    """Return what alpha is divided by, in our word for it."""
    return "rslora" if config.get("use_rslora") else "lora"


@functools.lru_cache(maxsize=4096)  # re itself keeps 512
def _ending(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


def _patterns(config: Config, field: str) -> Config:
    value = config.get(field) or {}
    return value if isinstance(value, dict) else {"": value}
