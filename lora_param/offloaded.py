"""Tensors that accelerate has put away, and brings in for a call of the module that has them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import LoRAError


def is_hooked(module: nn.Module) -> bool:
    """Say whether accelerate has replaced the forward of a module's class, and nobody else."""
    marks, behind = module.__dict__, getattr(module.__dict__.get("_old_forward"), "__func__", None)
    maker = getattr(getattr(marks.get("forward"), "func", None), "__module__", "")
    aligns = type(marks.get("_hf_hook")).__name__ == "AlignDevicesHook"
    return aligns and maker == "accelerate.hooks" and behind is type(module).forward


@contextmanager
def brought_in(modules: Iterable[Any]) -> Iterator[None]:
    """Have the tensors of hooked modules here in a block, and the modules as if not hooked."""
    with ExitStack() as block:
        for module in modules:
            module._hf_hook.pre_forward(module)
            train_nothing(module)
            block.callback(module._hf_hook.post_forward, module, None)
            block.callback(module.__dict__.__setitem__, "forward", module.__dict__.pop("forward"))
        yield


def train_nothing(module: nn.Module) -> None:
    """Let a backward raise that would give gradients to copies, which are here for one call."""
    if torch.is_grad_enabled() and getattr(module.__dict__.get("_hf_hook"), "offload", False):
        for parameter in module._parameters.values():
            if parameter is not None and parameter.requires_grad:
                parameter.register_hook(_refuse)  # type: ignore[no-untyped-call]


def _refuse(gradient: Tensor) -> None:
    reason = "accelerate has offloaded an adapter, and its gradients would be lost with the copies"
    fix = "call accelerate.hooks.remove_hook_from_module on each lora_param.deltas.Delta of it"
    raise LoRAError(f"{reason} that it brings in; to train it on an offloaded base {fix}")
