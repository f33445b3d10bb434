"""PEFT: a folder of `adapter_model.safetensors` and `adapter_config.json`, read and written."""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from ..errors import FileError
from ..layers import UNLISTED, layer_of
from ..surgery import original_of, tensor_names
from . import layout
from .pair import About, Pair
from .peft_config import Config, load_config, rank_and_alpha
from .tensors import load_tensors, peek, replacing, save_tensors

PREFIX = "base_model.model."
CONFIG, SAFE, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
KEYS = (
    r"base_model\.model\.(?P<name>.+)\.lora_(?P<role>[AB])\.weight",
    r"base_model\.model\.(?P<name>.+)\.lora_embedding_(?P<role>[AB])",
)
OUT_PROJ = ".base_layer.out_proj"
LINEAR, OutProj = layer_of(nn.Linear), nn.modules.linear.NonDynamicallyQuantizableLinear
LAYERS = (*layout.LAYERS, nn.Embedding)


@dataclass(frozen=True)
class Place:
    """Where PEFT keeps one pair.

    Attributes:
        name: The keys' middle, `"layers.0.self_attn.base_layer.out_proj"`.
        weight: The parameter's full name, `"layers.0.self_attn.out_proj.weight"`.
        key: What the config's patterns are held against.
        module: The owner; `None` without a model, as is `tensor`.
        tensor: The parameter.
        targeted: Whether it is one of `target_parameters`.
    """

    name: str
    weight: str
    key: str
    module: nn.Module | None = None
    tensor: Tensor | None = None
    targeted: bool = False

    @property
    def twice(self) -> bool:
        """Whether PEFT applies its update twice."""
        return self.name.endswith(OUT_PROJ)

    @property
    def experts(self) -> int:
        """How many matrices are stacked; 0 for one that is no stack."""
        stack = self.tensor if self.targeted else None
        return len(stack) if stack is not None and stack.ndim > 2 else 0


def recognises(path: Path) -> bool:
    """Tell a folder or file of PEFT's by names and keys."""
    if path.is_dir():
        return any((path / name).is_file() for name in (CONFIG, SAFE, PICKLED))
    return path.name == PICKLED or layout.knows(KEYS, peek(path).tensors)


def read(
    path: Path, model: nn.Module | None, *, mha_out_proj: Literal["twice", "once"] | None = None
) -> list[Pair]:
    """Read an adapter of PEFT's.

    Args:
        path: The folder, or its file of tensors with the config beside it.
        model: The model that PEFT was given; `None` for the names in the file.
        mha_out_proj: PEFT applies the update of a MultiheadAttention's `out_proj` twice. `"twice"`
            does as PEFT does; `"once"` as the formula says; `None` is `"twice"` with a warning.

    Returns:
        A pair per weight.

    Raises:
        FileError: Lists the config's fields that can't be honoured, or else what is wrong with the
            tensors.
    """
    if mha_out_proj not in ("twice", "once", None):
        raise FileError(f'mha_out_proj must be "twice", "once" or None, got {mha_out_proj!r}')
    config = load_config((path if path.is_dir() else path.parent) / CONFIG)
    if path.is_dir():
        path = path / (SAFE if (path / SAFE).is_file() else PICKLED)
    tensors = layout.load_pickle(path) if path.suffix == ".bin" else load_tensors(path)
    factors, rest = layout.grouped(tensors, *KEYS)
    base = {key.removeprefix(PREFIX).replace(".base_layer.", "."): rest[key] for key in rest}
    complaints = [*layout.differing(base, model), *layout.halves(factors)]
    layout.refuse(path, complaints)
    modules = layout.modules_of(model)
    pairs, places, unplaced = [], [], []
    for name, found in factors.items():
        place = _place(name, modules, config) if model else _unplaced(name, factors)
        if place is None:
            unplaced.append(name)
            continue
        A, B = found["A"], found["B"]
        rank, alpha = rank_and_alpha(config, place.key)
        faults = [*_faults(place, A, B, rank), *_refusals(place, idle=not B.any())]
        if not faults:
            alpha *= 2 if place.twice and mha_out_proj != "once" else 1
            pairs.append(Pair(place.weight, *_ours(place, A, B), alpha))
        places.append(place)
        complaints += faults
    layout.refuse(path, [*layout.missing(unplaced, model), *complaints])
    _warn_of_other_maths(places)
    if mha_out_proj is None and (twice := _names(place for place in places if place.twice)):
        warnings.warn(
            f"PEFT applies the update of {twice} twice, and so does what was read; give "
            'mha_out_proj="twice" to agree, or "once"',
            stacklevel=2,
        )
    return pairs


def about(path: Path) -> About:
    """Return the name that PEFT gives the base."""
    config = load_config((path if path.is_dir() else path.parent) / CONFIG)
    return About(model=str(config.get("base_model_name_or_path") or ""))


def write(path: Path, pairs: Sequence[Pair], model: nn.Module) -> None:
    """Write a folder for `PeftModel.from_pretrained(base, folder)`.

    Args:
        path: The folder; made if it isn't there.
        pairs: The pairs.
        model: The model that they belong to.

    Raises:
        FileError: Lists the weights that PEFT has no place for.
    """
    modules = layout.modules_of(model)
    pairs = _with_whole_attention(pairs, modules)
    names = {pair.weight for pair in pairs}
    places = [_home(pair.weight, modules, names) for pair in pairs]
    complaints = [fault for place in places for fault in _refusals(place)]
    layout.refuse(path, [*complaints, *_ambiguous(places, modules)], "written")
    _warn_of_other_maths(places)
    if twice := _names(place for place in places if place.twice):
        warnings.warn(
            f"PEFT applies the update of {twice} twice, so the file holds half of it", stacklevel=2
        )
    tensors = {}
    for place, pair in zip(places, pairs, strict=True):
        infix = "embedding_" if isinstance(place.module, nn.Embedding) else ""
        for role, factor in zip("AB", _theirs(place, pair.lora_A, pair.lora_B), strict=True):
            key = f"{PREFIX}{place.name}.lora_{infix}{role}"
            tensors[key if infix else f"{key}.weight"] = factor.contiguous()
    content = json.dumps(_config(places, pairs, modules), indent=2).encode()
    path.mkdir(parents=True, exist_ok=True)
    save_tensors(path / SAFE, tensors, {"format": "pt"})
    with replacing(path / CONFIG) as file:
        file.write(content)


def _place(name: str, modules: Mapping[str, nn.Module], config: Config) -> Place | None:
    """Resolve a name in a file; PEFT nests wrappers around several parameters of one module."""
    path = name.removesuffix(OUT_PROJ)
    if path != name and isinstance(modules.get(path), nn.MultiheadAttention):
        return _home(f"{path}.out_proj.weight", modules, {f"{path}.in_proj_weight"})
    path = re.sub(r"(\.base_layer)+$", "", name)
    if (module := modules.get(path)) is None:
        return None
    depth = name.count(".base_layer", len(path))
    ends = tuple(f".{target}" for target in config.get("target_parameters") or ())
    own = [each for each in tensor_names(module) if f".{path}.{each}".endswith(ends)]
    if depth < len(own):  # the outermost wrapper is the last parameter's
        weight = f"{path}.{own[-1 - depth]}"
        return Place(name, weight, weight, module, original_of(module, own[-1 - depth]), True)
    tensor = "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"
    return None if depth else _home(f"{path}.{tensor}", modules, set())


def _unplaced(name: str, names: Collection[str]) -> Place:
    """Name a weight without a model to ask."""
    if (path := name.removesuffix(OUT_PROJ)) != name:
        return Place(name, f"{path}.out_proj.weight", path)
    tensor = "in_proj_weight" if f"{name}{OUT_PROJ}" in names else "weight"
    return Place(name, f"{name}.{tensor}", name)


def _home(weight: str, modules: Mapping[str, nn.Module], names: Collection[str]) -> Place:
    """Say where PEFT keeps a weight's pair, next to those of `names`."""
    path, _, tensor = weight.rpartition(".")
    module, attention = modules[path], path.rpartition(".")[0]
    place = Place(path, weight, path, module, original_of(module, tensor))
    if isinstance(module, OutProj) and f"{attention}.in_proj_weight" in names:
        return replace(place, name=f"{attention}{OUT_PROJ}", key=attention)
    if layer_of(type(module)) is UNLISTED and weight in names:
        own = [each for each in tensor_names(module) if f"{path}.{each}" in names]
        name = path + ".base_layer" * (len(own) - 1 - own.index(tensor))
        return replace(place, name=name, key=weight, targeted=True)
    return place


def _refusals(place: Place, *, idle: bool = False) -> Iterator[str]:
    """Yield why PEFT has no place for a pair; an idle one is all zeros."""
    module, (path, _, tensor) = place.module, place.weight.rpartition(".")
    if module is None:
        return
    if not path:
        yield f"{place.weight}: PEFT adapts what is inside a model, not the model itself"
    elif getattr(module, "groups", 1) > 1:
        yield f"{place.weight}: PEFT's update of a grouped convolution is no change of its weight"
    elif isinstance(module, OutProj) and not (place.twice or idle):
        yield f"{place.weight}: PEFT never applies an adapter of an attention's out_proj alone"
    elif not (
        (
            place.targeted
            and layer_of(type(module)) in (UNLISTED, LINEAR)
            and place.tensor is not None
            and place.tensor.ndim in (2, 3)
        )
        or ((isinstance(module, LAYERS) or layout.is_conv1d(module)) and tensor == "weight")
        or (isinstance(module, nn.MultiheadAttention) and tensor == "in_proj_weight")
    ):
        yield f"{place.weight}: PEFT has no place for this tensor of a {type(module).__name__}"


def _ambiguous(places: Sequence[Place], modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Yield the parameters that PEFT would find in other modules as well, or would refuse."""
    targeted = [place.weight for place in places if place.targeted]
    every = [f"{path}.{each}" for path in modules for each in tensor_names(modules[path])]
    for name in every if targeted else ():
        if not _tails(name).isdisjoint(targeted):
            yield f"{name}: PEFT would adapt it too, because another target's name is its end"
    if targeted and any(layout.is_conv1d(place.module) for place in places):
        yield f"{targeted[0]}: PEFT can't adapt it in one file with a Conv1D"


def _faults(place: Place, A: Tensor, B: Tensor, rank: int) -> Iterator[str]:
    """Yield what is wrong with the shapes."""
    rows = rank * max(place.experts, 1)
    if A.shape[0] != rows:
        yield f"{place.name} has rank {A.shape[0]}, by its {CONFIG} {rows}"
    elif not place.experts:
        yield from layout.misfit(place.name, place.module, place.tensor, A, B)
    elif A.ndim != 2 or B.ndim != 2 or B.shape[1] != rows:
        yield f"{place.name} has factors {tuple(A.shape)} and {tuple(B.shape)}"


def _ours(place: Place, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    if not place.experts:
        return layout.turned(place.module, A, B)
    A = A.reshape(place.experts, -1, A.shape[1])  # rows by expert, then rank
    B = B.reshape(len(B), -1, place.experts).movedim(2, 0)  # columns by rank, then expert
    return _swapped(place, A, B)


def _theirs(place: Place, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    if place.experts:
        A, B = _swapped(place, A, B)
        return A.flatten(0, 1), B.movedim(0, 2).flatten(1)
    A, B = layout.turned(place.module, A, B)
    kernel = place.tensor.shape[2:] if place.tensor is not None else ()
    return A.reshape(len(A), -1, *kernel), B.reshape(*B.shape, *[1] * len(kernel))


def _swapped(place: Place, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Swap sides where a module says that it stores its experts `(in, out)`."""
    return (B.mT, A.mT) if getattr(place.module, "is_transposed", False) else (A, B)


def _with_whole_attention(
    pairs: Sequence[Pair], modules: Mapping[str, nn.Module]
) -> Sequence[Pair]:
    """Give both parts of an attention one rank and alpha, which is all that PEFT has for them."""
    by_name = {pair.weight: pair for pair in pairs}
    for path, module in modules.items():
        if isinstance(module, nn.MultiheadAttention):
            names = (f"{path}.in_proj_weight", f"{path}.out_proj.weight")
            tensors = (
                original_of(module, "in_proj_weight"),
                original_of(module.out_proj, "weight"),
            )
            weights = {n: t for n, t in zip(names, tensors, strict=True) if t is not None}
            found = [by_name[name] for name in weights if name in by_name]
            if not found:
                continue
            rank = max(pair.rank for pair in found)
            one = len({(pair.rank, pair.alpha) for pair in found}) == 1 and found[0].alpha
            for name, weight in weights.items():
                pair = by_name.get(name) or _zeros(name, weight, found[0])
                half = 0.5 if name.endswith("out_proj.weight") else 1.0
                by_name[name] = _levelled(pair, rank, one or float(rank), half)
    return list(by_name.values())


def _zeros(name: str, weight: Tensor, like: Pair) -> Pair:
    A, B = (like.lora_A.new_zeros(shape) for shape in ((1, weight.shape[1]), (len(weight), 1)))
    return Pair(name, A, B, 1.0)


def _levelled(pair: Pair, rank: int, alpha: float, share: float) -> Pair:
    """Return a share of a pair's update with another rank and alpha."""
    share *= pair.alpha / alpha * rank / pair.rank
    A = nn.functional.pad(pair.lora_A, (0, 0, 0, rank - pair.rank))
    B = nn.functional.pad(pair.lora_B * share, (0, rank - pair.rank))
    return Pair(pair.weight, A, B, alpha)


def _config(
    places: Sequence[Place], pairs: Sequence[Pair], modules: Mapping[str, nn.Module]
) -> dict[str, Any]:
    ranks = {place.key: pair.rank for place, pair in zip(places, pairs, strict=True)}
    alphas = {place.key: pair.alpha for place, pair in zip(places, pairs, strict=True)}
    (rank, _), *_ = Counter(ranks.values()).most_common(1)
    (alpha, _), *_ = Counter(alphas.values()).most_common(1)
    targets = {place.key for place in places if not place.targeted}
    # A list also finds what ends like one of its names; an expression has to match in full.
    vague = any(not _tails(path).isdisjoint(targets) for path in modules.keys() - targets)
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": getattr(modules[""], "name_or_path", None) or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": _exceptions(ranks, rank),
        "alpha_pattern": _exceptions(alphas, alpha),
        "target_modules": "|".join(map(re.escape, sorted(targets))) if vague else sorted(targets),
        "target_parameters": [place.weight for place in places if place.targeted] or None,
        "fan_in_fan_out": any(layout.is_conv1d(place.module) for place in places),
        "bias": "none",
        "lora_dropout": 0.0,
    }


def _exceptions(numbers: Mapping[str, float], common: float) -> dict[str, float]:
    return {f"^{re.escape(key)}": each for key, each in numbers.items() if each != common}


def _tails(name: str) -> set[str]:
    """Return what is behind each of a name's dots."""
    return {name[match.end() :] for match in re.finditer(r"\.", name)}


def _names(places: Iterable[Place]) -> str:
    return ", ".join(place.weight for place in places)


def _warn_of_other_maths(places: Sequence[Place]) -> None:
    if names := _names(place for place in places if _has_other_maths(place.module)):
        warnings.warn(
            f"PEFT adapts {names} by other maths than their weight's: it knows no dilation, "
            "padding_mode or forward of their own; outputs will differ",
            stacklevel=3,
        )


def _has_other_maths(module: nn.Module | None) -> bool:
    dilated = any(each != 1 for each in getattr(module, "dilation", ()))
    padded = getattr(module, "padding_mode", "zeros") != "zeros"
    own = isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
    return dilated or padded or own
