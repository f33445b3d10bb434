"""Where the rows of a routed batch are in a module's input: known beyond doubt, or refused."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .errors import LoRAError


class Place(NamedTuple):
    """Which dimension of a module's input has the rows, `None` for none, and who says so."""

    dim: int | None
    said: int  # 0: nobody; 1: a flag, or `dim=` for all; 2: `dims=`, for this module
    path: str = ""


class Places:
    """Where each module has the rows of one batch; `own` are the model's tensors, without rows.

    What has been seen meanwhile says more: `tokens`, how many there were in inputs that had the
    rows for sure, and `inside`, the modules below those that ran by groups.
    """

    def __init__(self, rows: int, known: dict[nn.Module, Place], own: set[Any]) -> None:
        self.rows, self.known, self.own = rows, known, own
        self.tokens, self.inside = set[int](), set[nn.Module]()

    def spread(self, module: nn.Module, x: Tensor) -> Tensor:
        """Give an input a copy for each row, in front, where it is said to have no rows."""
        if self.known[module].dim is not None:
            return x
        single = x.dim() > 1 + x.is_floating_point() and len(x) == 1  # a batch of one
        return (x if single else x[None]).expand(self.rows, *x.shape[single:])

    def dim_of(self, module: nn.Module, x: Tensor, candidates: int) -> int:
        """Return which of an input's first dimensions has the rows, or raise where that is a guess.

        As many as the rows are taken for them, and a multiple for neighbours of one row each where
        somebody says so, or another input had the rows before: many tokens to a row then, or any
        input of three dimensions.
        """
        self.check_not_inside(module, module)
        (dim, said, path), shape, n = self.known[module], x.shape, self.rows
        dim, traced = dim or 0, is_traced()
        if not torch.compiler.is_compiling() and _is_mapped(x):
            reason = "vmap hides the rows of a routed batch; route inside of it, or do without it"
            raise self.error(module, reason)
        floats = x.is_floating_point()
        tokens = x.shape[: x.dim() - floats].numel()
        if dim >= candidates or shape[dim] % n:
            doubt = f"dimension {dim} can't hold {n} rows or a multiple of that"
        elif said < 2 and self._may_have_none(module, x, dim, traced):
            others = "they may be positions, queries, or tokens in an expert's order"
            doubt = f"its {shape[dim]} need not be those of {n} rows: {others}"
        elif not said and any(shape[d] == n for d in range(candidates) if d != dim):
            doubt = f"more than one dimension could be that of the {n} rows"
        elif said or shape[dim] == n:
            if not traced:  # where each new number would be another graph
                self.tokens.add(tokens)
            return dim
        elif not traced and floats and (tokens in self.tokens or (self.tokens and x.dim() > 2)):
            return dim
        else:
            doubt = f"no input of {n} rows has come before, for neighbours to be of one row each"
        fix = f'say which it is by dims={{"{path}": ...}}, None if it has no rows'
        reason = f"its input is {tuple(shape)}, and {doubt}; {fix}"
        raise self.error(module, f"{reason}, or dim= for all, or take the adapters off this layer")

    def _may_have_none(self, module: nn.Module, x: Tensor, dim: int, traced: bool) -> bool:
        if x.dim() < 2 or "experts" in self.known[module].path.split("."):
            return True
        # A view of the model's own, unless it is spread over the rows.
        return not traced and (x if x._base is None else x._base) in self.own and x.stride(dim) != 0

    def check_not_inside(self, module: nn.Module, part: nn.Module) -> None:
        """Raise where a module that is called by groups is called by itself, to be recomputed."""
        if part in self.inside and torch._C._current_graph_task_id() >= 0:
            reason = "is in a module that runs by groups of rows, whose parts can't be recomputed"
            raise self.error(module, f"it {reason}; checkpoint the module as a whole")

    def error(self, module: nn.Module, reason: str) -> LoRAError:
        """Return the error of a module, with its path."""
        return LoRAError(f"{self.known[module].path or 'model'}: {reason}")


def is_traced() -> bool:
    """Say whether what runs is being compiled or traced, which nothing must leave a mark in."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def is_captured(tensor: Tensor) -> bool:
    """Say whether a CUDA graph is being captured, which nothing may ask for values."""
    if not tensor.is_cuda or torch.compiler.is_compiling():
        return False
    return torch.cuda.is_current_stream_capturing()


def _is_mapped(x: Tensor) -> bool:
    """Say whether a dimension of a tensor is vmap's."""
    transforms = torch._C._functorch
    while transforms.is_functorch_wrapped_tensor(x):
        if transforms.is_batchedtensor(x):
            return True
        x = transforms.get_unwrapped(x)
    return False
