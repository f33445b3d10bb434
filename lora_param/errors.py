"""What `lora_param` raises, and how it says it: where, the rule, what it got, the fix."""

import difflib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

Verb = TypeVar("Verb", bound=Callable[..., Any])


class LoRAError(ValueError):
    """A call that can't be carried out; the model is as it was before the call."""


class TargetError(LoRAError):
    """A target, exclusion or pattern matches nothing, or a weight that can't be adapted."""


class AdapterError(LoRAError):
    """An adapter is missing, is there already, or is in the wrong state for the call."""


class StateDictError(LoRAError):
    """A state dict has missing, unexpected or misshapen entries."""


class FrozenError(LoRAError, AssertionError):
    """An original that had to stay as it was has changed."""


class FileError(LoRAError):
    """A file is damaged, of an unknown format, or holds what doesn't fit the model."""


def shortened(items: Sequence[str], most: int = 8, by: str = "; ") -> str:
    """Join the first few of many, and say how many more there are."""
    more = f"{by}and {len(items) - most:,} more" if len(items) > most else ""
    return by.join(items[:most]) + more


WORDS = {
    "r": "rank",
    "target_parameters": "target",
    "rank_pattern": 'give rank a mapping, such as {"q_proj": 8, "*": 4}',
    "alpha_pattern": 'give alpha a mapping, such as {"q_proj": 8, "*": 4}',
    "init_lora_weights": 'write init="kaiming", which is the default, or another name of an init',
    "modules_to_save": "train",
    "bias": 'leave "none" out; for biases write train="*.bias"',
    "layers_to_transform": 'name the layers in target, such as "layers.[0-3].*.q_proj"',
    "use_rslora": 'write scaling="rslora"',
    "use_dora": 'write kind="dora"',
    "peft_config": "write rank=, alpha=, dropout= and target= as it has them",
    "all-linear": "leave it out: by default every such layer is adapted",
}
"""PEFT's options that aren't like ours: our word for the same value, or what to do instead."""


def in_our_words(verb: Verb) -> Verb:
    """Make a verb refuse what it doesn't take, by position or by name, and say what to write."""
    names = list(inspect.signature(verb).parameters)

    @functools.wraps(verb)
    def call(*args: Any, **options: Any) -> Any:
        if len(args) > 1 or not options.keys() <= set(names):
            fixes = "; ".join(_fixes(args[1:], options, names))
            raise LoRAError(f"{verb.__name__} takes a model, and its options by name; {fixes}")
        return verb(*args, **options)

    return cast("Verb", call)


def _fixes(args: Sequence[Any], options: Mapping[str, Any], names: Sequence[str]) -> Iterator[str]:
    for value in args:
        guess = f"write perhaps {'rank' if isinstance(value, int) else 'target'}={value!r:.60}"
        fix = WORDS["peft_config"] if hasattr(value, "peft_type") else guess
        yield f"for {value!r:.60} {fix}"
    for word in [word for word in options if word not in names]:
        value, near = options[word], difflib.get_close_matches(word, names, 1)
        ours = WORDS.get(word) or "".join(near) or f"choose one of {', '.join(names[1:])}"
        fix = f"write {ours}={value!r:.60}" if ours in names else ours
        if isinstance(value, str) and value == "all-linear":
            fix = WORDS[value]
        yield f"for {word}={value!r:.60} {fix}"
