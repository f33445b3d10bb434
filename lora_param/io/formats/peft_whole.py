"""What PEFT trains whole: `modules_to_save`, biases and the rows of tokens, read and written."""

import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from itertools import accumulate

import torch
from torch import Tensor, nn

from ...deltas import Delta, StatisticsDelta
from ...deltas.protocol import tensors_of
from ...errors import FileError, TargetError
from ...rows import Rows
from ...sharding import is_sharded, whole
from ...weight import Weight, join
from ..outline import LINEARS, Outline, class_name
from ..tensors import About, Config, Tensors
from . import factors as shared

TOKENS = "token_adapter.trainable_tokens_delta"
OF_TOKENS = "PEFT trains rows of an embedding, or of a linear layer without bias"
NO_LAYERS = "dummy-target-modules"
"""What PEFT takes for the `target_modules` of an adapter without any."""

TASKS = {
    "ForCausalLM": ("CAUSAL_LM", ()),
    "LMHeadModel": ("CAUSAL_LM", ()),
    "ForSequenceClassification": ("SEQ_CLS", ("classifier", "score")),
    "ForTokenClassification": ("TOKEN_CLS", ("classifier", "score")),
    "ForQuestionAnswering": ("QUESTION_ANS", ("qa_outputs",)),
}
"""By how a class's name ends: PEFT's name for its task, and what it then saves unasked."""

NEW = "values"
"""The origin of a delta that holds what a tensor becomes, because the tensor isn't known."""

CONTAINERS = ("ModuleDict", "ModuleList", "ParameterDict", "ParameterList", "Module")
"""Classes that PEFT can't wrap, and what a checkpoint's modules are called."""


def difference(new: Tensor, old: Tensor) -> Tensor:
    """Return `D` in the narrowest dtype in which `(old + D).to(old.dtype)` is `new`, to the bit.

    Where a float64 can't say it, because `new` is smaller than `old` by some 2**29, it is the
    nearest that there is.
    """
    old = old.detach().to(new.device)
    for dtype in (old.dtype, torch.float32, torch.float64):
        wide = torch.promote_types(torch.promote_types(old.dtype, new.dtype), dtype)
        added = new.to(wide) - old
        if torch.equal((old + added).to(old.dtype), new.to(old.dtype)):
            break
    return added


def _parents(path: str) -> Iterator[str]:
    """Yield the paths of the modules in which one is, and its own."""
    return accumulate(path.split("."), "{}.{}".format)


def new_values(
    tensors: Tensors, config: Config, weights: Outline
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tell what of a file's plain tensors is trained from what is the base's, by plain names."""
    saved, biased = tuple(config.get("modules_to_save") or ()), config.get("bias", "none") != "none"
    said = config.get("trainable_token_indices")
    if said and not any(TOKENS in key for key in tensors):
        raise FileError(f"trainable_token_indices={said!r:.60}, of which no rows are in the file")
    new, base, missing = dict[str, Tensor](), dict[str, Tensor](), dict[str, None]()
    for key, tensor in tensors.items():
        if key.endswith(f".{TOKENS}"):
            new |= [_tokens(key.removesuffix(f".{TOKENS}"), tensor, config, weights)]
            continue
        plain = re.sub(r"\.modules_to_save\.[^.]+\.", ".", key)
        if plain != key and plain in tensors:  # a bias once more, under the adapter's name
            continue
        name = re.sub(r"(\.base_layer)+\.|\.(modules_to_save|original_module)\.", ".", key)
        heads = [path for path in _parents(name.rpartition(".")[0]) if path.endswith(saved)]
        still = name in weights.tensors and weights.weight(name) is None  # nothing can train it
        trained = heads or (biased and name.endswith(".bias"))
        if trained and not still and ".original_module." not in key:
            new[name] = tensor  # of a head's bias there are two copies
            missing |= {head: None for head in heads if head not in weights.modules}
        else:
            base[name] = tensor
    if missing and not weights.unknown:
        mapping, task = config.get("auto_mapping"), config.get("task_type")
        cls = mapping.get("base_model_class") if isinstance(mapping, Mapping) else None
        auto = next((f"AutoModel{name}" for name, own in TASKS.items() if task == own[0]), None)
        raise FileError(
            f"{', '.join(missing)}: trained whole by modules_to_save, and this model has no such "
            f"module; load it on a model that has, {cls or auto or 'of its own class'}"
        )
    return new, base


def _tokens(path: str, tensor: Tensor, config: Config, weights: Outline) -> tuple[str, Tensor]:
    """Read the new rows of tokens, in any order, as those of a block."""
    said = config.get("trainable_token_indices")
    if isinstance(said, Mapping):
        said = next((tokens for name, tokens in said.items() if path.endswith(name)), None)
    tokens = said if isinstance(said, list) and {*map(type, said)} == {int} else []
    fault = f"{path}: trainable_token_indices={said!r:.60} for {tuple(tensor.shape)}"
    if tensor.ndim != 2 or len(tokens) != len(tensor):
        raise FileError(fault)
    name = join(path, "weight")
    if (weight := weights.weight(name)) is None:
        return name, tensor  # of a model that has no such weight
    if not weights.unknown and not _has_tokens(weight, weights):
        raise FileError(f"{name}: {OF_TOKENS}")
    try:
        rows = Rows.of(tokens, (weight.shape or (max(tokens) + 1,))[0])
    except TargetError as error:
        raise FileError(f"{fault}: {error!s:.200}") from None
    order = torch.tensor(tokens, device=tensor.device).argsort()
    return f"{name}[{rows}]", tensor[order]


def _has_tokens(weight: Weight, weights: Outline) -> bool:
    """Say whether PEFT's rows of tokens are a change of a weight alone; it drops a bias."""
    bias = weights.weight(join(weight.path, "bias"))
    linear = weight.layer.kind in LINEARS and (bias is None or bias.shape is None)
    return weight.tensor == "weight" and (weight.layer.kind is nn.Embedding or linear)


def _render_tokens(
    deltas: Mapping[Weight, Delta], weights: Outline, wrapped: Collection[str]
) -> tuple[dict[str, Tensor], Config]:
    """Lay out dense deltas on blocks of rows, none of them of what is `wrapped` otherwise."""
    tokens, values = defaultdict[str, list[int]](list), defaultdict[str, list[Tensor]](list)
    complaints = []
    for weight, delta in deltas.items():
        if not weight.path or not _has_tokens(weight, weights):
            complaints.append(f"{weight.name}: {OF_TOKENS}")
        elif weight.path in wrapped:
            reason = "PEFT has no rows of tokens of a layer that it adapts too"
            complaints.append(f"{weight.name}: {reason}")
        else:
            tokens[weight.path] += weight.rows or ()
            values[weight.path].append(_value(weight, delta))
    shared.refuse([*complaints, *_ambiguous(tokens, weights)], "written")
    tensors = {f"{path}.{TOKENS}": torch.cat(own) for path, own in values.items()}
    return tensors, {"trainable_token_indices": dict(tokens)} if tokens else {}


def changes(
    new: Tensors, biases: Tensors, config: Config, weights: Outline
) -> Iterator[shared.Named]:
    """Yield what new values and the updates' own biases, by paths, add to the weights."""
    values = dict(new)
    for path, bias in biases.items():
        name = join(path, "bias")
        if weights.weight(name) is None:
            raise FileError(f"{path}: lora_bias adds to the layer's bias, and it has none")
        if name in values:
            values[name] = values[name] + bias
        else:
            yield name, shared.dense(bias)
    if biases and not config.get("lora_bias"):
        reason = "lora_B.bias is read; PEFT drops it: lora_bias=False"
        warnings.warn(f"{', '.join(biases)}: {reason}", stacklevel=6)
    yield from shared.collect(
        lambda name: [(name, _change(values[name], weights.weight(name)))], values
    )


def _change(new: Tensor, weight: Weight | None) -> Delta:
    """Return what gives a weight new values; of one that isn't known the values themselves."""
    known = weight is not None and weight.like is not None and not weight.like.is_meta
    if weight is None or not known:
        as_buffer = StatisticsDelta.restore({"S": new}, {})
        delta = shared.dense(new) if new.is_floating_point() else as_buffer
        delta.origin = NEW
    elif (old := weight.like).shape != new.shape:
        raise ValueError(f"its new values are {(*new.shape,)}, should be {(*old.shape,)}")
    elif weight.is_buffer:
        delta = StatisticsDelta.restore({"S": new.to(old.dtype)}, {})
    else:
        delta = shared.dense(difference(new, whole(old)))
    delta.rows = weight.rows if weight else None
    return delta


def render_whole(
    deltas: Mapping[Weight, Delta], weights: Outline, wrapped: Mapping[str, bool], about: About
) -> tuple[dict[str, Tensor], Config]:
    """Lay out dense deltas and statistics; `wrapped` are paths, with whether each is a layer."""
    blocks = {weight: delta for weight, delta in deltas.items() if weight.rows}
    rows, tokens = _render_tokens(blocks, weights, wrapped)
    whole = {weight.name: (weight, delta) for weight, delta in deltas.items() if not weight.rows}
    moving = {name: pair for name, pair in whole.items() if pair[1].of_buffers}
    new = {name: _value(*pair) for name, pair in whole.items() if name not in moving}
    modules = list(_whole_modules(new, weights))
    inside = tuple(f"{path}." for path in modules)
    saved = [name for name in weights.tensors if name.startswith(inside)]
    new |= {name: _value(*moving[name]) for name in saved if name in moving}
    tensors = {name: new.get(name, weights.tensors[name]) for name in saved}
    if left := sorted(moving.keys() - tensors.keys()):
        shared.warn_of_statistics("PEFT", left)
    biases = sorted(new.keys() - tensors.keys())
    shared.refuse([*_ambiguous(modules, weights), *_homeless(biases, wrapped)], "written")
    paths = {name: name.removesuffix(".bias") for name in biases}
    for name, path in paths.items():
        tensors[f"{path}.base_layer.bias" if path in wrapped else name] = new[name]
    kind = "lora_only" if wrapped.keys() >= {*paths.values()} else "all"
    said = {"bias": kind if biases else "none", "modules_to_save": modules or None}
    return tensors | rows, {**said, **tokens, **_task(about, weights, modules)}


def _ambiguous(modules: Collection[str], weights: Outline) -> Iterator[str]:
    """Yield the modules that PEFT would take for one of those that it is to save."""
    for path in weights.modules:
        if (named := next(filter(path.endswith, modules), None)) and path not in modules:
            yield f"{path}: PEFT would save it too, because it ends like {named}"


def _homeless(names: Collection[str], wrapped: Mapping[str, bool]) -> Iterator[str]:
    """Yield what isn't the bias of a layer, or of one inside of what PEFT wraps otherwise."""
    for name in names:
        path, _, tensor = name.rpartition(".")
        if tensor != "bias" or not path or not all(wrapped.get(p, True) for p in _parents(path)):
            yield f"{name}: PEFT trains biases and whole modules; train all of {path}"


def _value(weight: Weight, delta: Delta) -> Tensor:
    """Return what a tensor becomes."""
    if len(weight.chain) > len(weight.whole.deltas):
        reason = "PEFT keeps its new values, which another's parametrization computes here"
        raise FileError(f"{weight.name}: {reason}; remove that one first, or write our own file")
    if (tensor := weight.like).is_meta or is_sharded(tensor):
        fix = "convert a native file with the base, by --base"
        raise FileError(f"{weight.name}: PEFT keeps its new values; {fix}")
    full = delta.made_of(tensors_of(delta), delta.numbers)
    full.strength = 1.0  # as the pairs beside it are written
    return full.value(tensor.detach()).detach()


def _whole_modules(names: Collection[str], weights: Outline) -> Iterator[str]:
    """Yield the outermost modules all of whose parameters are trained whole."""
    left: Counter[str] = Counter()
    for weight, _ in weights.walk.parameters:
        left.update(dict.fromkeys(_parents(weight.path), weight.name not in names))
    found: tuple[str, ...] = ()
    for path, module in weights.modules.items():
        able = path and class_name(module) not in CONTAINERS and not path.startswith(found)
        if able and path in left and not left[path]:
            found += (f"{path}.",)
            yield path


def _task(about: About, weights: Outline, modules: Collection[str]) -> Config:
    """Name the task, where PEFT saves for its sake what is trained whole and nothing else."""
    ending = next((each for each in TASKS if about.cls.endswith(each)), None)
    task, saved = TASKS[ending] if ending else (None, ())
    if task and all(path in modules for path in weights.modules if path.endswith(saved)):
        return {"task_type": task}
    library, _, cls = about.cls.rpartition(".")
    mapping = {"base_model_class": cls, "parent_library": library}
    return {"task_type": None, "auto_mapping": mapping if cls else None}
