"""PEFT: a folder of `adapter_model.safetensors` and `adapter_config.json`, read and written."""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from ..classes import type_before
from ..errors import FileError
from ..surgery import tensor_names
from . import layout
from .pair import About, Pair
from .peft_config import Config, costly, load_config, rank_and_alpha
from .peft_places import IN_OUT, Place, home_of, place_of, refusals
from .skeleton import described, type_name
from .tensors import load_tensors, peek, replacing, save_tensors

CONFIG, SAFE, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
KEYS = (
    r"base_model\.model\.(?P<name>.+)\.lora_(?P<role>[AB])\.weight",
    r"base_model\.model\.(?P<name>.+)\.lora_embedding_(?P<role>[AB])",
)
READ_TWICE = 'so does what was read; mha_out_proj="twice" agrees to that, "once" mends it'


def recognises(path: Path) -> bool:
    """Say whether a folder or file is PEFT's, by its names and keys."""
    if path.is_dir():
        return any((path / name).is_file() for name in (CONFIG, SAFE, PICKLED))
    return path.name == PICKLED or layout.knows(KEYS, peek(path).tensors)


def about(path: Path) -> About:
    """Return what PEFT calls the base, and says of its layers' types."""
    config, file = _opened(path)
    tensors = layout.load_pickle(file) if file.suffix == ".bin" else peek(file).tensors
    layers = {}
    for key in tensors:
        if match := re.fullmatch(KEYS[1], key):
            layers[f"{match['name']}.weight"] = {"type": type_name(nn.Embedding)}
    model = str(config.get("base_model_name_or_path") or "")
    return About(model=model, layers=layers, metadata=layout.about(file).metadata)


def _opened(path: Path) -> tuple[Config, Path]:
    """Return the config, and where the tensors are."""
    config = load_config((path if path.is_dir() else path.parent) / CONFIG)
    if path.is_dir():
        path = path / (SAFE if (path / SAFE).is_file() else PICKLED)
    return config, path


def read(
    path: Path, model: nn.Module | None, *, mha_out_proj: Literal["twice", "once"] | None = None
) -> list[Pair]:
    """Read an adapter of PEFT's.

    Args:
        path: The folder, or its file of tensors with the config beside it.
        model: The model that PEFT was given; `None` for the names in the file.
        mha_out_proj: PEFT applies the update of a MultiheadAttention's `out_proj` twice: do as it
            does, `"twice"`, or as the formula says, `"once"`; `None` is `"twice"` with a warning.

    Returns:
        A pair per weight.

    Raises:
        FileError: Lists what can't be honoured in the config, or what is wrong with the tensors.
    """
    if mha_out_proj not in ("twice", "once", None):
        raise FileError(f'mha_out_proj must be "twice", "once" or None, got {mha_out_proj!r}')
    config, path = _opened(path)
    tensors = layout.load_pickle(path) if path.suffix == ".bin" else load_tensors(path)
    factors, rest = layout.grouped(tensors, *KEYS)
    base = {key.removeprefix(PREFIX).replace(".base_layer.", "."): rest[key] for key in rest}
    complaints = [*layout.differing(base, model), *layout.halves(factors)]
    layout.refuse(path, [*complaints, *costly(config, factors)])
    if model is None and config.get("target_parameters") and config.get("rank_pattern"):
        raise FileError(f"{path}: which rank a target parameter has can't be said without a model")
    modules = None if model is None else layout.modules_of(model)
    places = {name: place_of(name, modules, config) for name in factors}
    found = [place for place in places.values() if place]
    # PEFT sets the flag by the last layer that it wrapped, so that it is a hint and no fact.
    known = (modules or {}).values()
    vague = bool(config.get("fan_in_fan_out")) or any(map(layout.is_conv1d, known))
    twice, results = mha_out_proj != "once", list[Pair | str]()
    for place in found:
        embedded = f"{PREFIX}{place.name}.lora_embedding_A" in tensors
        transposed = _is_transposed(place, factors[place.name]["A"], config, embedded, vague)
        results += _results(place, factors[place.name], config, transposed, twice)
    unplaced = [name for name, place in places.items() if place is None]
    complaints = [each for each in results if isinstance(each, str)]
    layout.refuse(path, [*layout.missing(unplaced, model), *complaints])
    _warn(model, found, READ_TWICE if mha_out_proj is None else "")
    return [each for each in results if isinstance(each, Pair)]


def write(path: Path, pairs: Sequence[Pair], model: nn.Module, about: About) -> None:
    """Write a folder for `PeftModel.from_pretrained(base, folder)`; make it if it isn't there.

    Raises:
        FileError: Lists the weights that PEFT has no place for.
    """
    modules = layout.modules_of(model)
    pairs = _with_other_halves(pairs, modules)
    names = {pair.weight for pair in pairs}
    placed = [(home_of(pair.weight, modules, names), pair) for pair in pairs]
    places = [place for place, _ in placed]
    complaints = [fault for place in places for fault in refusals(place, written=True)]
    layout.refuse(path, [*complaints, *_misread(placed, modules)], "written")
    _warn(model, places, "the file holds half of it")
    tensors = {}
    for place, pair in placed:
        infix = "embedding_" if isinstance(place.module, nn.Embedding) else ""
        for role, factor in zip("AB", _theirs(place, pair), strict=True):
            key = f"{PREFIX}{place.name}.lora_{infix}{role}"
            tensors[key if infix else f"{key}.weight"] = factor.contiguous()
    config = {"base_model_name_or_path": about.model or None, **_config(placed, modules)}
    content = json.dumps(config, indent=2).encode()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"{path}: no folder can be made: {error.strerror}") from None
    with replacing(path / CONFIG) as file:  # takes its place after the tensors have taken theirs
        file.write(content)
        file.flush()
        save_tensors(path / SAFE, tensors, {"format": "pt", **about.metadata})


def _results(
    place: Place, found: Mapping[str, Tensor], config: Config, transposed: bool | None, twice: bool
) -> Iterator[Pair | str]:
    """Yield the pair, or what is wrong with it."""
    A, B = found["A"], found["B"]
    rank, alpha = rank_and_alpha(config, place.key)
    faults = list(refusals(place, idle=place.kind == "alone" and not B.any()))
    if faults := faults or list(_faults(place, A, B, rank, transposed)):
        yield from faults
        return
    A, B = _ours(place, A, B, rank, bool(transposed))
    yield Pair(place.weight, A, B * 2 if twice and place.kind == "out_proj" else B, alpha)


def _misread(
    placed: Sequence[tuple[Place, Pair]], modules: Mapping[str, nn.Module]
) -> Iterator[str]:
    """Yield what PEFT's config can't say."""
    targets = {place.weight for place, _ in placed if place.kind == "parameter"}
    for path, module in modules.items() if targets else ():
        for name in (f"{path}.{each}" for each in tensor_names(module)):
            if not _tails(name).isdisjoint(targets):
                yield f"{name}: PEFT would adapt it too, because a target's name is its end"
    if targets and any(layout.is_conv1d(place.module) for place, _ in placed):
        yield f"{min(targets)}: PEFT can't adapt it in one file with a Conv1D"
    said: dict[str, tuple[int, float]] = {}
    for place, pair in placed:
        if said.setdefault(place.key, (pair.rank, pair.alpha)) != (pair.rank, pair.alpha):
            yield f"{place.key}: PEFT has one rank and one alpha for both parts of an attention"


def _faults(
    place: Place, A: Tensor, B: Tensor, rank: int, transposed: bool | None
) -> Iterator[str]:
    """Yield what is wrong with the shapes."""
    experts = len(place.tensor) if place.stacked and place.tensor is not None else 1
    if place.module is None:
        experts = max(len(A) // max(rank, 1), 1)
    if rank < 1 or len(A) != rank * experts:
        yield f"{place.name} has rank {len(A) / experts:g}, by its {CONFIG} {rank}"
    elif place.stacked and not (A.ndim == B.ndim == 2 and B.shape[1] == len(A)):
        yield f"{place.name} has factors {tuple(A.shape)} and {tuple(B.shape)}"
    elif transposed is None:
        yield f"{place.weight}: which side of a square matrix is which can't be known"
    elif not place.stacked and experts == 1:
        yield from layout.misfit(place.name, place.tensor, A, B, transposed)


def _is_transposed(
    place: Place, A: Tensor, config: Config, embedded: bool, vague: bool
) -> bool | None:
    """Tell whether factors are for a weight stored `(in, out)`; `None` if that can't be known."""
    if place.stacked and place.tensor is not None:
        _, rows, columns = place.tensor.shape
        if rows != columns:
            return A.shape[1] == rows
        found = re.match(r"(\d+)\.(\d+)\.(\d+)", str(config.get("peft_version")))
        if found is None or place.is_outline:
            return None
        # PEFT took all stacks for such before 0.19, just the others in 0.19.0, and then only such.
        version, such = tuple(map(int, found.groups())), getattr(place.module, IN_OUT, False)
        return version < (0, 19, 0) or bool(such) == (version > (0, 19, 0))
    if embedded:
        return True
    shape = () if place.tensor is None else tuple(place.tensor.shape)
    guessed = place.is_outline and place.module is not None and not described(place.module)
    if place.kind == "layer" and guessed and len(shape) == 2:
        square = shape[0] == shape[1]
        return (None if vague else False) if square else A.shape[1] == shape[0]
    return place.kind == "layer" and layout.is_conv1d(place.module)


def _ours(place: Place, A: Tensor, B: Tensor, rank: int, transposed: bool) -> tuple[Tensor, Tensor]:
    if not place.stacked and len(A) == rank:
        return layout.turned(A, B, transposed)
    A = A.reshape(-1, rank, A.shape[1])  # rows by expert, then rank
    B = B.reshape(len(B), rank, -1).movedim(2, 0)  # columns by rank, then expert
    return (B.mT.contiguous(), A.mT.contiguous()) if transposed else (A, B.contiguous())


def _theirs(place: Place, pair: Pair) -> tuple[Tensor, Tensor]:
    A, B = pair.lora_A, pair.lora_B
    if place.stacked:
        A, B = (B.mT, A.mT) if getattr(place.module, IN_OUT, False) else (A, B)
        return A.flatten(0, 1), B.movedim(0, 2).flatten(1)
    transposed = place.kind == "layer" and layout.is_transposed(place.module)
    return layout.unflattened(*layout.turned(A, B, transposed), place.tensor)


def _with_other_halves(pairs: Sequence[Pair], modules: Mapping[str, nn.Module]) -> list[Pair]:
    """Halve what PEFT applies twice, and add zeros for the part of an attention that is left."""
    by_name = {pair.weight: pair for pair in pairs}
    for name, pair in list(by_name.items()):
        place = home_of(name, modules, ())
        other = {"in_proj": "out_proj.weight", "out_proj": "in_proj_weight"}.get(place.kind)
        if place.kind == "out_proj":
            by_name[name] = replace(pair, lora_B=pair.lora_B * 0.5)
        if other and f"{place.key}.{other}".rpartition(".")[0] in modules:
            partner = home_of(f"{place.key}.{other}", modules, ())
            rows = 0 if partner.tensor is None else len(partner.tensor)
            zeros = pair.lora_B.new_zeros(rows, pair.rank)
            by_name.setdefault(partner.weight, replace(pair, weight=partner.weight, lora_B=zeros))
    return list(by_name.values())


def _config(
    placed: Sequence[tuple[Place, Pair]], modules: Mapping[str, nn.Module]
) -> dict[str, Any]:
    numbers = {place.key: (pair.rank, pair.alpha) for place, pair in placed}
    (rank, _), *_ = Counter(rank for rank, _ in numbers.values()).most_common(1)
    (alpha, _), *_ = Counter(alpha for _, alpha in numbers.values()).most_common(1)
    targets = {place.key for place, _ in placed if place.kind != "parameter"}
    # A list also finds what ends like one of its names; an expression has to match in full.
    vague = any(not _tails(path).isdisjoint(targets) for path in modules.keys() - targets)
    return {
        "peft_type": "LORA",
        "peft_version": "0.19.1",  # the first with this layout of stacks
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(k)}": r for k, (r, _) in numbers.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(k)}": a for k, (_, a) in numbers.items() if a != alpha},
        "target_modules": "|".join(map(re.escape, sorted(targets))) if vague else sorted(targets),
        "target_parameters": [p.weight for p, _ in placed if p.kind == "parameter"] or None,
        "fan_in_fan_out": any(layout.is_conv1d(place.module) for place, _ in placed),
        "bias": "none",
        "lora_dropout": 0.0,
    }


def _tails(name: str) -> set[str]:
    """Return what is behind each of a name's dots."""
    return {name[match.end() :] for match in re.finditer(r"\.", name)}


def _warn(model: nn.Module | None, places: Sequence[Place], consequence: str) -> None:
    """Warn where PEFT computes something else than the formula."""
    holders = model.modules() if model else ()
    slots = Counter(id(child) for each in holders for child in each._modules.values())
    shared = [place.weight for place in places if slots[id(place.module)] > 1]
    others = [place.weight for place in places if _has_other_maths(place.module)]
    twice = [place.weight for place in places if place.kind == "out_proj" and consequence]
    for names, how in (
        (others, "by other maths: it knows no dilation, padding_mode or forward of a layer's own"),
        (shared, "in one of the places where its module is found, and here it is adapted in all"),
        (twice, f"twice, and {consequence}"),
    ):
        if names:
            warnings.warn(f"PEFT adapts {', '.join(names)} {how}", stacklevel=5)


def _has_other_maths(module: nn.Module | None) -> bool:
    dilated = any(each != 1 for each in getattr(module, "dilation", ()))
    padded = getattr(module, "padding_mode", "zeros") != "zeros"
    if not isinstance(module, nn.Linear):
        return dilated or padded
    return type_before(module).forward is not nn.Linear.forward
