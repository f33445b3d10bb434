"""Adapter files: save one adapter of a model, and load it into another."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from .base import fingerprint
from .base import freeze as freeze_base
from .classes import type_before
from .errors import AdapterError, FileError, LoRAError
from .formats import read, recognised, write
from .formats.pair import About, Pair, check_strings, faults, shortened
from .layers import layer_of
from .parametrization import LoRAParametrization, check_adapter
from .progress import progress
from .refusals import check_model, check_structure, check_unshared, check_weights
from .register import adapters_of
from .state import filling
from .surgery import all_or_nothing, attach, completed, template_of
from .targets import Weight, catalogue, is_flat, nearest


def save_lora(
    model: nn.Module,
    path: str | os.PathLike[str],
    adapter: str | None = None,
    metadata: Mapping[str, str] | None = None,
    *,
    format: str = "native",
    **options: Any,
) -> None:
    """Save one adapter, with all that is needed to register it again on a plain model.

    The native format is one safetensors file: `<weight>.lora_A` and `<weight>.lora_B`, and as
    metadata each weight's rank and alpha, the fingerprint of the base, and a digest of all this.
    It takes the place of an older file only when it is complete. Whether the adapter is enabled is
    not saved.

    Args:
        model: An adapted model.
        path: Where to; for `format="peft"` a folder.
        adapter: The adapter's name; `None` where the model has only one.
        metadata: Strings to keep with it, such as a licence or the base's home.
        format: `"native"`, `"peft"` or `"kohya"`.
        **options: What the format takes besides. Native: `base`, what `fingerprint(model)`
            returned, because taking it reads every parameter of the base; `{}` for none. Kohya:
            `prefix`, such as `"lora_unet_"`.

    Raises:
        AdapterError: There is no such adapter, or there are several and none is named.
        LoRAError: A factor isn't finite or has no values, the format can't hold the adapter or
            doesn't know an option, the metadata aren't strings, or the model is wrapped.
        FileError: The file can't be written.

    Example:
        >>> import tempfile, torch
        >>> from lora_param import register_lora
        >>> model = torch.nn.Linear(3, 2)
        >>> _ = register_lora(model, rank=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_lora(model, f"{folder}/adapter.safetensors", metadata={"license": "MIT"})
    """
    check_structure(model, "save_lora")
    entries = adapters_of(model, adapter)
    names = sorted({entry.adapter for _, entry in entries})
    if len(names) > 1:
        raise AdapterError(f"a file holds one adapter, and the model has {names}; name one")
    pairs = [
        Pair(weight.name, entry.lora_A.detach(), entry.lora_B.detach(), _alpha(entry))
        for weight, entry in entries
    ]
    if complaints := list(faults(pairs)):
        raise LoRAError(f"nothing was saved: {shortened(complaints)}")
    name = getattr(model, "name_or_path", "")  # a pretrained model's, of transformers or diffusers
    cls = type_before(getattr(model, "_orig_mod", model))
    about = About(
        names[0],
        name if isinstance(name, str) else "",
        f"{cls.__module__}.{cls.__qualname__}",
        metadata=check_strings("metadata", metadata or {}),
    )
    write(format, Path(path), pairs, model, about, **options)


def load_lora(
    model: nn.Module,
    path: str | os.PathLike[str],
    adapter: str | None = None,
    base: Literal["require", "warn", "ignore"] = "warn",
    *,
    freeze: bool = True,
    trainable: bool = True,
    **options: Any,
) -> list[str]:
    """Register a file's adapter on a model and load it, or load it into the one it has.

    Reads our own files and those of other libraries, and runs no code that a file brings. The
    factors keep the file's dtype, and go to their weights' devices.

    Args:
        model: The model that the adapter was trained on, plain or adapted.
        path: The file, or for PEFT the folder.
        adapter: The adapter's name on the model; `None` means the file's, or `"default"`. If the
            model has it, the file has to hold the same weights and ranks, and the model's factors
            keep their dtype.
        base: Where the file has the fingerprint of its base: `"require"` raises unless the model
            is that base to the bit, `"warn"` warns naming the parameters that differ, `"ignore"`
            doesn't look, which saves reading every parameter.
        freeze: Freeze the base when the adapter is registered, as `register_lora` does.
        trainable: Whether the factors require gradients.
        **options: What the format takes besides: `alpha` and `enable_lora` for loralib,
            `mha_out_proj` for PEFT, `prefix` for Kohya and diffusers; see `lora_param.formats`.

    Returns:
        The adapted parameters' names in model order.

    Raises:
        FileError: The file is damaged or of an unknown format, doesn't fit the model, or with
            `base="require"` belongs to another base. The model is as it was.
        AdapterError: The adapter's name is unusable.
        TargetError: A weight can't be adapted.
        LoRAError: An argument is out of range, or the model is wrapped or sharded.

    Example:
        >>> import tempfile, torch
        >>> from lora_param import register_lora
        >>> model = torch.nn.Linear(3, 2)
        >>> _ = register_lora(model, rank=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_lora(model, f"{folder}/adapter.safetensors")
        ...     load_lora(model, f"{folder}/adapter.safetensors", base="require")
        ['weight']
    """
    check_model(model, "load_lora")
    if type(freeze) is not bool or type(trainable) is not bool:
        raise LoRAError(f"freeze and trainable must be bools, got {freeze!r} and {trainable!r}")
    if base not in ("require", "warn", "ignore"):
        raise LoRAError(f'base must be "require", "warn" or "ignore", got {base!r}')
    path = Path(path)
    row = recognised(path)
    pairs, about = read(row, path, model, **options), row.about(path)
    adapter = about.adapter if adapter is None else adapter
    check_adapter(adapter)
    fitting = fitted(path, pairs, model, about)
    if base != "ignore" and (doubt := _doubt(about, model)):
        if base == "require":
            raise FileError(f"{path}: {doubt}")
        if about.base:
            warnings.warn(f"{path}: {doubt}", stacklevel=2)
    if adapter in _adapters(model):
        _load(path, model, adapter, fitting, trainable)
    else:
        with all_or_nothing(model):
            _register(model, adapter, fitting, freeze, trainable)
    return [weight.name for weight, _ in fitting]


def fitted(
    path: Path, pairs: Sequence[Pair], model: nn.Module, about: About
) -> list[tuple[Weight, Pair]]:
    """Find each pair's weight in a model or its outline, in model order.

    The pairs that are returned have no higher rank than the weight's smaller side.

    Raises:
        FileError: The model lacks weights, or their shapes are others.
    """
    by_name = {pair.weight: pair for pair in pairs}
    weights = {weight.name: weight for weight in catalogue(model)}
    if missing := [name for name in by_name if name not in weights]:
        called = f" of {about.called}" if about.called else ""
        raise FileError(
            f"{path}: an adapter's file holds only changes to its base, the weights{called}, and "
            f"this model lacks {len(missing)} of {len(by_name)}: {shortened(missing)}; the nearest "
            f"to the first are {nearest(missing[0], weights)}"
        )
    check_weights([weights[name] for name in by_name], "")
    found, complaints, lowered = [], [], []
    for name, weight in weights.items():
        if (pair := by_name.get(name)) is None:
            continue
        if is_flat(weight):
            complaints.append(f"{name} has fewer than two dimensions")
            continue
        *batch, fan_out, fan_in = _view(weight)
        shapes = tuple(pair.lora_A.shape), tuple(pair.lora_B.shape)
        expected = (*batch, pair.rank, fan_in), (*batch, fan_out, pair.rank)
        if shapes != expected:
            complaints.append(f"{name}: its factors are {shapes}, should be {expected}")
        else:
            fitting = pair.within(min(fan_out, fan_in))
            found.append((weight, fitting))
            if fitting is not pair:
                lowered.append(name)
                complaints += faults([fitting])
    if complaints:
        raise FileError(f"{path}: the shapes don't fit the model's: {shortened(complaints)}")
    if lowered:
        warnings.warn(
            f"{path}: rank lowered to the weight's smaller side, the same update within rounding: "
            f"{shortened(lowered)}",
            stacklevel=3,
        )
    return found


def _register(
    model: nn.Module,
    adapter: str,
    fitting: Sequence[tuple[Weight, Pair]],
    freeze: bool,
    trainable: bool,
) -> None:
    weights = [weight for weight, _ in fitting]
    check_weights(weights, adapter)
    check_unshared(model, weights, "an adapter here would not act there")
    if freeze:
        freeze_base(model)
    for weight, pair in progress(fitting, "loading"):
        device = template_of(weight.module, weight.tensor).device
        if device.type == "meta":
            raise LoRAError(f"{weight.name} is on the meta device; load when the model has values")
        entry = pair.parametrization(adapter, device).requires_grad_(trainable)
        attach(weight.module, weight.tensor, entry)


def _load(
    path: Path,
    model: nn.Module,
    adapter: str,
    fitting: Sequence[tuple[Weight, Pair]],
    trainable: bool,
) -> None:
    tensors = {
        f"{pair.weight}.{adapter}.{factor}": getattr(pair, factor)
        for _, pair in fitting
        for factor in ("lora_A", "lora_B")
    }
    try:
        fill = filling(model, tensors, adapter)
    except LoRAError as error:
        raise FileError(f'{path}: can\'t go into the adapter "{adapter}": {error}') from None
    entries = adapters_of(model, adapter)
    scales = {pair.weight: pair.alpha / pair.rank for _, pair in fitting}

    def load() -> None:
        fill()
        for weight, entry in entries:
            entry.scale = scales[weight.name]
            entry.requires_grad_(trainable)

    completed(load)


def _doubt(about: About, model: nn.Module) -> str:
    """Say why a model isn't the base that the file was trained on, or why that isn't known."""
    if not about.base:
        return 'there is no fingerprint of its base in it; pass base="warn" to load it anyway'
    try:
        now = fingerprint(model, buffers=True)
    except LoRAError as error:
        return f'the base can\'t be compared, pass base="ignore": {error}'
    held = set(now.values())  # a checkpoint has a module that is found twice by both its names
    differing = [
        name
        for name, found in about.base.items()
        if now.get(name, found if found in held else None) != found
    ]
    if not differing:
        return ""
    return (
        f"trained on another base, {about.called or 'a nameless one'}: {len(differing)} of "
        f"{len(about.base)} parameters differ from the model's: {shortened(differing)}"
    )


def _alpha(entry: LoRAParametrization) -> float:
    """Return the alpha that gives the same scale to the last bit where there is one."""
    exact = entry.alpha / entry.rank == entry.scale
    return entry.alpha if exact else entry.scale * entry.rank


def _view(weight: Weight) -> tuple[int, ...]:
    shape = template_of(weight.module, weight.tensor).shape
    return layer_of(type(weight.module)).view(tuple(shape))


def _adapters(model: nn.Module) -> set[str]:
    return {each.adapter for each in model.modules() if isinstance(each, LoRAParametrization)}
