"""Adapter files: save one adapter of a model, and load it into another."""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, cast

from torch import Tensor, nn

from .. import checks
from ..chains import type_before
from ..deltas import Delta, StatisticsDelta
from ..deltas.protocol import check_adapter, tensors_of
from ..errors import AdapterError, FileError, LoRAError, shortened
from ..frozen import digest_of
from ..optim import FIX
from ..progress import progress
from ..register import install
from ..sharding import alike, mesh_of
from ..state import load_deltas
from ..undo import all_or_nothing, keep_entries, set_flags
from ..walk import Walk
from ..weight import Weight
from .formats import AdapterFile, Deltas, faults_of, open_adapter, write_adapter
from .outline import Outline
from .tensors import About, AnyPath, check_strings


def save_lora(
    model: nn.Module,
    path: AnyPath,
    adapter: str | None = None,
    metadata: Mapping[str, str] | None = None,
    *,
    format: str = "native",
    **options: Any,
) -> None:
    """Save one adapter, with all that is needed to register it again on a plain model.

    The native format is one safetensors file: the tensors, such as `<weight>.lora_A`, and as
    metadata each weight's kind and numbers, the fingerprint of the base, and a digest of all this.
    It takes the place of an older file only when it is complete. Whether the adapter is enabled is
    not saved. Warns of an adapter that was never trained, of a base that can be trained too, and of
    what a format has no place for and can do without.

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
        LoRAError: A factor isn't finite, the format can't hold the adapter, or an argument is bad.
        FileError: The file can't be written.

    Every rank of a sharded model calls it, and the first one writes.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> _ = register_lora(model, rank=1)
        >>> save_lora(model, "adapter.safetensors", metadata={"license": "MIT"})
        >>> load_lora(torch.nn.Linear(3, 2), "adapter.safetensors", base="ignore")
        ['weight']
    """
    found = checks.walk(model, "save_lora", checks.Need.ADAPTERS)
    pairs = checks.deltas_called(found, adapter)
    names = sorted({delta.adapter for _, delta in pairs})
    if len(names) > 1:
        raise AdapterError(f"a file holds one adapter, and the model has {names}; name one")
    mesh = mesh_of(tensor for _, delta in pairs for tensor in delta.parameters())
    pairs = [(weight, delta.gathered()) for weight, delta in pairs]
    if faults := list(faults_of({weight.name: delta for weight, delta in pairs})):
        raise LoRAError(f"nothing was saved: {shortened(faults)}")
    name = getattr(model, "name_or_path", "")  # a pretrained model's, of transformers or diffusers
    cls = type_before(getattr(model, "_orig_mod", model))
    weights = Outline(found, live=True)
    taken = weights.tensors if mesh and options.get("base") is None else {}
    about = About(
        names[0],
        name if isinstance(name, str) else "",
        f"{cls.__module__}.{cls.__qualname__}",
        base={name: digest_of(name, tensor) for name, tensor in taken.items()},
        metadata=check_strings("metadata", metadata or {}),
    )
    with alike(mesh) as first:
        if first:
            write_adapter(format, Path(path), dict(pairs), weights, about, **options)
    _warn_of_lost(found, pairs)


def _warn_of_lost(walk: Walk, pairs: Sequence[tuple[Weight, Delta]]) -> None:
    """Warn of an adapter that changes nothing, and of training of the base, which isn't saved."""
    trained = [list(delta.parameters()) for _, delta in pairs if not delta.of_buffers]
    if all(any(not each.any() for each in parameters) for parameters in trained):
        reason = f"adapter {pairs[0][1].adapter!r} was never trained: its update is zero everywhere"
        warnings.warn(f"{reason}; if it should have been, {FIX}", stacklevel=3)
    if loose := [weight.name for weight, tensor in walk.parameters if tensor.requires_grad]:
        what = f"{shortened(loose, 3, ', ')} can be trained"
        fix = "freeze them, train them by train=, or keep base_state_dict(model) too"
        reason = "a file of adapters doesn't hold what trained the base"
        warnings.warn(f"{reason}, and {what}; {fix}", stacklevel=3)


def load_lora(
    model: nn.Module,
    path: AnyPath,
    adapter: str | None = None,
    base: Literal["require", "warn", "ignore"] = "warn",
    *,
    freeze: bool = True,
    trainable: bool = True,
    **options: Any,
) -> list[str]:
    """Register a file's adapter on a model and load it, or load it into the one it has.

    Reads our own files and those of other libraries, and runs no code that a file brings. The
    factors keep the file's dtype, and go to their weights' devices. See `save_lora` for an example.

    Args:
        model: The model that the adapter was trained on, plain or adapted.
        path: The file, or for PEFT the folder.
        adapter: The adapter's name on the model; `None` means the file's, or `"default"`. If the
            model has it, the file has to hold the same weights and ranks, and the model's factors
            keep their dtype.
        base: Where the file has the fingerprint of its base: `"require"` raises unless the model
            is that base to the bit, `"warn"` warns naming the parameters that differ, `"ignore"`
            doesn't look, which saves reading every parameter.
        freeze: Freeze the base when the adapter is registered, as `register_lora` does, and give
            the adapter copies of the statistics that its format has no place for.
        trainable: Whether the factors require gradients, at once or when a selection trains them.
        **options: What the format takes besides: `alpha` and `enable_lora` for loralib,
            `mha_out_proj` for PEFT, `prefix` for Kohya and diffusers; see `lora_param.io.formats`.

    Returns:
        The adapted parameters' names in model order.

    Raises:
        FileError: The file is damaged or of an unknown format, doesn't fit the model, or with
            `base="require"` belongs to another base. The model is as it was.
        LoRAError: A weight can't be adapted, or an argument is bad.
    """
    found = checks.walk(model, "load_lora")
    if type(freeze) is not bool or type(trainable) is not bool:
        raise LoRAError(f"freeze and trainable must be bools, got {freeze!r} and {trainable!r}")
    if base not in ("require", "warn", "ignore"):
        raise LoRAError(f'base must be "require", "warn" or "ignore", got {base!r}')
    with ExitStack() as opened:
        with alike(mesh_of(tensor for _, tensor in found.parameters)):
            file = opened.enter_context(open_adapter(Path(path)))
            adapter = file.about.adapter if adapter is None else adapter
            check_adapter(adapter)
            own = {weight: delta for weight, delta in found.deltas if delta.adapter == adapter}
            need = checks.Need.ADAPTERS if own else checks.Need.CHANGE
            checks.check_model(found, "load_lora", need)
            if trainable:
                checks.check_trainable(found)
            weights = Outline(found, live=True)
            deltas = file.fit(weights, "" if own else adapter, **options)
        if base != "ignore" and (doubt := _doubt(file.about, weights)):
            if base == "require":
                raise FileError(f"{path}: {doubt}")
            if file.about.base:
                warnings.warn(f"{path}: {doubt}", stacklevel=2)
        if not file.format.any_kind:
            deltas |= _statistics_beside(found, own, adapter, freeze, deltas)
        if own:
            _load(file, own, deltas, trainable)
        else:
            install(found, _attachable(deltas, trainable), adapter, freeze)
    return [weight.name for weight, delta in deltas.items() if not delta.of_buffers]


def _statistics_beside(
    walk: Walk, own: Deltas, adapter: str, freeze: bool, deltas: Deltas
) -> Deltas:
    """Return copies of what training moves and a file's format has no place for."""
    fresh = checks.moving_without(walk, adapter) if freeze and not own else []
    moving = [(weight, weight.value) for weight in fresh]
    moving += [(w, cast("Tensor", w.original)) for w in walk.moving if w in own]
    return {weight: StatisticsDelta(each) for weight, each in moving if weight not in deltas}


def _attachable(deltas: Deltas, trainable: bool) -> list[tuple[Weight, Delta]]:
    """Pair weights with deltas that have tensors of their own, on the weights' devices."""
    pairs = []
    for weight, delta in progress(list(deltas.items()), "loading"):
        if (device := weight.like.device).type == "meta":
            raise LoRAError(f"{weight.name} is on the meta device; load when the model has values")
        checks.check_space([weight], delta.numbers.get("dropout", 0.0))
        tensors = {part: t.to(device, copy=True) for part, t in tensors_of(delta).items()}
        copy = delta.made_of(tensors, delta.numbers).requires_grad_(trainable)
        pairs.append((weight, copy))
    return pairs


def _load(file: AdapterFile, own: Deltas, deltas: Deltas, trainable: bool) -> None:
    """Load deltas into those that the model has."""
    adapter, state = next(iter(own.values())).adapter, dict[str, Any]()
    for weight, delta in deltas.items():
        if weight in own and own[weight].kind == delta.kind:
            held = own[weight].numbers
            if "dropout" in held and not file.format.says_dropout:
                delta.numbers = delta.numbers | {"dropout": held["dropout"]}
            if not file.format.any_kind:
                delta.strength = own[weight].strength
        state |= delta.state_dict(prefix=f"{weight.name}.{adapter}.")
    try:
        with all_or_nothing() as undo:
            load_deltas({f"{w.name}.{adapter}.": each for w, each in own.items()}, state, undo)
            for delta in own.values():  # one that a selection doesn't train waits for another
                keep_entries(undo, (delta.__dict__, ["_resting"]))
                delta.__dict__.pop("_resting", None)
                rests, parameters = not delta.switch.trained, dict(delta.named_parameters())
                if rests and trainable:
                    delta.__dict__["_resting"] = tuple(parameters)
                set_flags(undo, [*parameters.values()], trainable and not rests)
    except LoRAError as error:
        raise FileError(f'{file.path}: can\'t go into the adapter "{adapter}": {error}') from None


def _doubt(about: About, weights: Outline) -> str:
    """Say why a model isn't the base that the file was trained on, or why that isn't known."""
    if not about.base:
        return 'there is no fingerprint of its base in it; pass base="warn" to load it anyway'
    # All of the model's only where names are missing, for tensors that have gone by another.
    names = about.base if about.base.keys() <= weights.tensors.keys() else weights.tensors
    try:
        now = {name: digest_of(name, weights.tensors[name]) for name in names}
    except LoRAError as error:
        return f'the base can\'t be compared, pass base="ignore": {error}'
    held = set(now.values())  # a checkpoint has a module that is found twice by both its names
    differing = [
        name
        for name, digest in about.base.items()
        if now.get(name, digest if digest in held else None) != digest
    ]
    if not differing:
        return ""
    return (
        f"trained on another base, {about.base_name or 'a nameless one'}: {len(differing)} of "
        f"{len(about.base)} parameters differ from the model's: {shortened(differing)}"
    )
