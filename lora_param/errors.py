"""What `lora_param` raises: where, the rule, what it got, the fix."""

from __future__ import annotations


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
