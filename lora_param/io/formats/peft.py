"""PEFT: a folder of `adapter_model.safetensors` and `adapter_config.json`, read and written."""

import json
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from ...deltas import Delta, DoRA, Pair
from ...errors import FileError
from ...layers import CONV1D, UNLISTED, layer_of
from ...weight import Weight, join
from ..outline import Outline, Unknown, drops, facts_of, kind_name
from ..tensors import CONFIG, PICKLED, About, Config, Content, OpenFile, Tensors
from . import factors as shared
from .peft_config import costly_patterns, dropout, load_config, rank_and_alpha, scaling
from .peft_places import Place, place_of_weight, places_of_names, refusals, warn
from .peft_whole import NO_LAYERS, changes, new_values, render_whole

Placed = tuple[Place, Pair]

PREFIX = "base_model.model."
KEYS = (
    r"base_model\.model\.(?P<name>.+)\.lora_(?P<role>[AB])\.weight",
    r"base_model\.model\.(?P<name>.+)\.lora_embedding_(?P<role>[AB])",
    r"base_model\.model\.(?P<name>.+)\.lora_B\.(?P<role>bias)",
    r"base_model\.model\.(?P<name>.+)\.(?P<role>lora_magnitude_vector)",
)


def recognises(file: OpenFile) -> bool:
    """Say whether a folder or file is PEFT's, by its names and keys."""
    if file.folder is not None or file.path.name == PICKLED:
        return True
    named = [name for name in file.entries if name.startswith(PREFIX)]
    return shared.matches_any(KEYS, named) or bool(named and file.path.with_name(CONFIG).exists())


def describe(file: OpenFile) -> tuple[Config, About]:
    """Return the config that lies beside the tensors, and what it and they say of the base."""
    config = load_config((file.folder or file.path.parent) / CONFIG)
    matches = filter(None, (re.fullmatch(KEYS[1], key) for key in file.tensors))
    layers = {match["name"]: {"type": kind_name(layer_of(nn.Embedding))} for match in matches}
    model = str(config.get("base_model_name_or_path") or "")
    return config, About(model=model, layers=layers, metadata=file.strings)


def parse(
    tensors: Tensors,
    config: Config,
    weights: Outline,
    *,
    mha_out_proj: Literal["twice", "once"] | None = None,
) -> list[shared.Named]:
    """Read an adapter of PEFT's, with its config, and what it has trained whole.

    PEFT applies the update of a MultiheadAttention's `out_proj` twice: `mha_out_proj` says to do as
    it does, `"twice"`, or as the formula says, `"once"`; `None` is `"twice"` with a warning.
    """
    if mha_out_proj not in ("twice", "once", None):
        raise FileError(f'mha_out_proj must be "twice", "once" or None, got {mha_out_proj!r}')
    factors, rest = shared.group_factors(tensors, *KEYS)
    rest = {key.removeprefix(PREFIX): tensor for key, tensor in rest.items()}
    new, base = new_values(rest, config, weights)
    foreign = shared.tensors_of_another_base(base, weights)
    shared.refuse([*foreign, *costly_patterns(config, factors)])
    if weights.unknown and config.get("target_parameters") and config.get("rank_pattern"):
        raise FileError("which rank a target parameter has can't be said without a model")
    found = shared.all_found(places_of_names(factors, weights, config), weights)
    # PEFT sets the flag by the last layer that it wrapped, so that it is a hint and no fact.
    conv1d = any(layer_of(type(each)).kind == CONV1D for each in weights.modules.values())
    vague = bool(config.get("fan_in_fan_out")) or conv1d

    def read(name: str) -> Iterator[tuple[str, Pair]]:
        place, (A, B) = found[name], shared.both_factors(factors[name])
        embedded = f"{PREFIX}{name}.lora_embedding_A" in tensors
        transposed = embedded or _is_transposed(place, A, config, vague)
        if place.kind == "out_proj" and mha_out_proj != "once":
            B = B * 2
        yield name, _pair(place, factors[name] | {"B": B}, config, transposed)

    pairs = dict(shared.collect(read, found))
    biases = {n: own["bias"] * pairs[n].scale for n, own in factors.items() if "bias" in own}
    added = list(changes(new, biases, config, weights))
    twice = 'so does what was read; mha_out_proj="twice" agrees to that, "once" mends it'
    warn(found.values(), weights, "" if mha_out_proj else twice, dropout(config))
    return [*((found[name].weight.name, pair) for name, pair in pairs.items()), *added]


def _pair(place: Place, tensors: Tensors, config: Config, transposed: bool | None) -> Pair:
    """Make a pair of factors that are said to be transposed or not, or raise a `ValueError`."""
    A, B, lengths = tensors["A"], tensors["B"], tensors.get("lora_magnitude_vector")
    idle = place.kind == "alone" and not B.any()
    for reason in refusals(place, idle=idle, dora=lengths is not None):
        raise FileError(reason)
    if (lengths is not None) != (used := bool(config.get("use_dora"))):
        has = "no" if used else "a"
        raise ValueError(f"has {has} lora_magnitude_vector, by its {CONFIG} use_dora={used}")
    rank, alpha = rank_and_alpha(config, place.key)
    experts = place.stack[0] if place.stack else 1
    if isinstance(place.weight.module, Unknown):
        experts = max(len(A) // max(rank, 1), 1)
    if rank < 1 or len(A) != rank * experts:
        raise ValueError(f"has rank {len(A) / experts:g}, by its {CONFIG} {rank}")
    if place.stack and not (A.ndim == B.ndim == 2 and B.shape[1] == len(A)):
        raise ValueError(f"has factors {tuple(A.shape)} and {tuple(B.shape)}")
    if transposed is None:
        where = place.weight.name
        raise FileError(f"{where}: which side of a square matrix is which can't be known")
    able = drops(place.weight)
    numbers: dict[str, Any] = {"scaling": scaling(config), "dropout": able * dropout(config)}
    if lengths is not None:
        sizes = [1] * len(place.weight.shape or A.shape)
        sizes[bool(transposed)] = -1
        numbers["magnitude"] = lengths.reshape(sizes)
    if place.stack or experts > 1:
        A = A.reshape(-1, rank, A.shape[1])  # rows by expert, then rank
        B = B.reshape(len(B), rank, -1).movedim(2, 0)  # columns by rank, then expert
        A, B = (B.mT.contiguous(), A.mT.contiguous()) if transposed else (A, B.contiguous())
        return shared.low_rank(A, B, alpha, **numbers)
    return shared.of_layer(place.weight, A, B, alpha, transposed, **numbers)


def render(deltas: Mapping[Weight, Delta], weights: Outline, about: About) -> Content:
    """Lay out a folder for `PeftModel.from_pretrained(base, folder)`, or raise a `FileError`."""
    pairs = {weight: delta for weight, delta in deltas.items() if isinstance(delta, Pair)}
    whole = {weight: delta for weight, delta in deltas.items() if weight not in pairs}
    parameters = [weight.name for weight in pairs if weight.layer is UNLISTED]
    mixed = len({pair.scaling for pair in pairs.values()}) > 1
    placed: list[Placed] = [
        (place_of_weight(weight, weights, parameters), pair.plain("lora" if mixed else None))
        for weight, pair in pairs.items()
    ]
    shared.refuse(_unsayable(placed, weights), "written")
    placed = [*_with_whole_attentions(placed, weights)]
    places = [place for place, _ in placed]
    warn(places, weights, "the file holds half of it")
    wrapped = {place.weight.path: place.kind == "layer" for place in places}
    wrapped |= {place.key: False for place in places if place.kind in ("in_proj", "out_proj")}
    plain, said = render_whole(whole, weights, wrapped, about)
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in plain.items()}
    for place, delta in placed:
        name = f"{PREFIX}{place.name}."
        ends = ("lora_A.weight", "lora_B.weight")
        if place.weight.layer.kind is nn.Embedding:
            ends = ("lora_embedding_A", "lora_embedding_B")
        for end, factor in zip(ends, _factors_in_file(place, delta), strict=True):
            tensors[name + end] = factor.contiguous()
        if isinstance(delta, DoRA):
            m, kernel = delta.magnitude.detach().flatten(), [1] * (delta.magnitude.ndim - 2)
            tensors[f"{name}lora_magnitude_vector"] = m.view(1, -1, *kernel) if kernel else m
    config = {"base_model_name_or_path": about.model or None, **_config(placed, weights), **said}
    return Content(tensors, {"format": "pt", **about.metadata}, config, _card(about.model))


def _card(base: str) -> str:
    """Write a model card, as far as a model's home reads it."""
    said = {"library_name": "peft", "tags": ["lora", *[f"base_model:adapter:{base}"] * bool(base)]}
    said |= {"base_model": base} if base else {}
    fields = "".join(f"{name}: {json.dumps(value)}\n" for name, value in said.items())
    return f"---\n{fields}---\n\n# LoRA adapter{' of ' * bool(base)}{base}\n"


def _unsayable(placed: Sequence[Placed], weights: Outline) -> Iterator[str]:
    """Yield what PEFT has no place for, and what its config can't say."""
    for place, pair in placed:
        yield from refusals(place, written=True, dora=isinstance(pair, DoRA))
    targets = {place.weight.name for place, _ in placed if place.kind == "parameter"}
    for name in weights.weights if targets else ():
        if not _tails(name).isdisjoint(targets):
            yield f"{name}: PEFT would adapt it too, because a target's name is its end"
    if targets and any(place.weight.layer.kind == CONV1D for place, _ in placed):
        yield f"{min(targets)}: PEFT can't adapt it in one file with a Conv1D"
    others = [place.weight.name for place, pair in placed if not isinstance(pair, DoRA)]
    if others and len(others) < len(placed):
        yield f"{others[0]}: PEFT has one use_dora for all"
    said: dict[str, tuple[int, float]] = {}
    for place, pair in placed:
        numbers, m = (pair.rank, pair.alpha), pair.magnitude if isinstance(pair, DoRA) else None
        if said.setdefault(place.key, numbers) != numbers:
            yield f"{place.key}: PEFT has one rank and one alpha for both parts of an attention"
        if m is not None and m.shape[place.weight.layer.transposed] != m.numel():
            yield f"{place.weight.name}: PEFT has lengths of outputs, not of inputs"


def _is_transposed(place: Place, A: Tensor, config: Config, vague: bool) -> bool | None:
    """Tell whether factors are for a weight stored `(in, out)`; `None` if that can't be known."""
    facts, shape = facts_of(place.weight.module), place.weight.shape or ()
    if place.stack:
        if shape[1] != shape[2]:
            return A.shape[1] == shape[1]
        match = re.match(r"(\d+)\.(\d+)\.(\d+)", str(config.get("peft_version")))
        if match is None or facts.get("is_transposed") is None:
            return None
        # PEFT took all stacks for such before 0.19, just the others in 0.19.0, and then only such.
        version = tuple(map(int, match.groups()))
        return version < (0, 19, 0) or facts.get("is_transposed") == (version > (0, 19, 0))
    if place.kind == "layer" and not facts and len(shape) == 2:  # is guessed
        square = shape[0] == shape[1]
        return (None if vague else False) if square else A.shape[1] == shape[0]
    return place.kind == "layer" and place.weight.layer.kind == CONV1D


def _factors_in_file(place: Place, delta: Pair) -> tuple[Tensor, Tensor]:
    A, B = delta.lora_A.detach(), delta.lora_B.detach()
    if place.stack:
        A, B = (B.mT, A.mT) if facts_of(place.weight.module).get("is_transposed") else (A, B)
        return A.flatten(0, 1), B.movedim(0, 2).flatten(1)
    transposed = place.kind == "layer" and place.weight.layer.transposed
    return shared.factors_with_kernel(*shared.stored_factors(A, B, transposed), place.weight.shape)


def _with_whole_attentions(placed: Sequence[Placed], weights: Outline) -> Iterator[Placed]:
    """Halve what PEFT applies twice, and add zeros for the part of an attention that is left."""
    held = {place.weight for place, _ in placed}
    for place, delta in placed:
        A, B = delta.lora_A.detach(), delta.lora_B.detach()
        halved = place.kind == "out_proj"
        yield place, shared.low_rank(A, B * 0.5, **delta.numbers) if halved else delta
        other = {"in_proj": "out_proj.weight", "out_proj": "in_proj_weight"}.get(place.kind)
        partner = weights.weight(join(place.key, other)) if other else None
        if partner is not None and partner not in held and partner.shape:
            zeros = B.new_zeros(partner.shape[0], delta.rank)
            idle = shared.low_rank(A, zeros, **delta.numbers)
            yield place_of_weight(partner, weights, ()), idle


def _config(placed: Sequence[Placed], weights: Outline) -> dict[str, Any]:
    numbers = {place.key: (delta.rank, delta.alpha) for place, delta in placed}
    [((rank, alpha), _)] = Counter(numbers.values()).most_common(1) or [((8, 8.0), 0)]
    targets = {place.key for place, _ in placed if place.kind != "parameter"}
    # A list also finds what ends like one of its names; an expression has to match in full.
    vague = any(not _tails(path).isdisjoint(targets) for path in weights.modules.keys() - targets)
    listed = sorted(targets) if placed else NO_LAYERS
    return {
        "peft_type": "LORA",
        "peft_version": "0.19.1",  # the first with this layout of stacks
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "use_dora": any(isinstance(delta, DoRA) for _, delta in placed),
        "use_rslora": any(delta.scaling == "rslora" for _, delta in placed),
        "rank_pattern": {f"^{re.escape(k)}": r for k, (r, _) in numbers.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(k)}": a for k, (_, a) in numbers.items() if a != alpha},
        "target_modules": "|".join(map(re.escape, sorted(targets))) if vague else listed,
        "target_parameters": [p.weight.name for p, _ in placed if p.kind == "parameter"] or None,
        "fan_in_fan_out": any(place.weight.layer.kind == CONV1D for place, _ in placed),
        "lora_dropout": _common_dropout(placed),
    }


def _common_dropout(placed: Sequence[Placed]) -> float:
    """Return the one dropout that PEFT has for all layers; where it can't be one, warn."""
    dropouts = {delta.dropout for _, delta in placed}
    if len(dropouts) == 1 and all(place.kind == "layer" for place, _ in placed):
        return dropouts.pop()
    if dropouts - {0.0}:
        names = ", ".join(place.weight.name for place, delta in placed if delta.dropout)
        warnings.warn(f"PEFT has one dropout for all; the file holds none: {names}", stacklevel=6)
    return 0.0


def _tails(name: str) -> set[str]:
    """Return what is behind each of a name's dots."""
    return {name[match.end() :] for match in re.finditer(r"\.", name)}
