"""What every file of adapters comes down to, and what a format has to be able to do."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import LoRAError
from ..parametrization import FLOATS, LoRAParametrization, show_dtypes
from ..progress import progress


@dataclass(frozen=True)
class Pair:
    """One weight's update, in the weight's matrix view: its first dimension by all the others.

    Attributes:
        weight: The parameter's full name in the plain model, `"encoder.0.linear1.weight"`.
        lora_A: `[*batch, rank, fan_in]`.
        lora_B: `[*batch, fan_out, rank]`.
        alpha: The scale is `alpha / rank`; an rsLoRA alpha comes multiplied by `sqrt(rank)`.
    """

    weight: str
    lora_A: Tensor
    lora_B: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Columns of `lora_B`."""
        return self.lora_B.shape[-1]

    def within(self, limit: int) -> Pair:
        """Return the same update as a pair whose rank isn't above the weight's smaller side."""
        if self.rank <= limit:
            return self
        tall = self.lora_B.shape[-2] > self.lora_A.shape[-1]
        product = (self.lora_B.double() @ self.lora_A.double()).to(self.lora_A.dtype)
        eye = torch.eye(limit, dtype=product.dtype, device=product.device)
        eye = eye.expand(*product.shape[:-2], limit, limit).contiguous()
        A, B = (eye, product) if tall else (product, eye)
        return replace(self, lora_A=A, lora_B=B, alpha=self.alpha / self.rank * limit)

    def parametrization(
        self, adapter: str = "default", device: torch.device | str | None = None
    ) -> LoRAParametrization:
        """Build the parametrization, with factors of its own, in the file's dtype."""
        *batch, fan_out, _ = self.lora_B.shape
        entry = LoRAParametrization(
            fan_out,
            self.lora_A.shape[-1],
            self.rank,
            self.alpha,
            batch=tuple(batch),
            adapter=adapter,
            device="meta",  # draws nothing
            dtype=self.lora_A.dtype,
        )
        for name in ("lora_A", "lora_B"):
            value = getattr(self, name).detach().to(device, copy=True)
            setattr(entry, name, torch.nn.Parameter(value))
        return entry


@dataclass(frozen=True)
class About:
    """What a file says besides its pairs, as far as its format has a place for it.

    Attributes:
        adapter: The adapter's name.
        model: What the base is called on a hub.
        cls: The base's class.
        base: SHA-256 digests of the base's parameters, as `fingerprint` gives them.
        shapes: Shapes of the base's parameters.
        layers: What is known of the adapted weights' modules, as `skeleton` takes it.
        metadata: Strings of whoever saved it.
    """

    adapter: str = "default"
    model: str = ""
    cls: str = ""
    base: Mapping[str, str] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    layers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def called(self) -> str:
        """What to call the base; empty if that isn't known."""
        return self.model or self.cls


@dataclass(frozen=True)
class Format:
    """One row of the table.

    Attributes:
        name: What `save_lora(..., format=name)` takes.
        recognises: `(path) -> bool`, from names, suffixes and header keys; unpickles nothing.
        read: `(path, model, *, options) -> list[Pair]`. Names are resolved against the model's own
            modules; with `None` for a model, they are what the file has, module type unknown.
            Raises a `FileError` that lists all that is wrong. Shapes are checked by the caller.
        write: `(path, pairs, model, about, *, options) -> None`, or `None` where it isn't written.
        about: `(path) -> About`.
    """

    name: str
    recognises: Callable[[Path], bool]
    read: Callable[..., list[Pair]]
    write: Callable[..., None] | None = None
    about: Callable[[Path], About] = lambda path: About()


def faults(pairs: Sequence[Pair]) -> Iterator[str]:
    """Yield what is wrong with each pair in itself."""
    if not pairs:
        yield "there is no adapter in it"
    for name, count in Counter(pair.weight for pair in pairs).items():
        if count > 1:
            yield f"{name}: there are {count} updates of it"
    for pair in progress(pairs, "checking the factors"):
        A, B = pair.lora_A, pair.lora_B
        if A.dtype not in FLOATS or A.dtype != B.dtype:
            kinds = show_dtypes(A.dtype, B.dtype)
            yield f"{pair.weight}: factors must share one of {show_dtypes(*FLOATS)}, got {kinds}"
        elif min(A.ndim, B.ndim) < 2 or A.shape[:-2] != B.shape[:-2] or A.shape[-2] != pair.rank:
            yield f"{pair.weight}: {tuple(A.shape)} and {tuple(B.shape)} are no pair"
        elif not A.numel() * B.numel() or A.is_meta or B.is_meta:
            yield f"{pair.weight}: the factors have no values"
        elif not abs(pair.alpha) <= sys.float_info.max or not (
            A.isfinite().all() and B.isfinite().all()
        ):
            yield f"{pair.weight}: alpha and factors must be finite"


def check_strings(name: str, given: Any) -> Mapping[str, str]:
    """Return what maps strings to strings, all of them fit for a file, or raise."""
    items = given.items() if isinstance(given, Mapping) else [(None, given)]
    each = [text for item in items for text in item]
    # A lone half of a surrogate pair has no bytes.
    if any(type(t) is not str or t.encode("utf-8", "ignore").decode() != t for t in each):
        raise LoRAError(f"{name} must map strings to strings, got {given!r:.80}")
    return dict(given)


def shortened(items: Sequence[str]) -> str:
    """Join the first few of many."""
    more = f"; and {len(items) - 8:,} more" if len(items) > 8 else ""
    return "; ".join(items[:8]) + more
