"""The formats of adapter files: a row each in one table, and the file that is read by a row."""

import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ...checks import check_weights
from ...deltas import KINDS, Delta, Pair
from ...deltas.protocol import FLOATS, show_dtypes, tensors_of
from ...errors import FileError, LoRAError, shortened
from ...progress import progress
from ...rows import split_rows
from ...state import NUMBERS
from ...targets import nearest
from ...weight import Weight, overlapping
from ..outline import UNKNOWN, Base, Outline, open_checkpoint, outline_of_tensors
from ..tensors import About, AnyPath, Config, OpenFile, open_file, write_content
from . import diffusers, kohya, loralib, native, peft
from .factors import joined, warn_of_statistics

Deltas = dict[Weight, Delta]
"""An adapter: its deltas by their weights."""


class Format(NamedTuple):
    """One row of the table: a module that turns tensors to deltas, and back where it is written.

    `recognises(file)` unpickles nothing, `describe(file)` returns what `parse` needs beside
    tensors, and all else. `parse(tensors, config, weights, *, options)` gives pairs of a weight's
    name and its delta, or raises a `FileError` that lists all that is wrong, without the file's
    name; `render(deltas, weights, about, *, options)` goes the other way.
    """

    name: str
    module: Any
    kinds: Collection[str] = ("lora",)  # of the deltas that are written in it
    any_kind: bool = False  # whether it has a place for all kinds, blocks of rows and strengths
    blocks: Collection[str] = ()  # of the deltas that are written on blocks of rows, if not of any
    says_dropout: bool = True  # whether its files say a delta's dropout


FORMATS = (
    Format("native", native, KINDS, any_kind=True),
    Format("peft", peft, ("lora", "dora", "dense", "statistics"), blocks=("dense",)),
    Format("kohya", kohya, ("lora", "dora", "dense"), says_dropout=False),
    Format("diffusers", diffusers, says_dropout=False),
    Format("loralib", loralib, says_dropout=False),
)
"""A file is recognised by one row."""

WRITTEN = {row.name: row for row in FORMATS if hasattr(row.module, "render")}


@dataclass(frozen=True)
class AdapterFile:
    """An adapter's open file, the row by which it is read, and what it says beside its deltas."""

    path: Path
    format: Format
    file: OpenFile
    config: Config
    about: About

    @cached_property
    def outline(self) -> Outline:
        """What the file itself says of the model."""
        about = self.about
        return outline_of_tensors(about.shapes, about.layers) if about.shapes else UNKNOWN

    def check_said(self, outline: Outline, fix: str) -> None:
        """Raise where it isn't known what the weights are."""
        if outline.unknown:
            reason = f"the format {self.format.name} doesn't say what its weights are"
            raise FileError(f"{self.path}: {reason}; {fix}")

    def parse(self, weights: Outline, /, **options: Any) -> dict[str, Delta]:
        """Read the deltas by name; each is whole in itself, whether it fits isn't known."""
        _check_options(self.format.name, self.format.module.parse, options)
        tensors = self.file.tensors
        try:
            pairs = self.format.module.parse(tensors, self.config, weights, **options)
            times = Counter(name for name, _ in pairs)
            faults = [f"{n}: there are {k} updates of it" for n, k in times.items() if k > 1]
            faults += faults_of(dict(pairs))
            for name, delta in {} if self.outline.unknown else dict(pairs).items():
                if fault := _misfit(delta, self.outline.weight(name)):
                    faults.append(f"{name}: its tensors aren't of the shape said: {fault}")
        except FileError as error:
            raise FileError(f"{self.path}: {error}") from None
        except LoRAError:
            raise
        except (ArithmeticError, MemoryError, RuntimeError, TypeError, ValueError) as error:
            reason = f"{error}".split("\n")[0]
            format = self.format.name
            raise FileError(f"{self.path}: can't be read as {format}'s: {reason:.200}") from error
        if faults:
            raise FileError(f"{self.path}: {shortened(faults)}")
        return dict(pairs)

    def adapted(self, options: Mapping[str, Any]) -> set[str]:
        """Return the adapted weights' names, as far as the file says them without a model."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the same are given when it is read for good
                return {split_rows(name)[0] for name in self.parse(UNKNOWN, **options)}
        except LoRAError:
            return set()

    def fit(self, weights: Outline, adapter: str = "", /, **options: Any) -> Deltas:
        """Read the deltas and hold them against a model's weights, if known, in model order.

        None of those returned has a higher rank than its weight's smaller side. `adapter` is the
        name of the adapter that they are going to be.
        """
        deltas = self.parse(weights, **options)
        found = {name: w for name in deltas if (w := weights.weight(name)) is not None}
        if missing := [name for name in deltas if name not in found]:
            called = f" of {self.about.base_name}" if self.about.base_name else ""
            near = nearest(missing[0], weights.weights)
            raise FileError(
                f"{self.path}: an adapter's file holds only changes to its base, the weights"
                f"{called}, and this model lacks {len(missing)} of {len(deltas)}: "
                f"{shortened(missing)}; the nearest to the first are {near}"
                f"{'' if weights.live else '; where only a prefix differs, give it with --prefix'}"
            )
        fitting = {weight: deltas[name] for name, weight in found.items()}
        if weights.unknown:
            return fitting
        check_weights([w for w, delta in fitting.items() if not delta.of_buffers], adapter)
        faults = [f"{a.name} and {b.name} overlap" for a, b in overlapping(found.values())]
        faults += [f"{w.name}: {fault}" for w, d in fitting.items() if (fault := _misfit(d, w))]
        lowered = dict[str, Delta]()
        for weight, delta in {} if faults else fitting.items():
            if isinstance(delta, Pair) and delta.rank > (limit := min(weight.view[-2:])):
                fitting[weight] = lowered[weight.name] = delta = delta.lowered(limit)
            delta.rows, delta.dim = weight.rows, weight.dim
        if lowered:
            faults += faults_of(lowered)
        if faults:
            raise FileError(f"{self.path}: the shapes don't fit the model's: {shortened(faults)}")
        if lowered:
            warnings.warn(
                f"{self.path}: rank lowered to the weight's smaller side, the same update within "
                f"rounding: {shortened([*lowered])}",
                stacklevel=3,
            )
        order = {name: place for place, name in enumerate(weights.weights)}
        places = {w: (order[w.whole.name], w.rows.parts if w.rows else ()) for w in fitting}
        return {weight: fitting[weight] for weight in sorted(fitting, key=lambda w: places[w])}


@contextmanager
def open_adapter(path: Path) -> Iterator[AdapterFile]:
    """Open an adapter's file for a block, and find out its format, or raise a `FileError`."""
    with open_file(path) as file:
        _check_no_state_dict(file)
        rows = [row for row in FORMATS if row.module.recognises(file)]
        if len(rows) != 1:
            known = ", ".join(row.name for row in rows or FORMATS)
            what = "could be any of" if rows else "is of no known format:"
            held = f"it holds {shortened([*file.entries])}" if file.entries else file.fault
            raise FileError(f"{path}: {what} {known}{'; ' * bool(held)}{held}")
        describe = getattr(rows[0].module, "describe", None)
        said = describe(file) if describe else ({}, About(metadata=file.strings))
        yield AdapterFile(path, rows[0], file, *said)


@contextmanager
def open_both(
    path: AnyPath, base: AnyPath | None, prefix: str | None, options: Mapping[str, Any]
) -> Iterator[tuple[AdapterFile, Base, Outline, Deltas]]:
    """Open an adapter's file and the base that it was trained on; yield the deltas as they fit it.

    Where the model's names begin with a `prefix` that the checkpoint's lack, or the other way
    round, it is found or given. Without a base an outline is what the file itself says.
    """
    with ExitStack() as stack:
        file, found = stack.enter_context(open_adapter(Path(path))), Base(Path(), {}, {})
        weights = file.outline
        if base is not None:
            found = stack.enter_context(open_checkpoint(Path(base)))
            seen = found.prefix_for(file.adapted(options)) if prefix is None else prefix
            found = found.with_prefix(seen)
            weights = outline_of_tensors(found.tensors, file.about.layers)
        yield file, found, weights, file.fit(weights, **options)


def _check_no_state_dict(file: OpenFile) -> None:
    """Raise if a file holds what `lora_state_dict(model)` or `model.state_dict()` returned."""
    names = file.tensors if loralib.recognises(file) else file.entries
    stems = [name.removesuffix(NUMBERS) for name in names if name.endswith(f".{NUMBERS}")]
    if any(f"{stem}{part}" in names for stem in stems for part in ("lora_A", "shift_A", "D")):
        what, call = "lora_state_dict(model)", "load_lora_state_dict(model, "
        if "parametrizations." in stems[0]:
            what, call = "model.state_dict()", "model.load_state_dict("
        read = "load_file" if file.entries else "torch.load"
        fix = f"register its adapters and use {call}{read}(path)), or write a file by save_lora"
        raise FileError(f"{file.path}: no adapter file, but the state dict {what}; {fix}")


def write_adapter(
    format: str, path: Path, deltas: Deltas, weights: Outline, about: About, /, **options: Any
) -> None:
    """Write deltas in the format of that name, and what else it has a place for."""
    if format not in [*WRITTEN]:
        raise LoRAError(f"format must be one of {[*WRITTEN]}, got {format!r}")
    row = WRITTEN[format]
    _check_options(format, row.module.render, options)
    taken = {native.KEY, "format", diffusers.CONFIG} & about.metadata.keys()
    if taken and (taken != {"format"} or about.metadata["format"] != "pt"):
        raise LoRAError(f"metadata can't have the key {min(taken)!r}, which files have themselves")
    if left := [w for w, d in deltas.items() if d.of_buffers and d.kind not in row.kinds]:
        warn_of_statistics(format.capitalize(), [weight.name for weight in left])
        deltas = {weight: delta for weight, delta in deltas.items() if weight not in left}
    if not row.any_kind:
        deltas = joined(format, deltas)
    for weight, delta in deltas.items():
        able = delta.rows is None or row.any_kind or delta.kind in row.blocks
        if delta.kind not in row.kinds or not able:
            what = "a block of rows" if delta.kind in row.kinds else f"a {delta.kind} delta"
            raise FileError(f"{path}: {weight.name}: the format {format} has no place for {what}")
    strong = [weight.name for weight, delta in deltas.items() if delta.strength != 1]
    if strong and not row.any_kind:
        reason = f"the format {format} has no place for a strength, and these are saved without"
        warnings.warn(f"{path}: {reason}: {shortened(strong)}", stacklevel=4)
    try:
        content = row.module.render(deltas, weights, about, **options)
    except FileError as error:
        raise FileError(f"{path}: {error}") from None
    write_content(path, content)


def _check_options(name: str, call: Callable[..., Any], options: Mapping[str, Any]) -> None:
    parameters = inspect.signature(call).parameters.values()
    known = {each.name for each in parameters if each.kind is each.KEYWORD_ONLY}
    if unknown := sorted(options.keys() - known):
        raise LoRAError(f"the format {name} takes {sorted(known)}, got {', '.join(unknown)}")
    if not isinstance(options.get("prefix", ""), str):
        raise LoRAError(f"prefix must be a string, got {options['prefix']!r}")


def faults_of(deltas: Mapping[str, Delta]) -> Iterator[str]:
    """Yield what is wrong with deltas in themselves."""
    if not deltas:
        yield "there is no adapter in it"
    for name, delta in progress(list(deltas.items()), "checking the factors"):
        tensors = list(tensors_of(delta).values())
        dtypes = {tensor.dtype for tensor in tensors}
        if len(dtypes) > 1 or not (dtypes <= set(FLOATS) or delta.of_buffers):
            allowed, got = show_dtypes(*FLOATS), show_dtypes(*(each.dtype for each in tensors))
            yield f"{name}: its tensors must share one of {allowed}, got {got}"
        elif any(tensor.is_meta or not tensor.numel() for tensor in tensors):
            yield f"{name}: its tensors have no values"
        elif not all(tensor.isfinite().all() for tensor in tensors):
            yield f"{name}: its tensors must be finite"


def _misfit(delta: Delta, weight: Weight | None) -> str | None:
    if weight is None:
        return "it isn't said"
    if delta.rows != weight.rows:
        return f"its rows are [{delta.rows or ':'}], by its name [{weight.rows or ':'}]"
    return delta.misfit(weight.shape or (), weight.view)
