"""LoRA for any parameter of any `torch.nn.Module`: `W` becomes `W + (B @ A) * alpha / rank`.

>>> import torch
>>> from lora_param import lora_parameters, register_lora, remove_lora
>>> model = torch.nn.LSTM(8, 16)
>>> register_lora(model, rank=4)
['weight_ih_l0', 'weight_hh_l0']
>>> optimizer = torch.optim.AdamW(lora_parameters(model))
>>> remove_lora(model)

Other docstrings' examples take for granted `import torch`, `from lora_param import *`, and that
`model` is `torch.nn.Linear(3, 2)` after `register_lora(model, rank=1)`.
"""

from .combine import Fit, combine_lora, resize_lora
from .deltas import LoRAParametrization
from .errors import AdapterError, FileError, FrozenError, LoRAError, StateDictError, TargetError
from .frozen import assert_frozen, base_frozen, fingerprint
from .io import extract_lora, load_lora, save_lora
from .merge import lora_merged, merge_lora
from .optim import lora_parameter_groups
from .register import register_lora, remove_lora
from .route import lora_routed
from .select import disable_lora, enable_lora, lora_disabled, lora_selected, select_lora
from .state import (
    base_state_dict,
    load_lora_state_dict,
    lora_parameters,
    lora_state_dict,
    named_lora_parameters,
)
from .summary import AdapterSummary, LoRASummary, WeightSummary, lora_summary

__version__ = "0.1.0"

__all__ = [
    "AdapterError",
    "AdapterSummary",
    "FileError",
    "Fit",
    "FrozenError",
    "LoRAError",
    "LoRAParametrization",
    "LoRASummary",
    "StateDictError",
    "TargetError",
    "WeightSummary",
    "assert_frozen",
    "base_frozen",
    "base_state_dict",
    "combine_lora",
    "disable_lora",
    "enable_lora",
    "extract_lora",
    "fingerprint",
    "load_lora",
    "load_lora_state_dict",
    "lora_disabled",
    "lora_merged",
    "lora_parameter_groups",
    "lora_parameters",
    "lora_routed",
    "lora_selected",
    "lora_state_dict",
    "lora_summary",
    "merge_lora",
    "named_lora_parameters",
    "register_lora",
    "remove_lora",
    "resize_lora",
    "save_lora",
    "select_lora",
]
