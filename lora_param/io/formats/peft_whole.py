"""What PEFT trains whole: `modules_to_save` and biases, read and written, and tokens, read."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from itertools import accumulate

from torch import Tensor

from ...deltas import Delta, DenseDelta
from ...errors import FileError
from ...weight import join
from ..outline import Outline
from ..tensors import About, Config
from ..values import NewValues
from . import factors as shared

TOKENS = "token_adapter.trainable_tokens_delta"
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

CONTAINERS = ("ModuleDict", "ModuleList", "ParameterDict", "ParameterList", "Module")
"""Classes that PEFT can't wrap, and what a checkpoint's modules are called."""


def _parents(path: str) -> Iterator[str]:
    """Yield the paths of the modules in which one is, and its own."""
    return accumulate(path.split("."), "{}.{}".format)


def new_values(
    tensors: Mapping[str, Tensor], config: Config, weights: Outline
) -> tuple[dict[str, Delta], dict[str, Tensor]]:
    """Tell what of a file's plain tensors is trained from what is the base's, by plain names."""
    saved, biased = tuple(config.get("modules_to_save") or ()), config.get("bias", "none") != "none"
    if (rows := config.get("trainable_token_indices")) and not any(
        TOKENS in key for key in tensors
    ):
        raise FileError(f"trainable_token_indices={rows!r:.60}, of which no rows are in the file")
    new, base = dict[str, Delta](), dict[str, Tensor]()
    for key, tensor in tensors.items():
        if key.endswith(f".{TOKENS}"):
            path = key.removesuffix(f".{TOKENS}")
            new[f"{path}.weight"] = _tokens(path, tensor, config)
            continue
        name = re.sub(r"(\.base_layer)+\.|\.(modules_to_save|original_module)\.", ".", key)
        inside = any(path.endswith(saved) for path in _parents(name.rpartition(".")[0]) if saved)
        still = name in weights.tensors and weights.weight(name) is None  # nothing can train it
        trained = inside or (biased and name.endswith(".bias"))
        if trained and not still and ".original_module." not in key:
            new[name] = NewValues(tensor)  # of a head's bias there are two copies
        else:
            base[name] = tensor
    return new, base


def _tokens(path: str, tensor: Tensor, config: Config) -> NewValues:
    """Read an embedding's new rows, for which there is no narrower delta than the whole."""
    said = config.get("trainable_token_indices")
    if isinstance(said, Mapping):
        said = next((tokens for name, tokens in said.items() if path.endswith(name)), None)
    tokens = said if isinstance(said, list) and {*map(type, said)} == {int} else []
    repeated = len({*tokens}) < len(tokens) or min(tokens, default=-1) < 0
    if tensor.ndim != 2 or len(tokens) != len(tensor) or repeated:
        raise FileError(f"{path}: trainable_token_indices={said!r:.60} for {tuple(tensor.shape)}")
    warnings.warn(
        f"{path}.weight: PEFT trained {len(tokens)} tokens of it; here training goes on with all",
        stacklevel=5,
    )
    return NewValues(tensor, tokens)


def bias_of_update(path: str, bias: Tensor, weights: Outline) -> tuple[str, DenseDelta]:
    """Read the update's own bias, which adds to the layer's."""
    if weights.weight(join(path, "bias")) is None:
        raise FileError(f"{path}: lora_bias adds to the layer's bias, and it has none")
    return shared.dense(join(path, "bias"), bias)


def render_whole(
    deltas: Mapping[str, Delta], weights: Outline, wrapped: Mapping[str, bool], about: About
) -> tuple[dict[str, Tensor], Config]:
    """Lay out dense deltas and statistics; `wrapped` are paths, with whether each is a layer."""
    new = {name: _value(name, delta, weights) for name, delta in deltas.items()}
    modules = list(_whole_modules(new, weights))
    tensors, complaints = dict[str, Tensor](), list[str]()
    for path in modules:
        own = {name: each for name, each in weights.tensors.items() if name.startswith(f"{path}.")}
        tensors |= {name: new.get(name, tensor) for name, tensor in own.items()}
        for other in weights.modules:
            if other.endswith(path) and other not in modules:
                complaints.append(f"{other}: PEFT would save it too, because it ends like {path}")
    biases, left = set(), sorted(new.keys() - tensors.keys())
    if moving := [name for name in left if deltas[name].of_buffers]:
        shared.warn_of_statistics("PEFT", moving)
    for name in (name for name in left if name not in moving):
        path, _, tensor = name.rpartition(".")
        if tensor != "bias" or not all(wrapped.get(each, True) for each in _parents(path)):
            complaints.append(f"{name}: PEFT trains biases and whole modules; train all of {path}")
        biases.add(path)
        tensors[f"{path}.base_layer.bias" if path in wrapped else name] = new[name]
    shared.refuse(complaints, "written")
    return tensors, {
        "bias": ("lora_only" if biases <= wrapped.keys() else "all") if biases else "none",
        "modules_to_save": modules or None,
        **_task(about, weights, modules),
    }


def _value(name: str, delta: Delta, weights: Outline) -> Tensor:
    """Return what a tensor becomes."""
    weight = weights.weight(name)
    if weight is None or (tensor := weight.value) is None:
        raise FileError(f"{name}: PEFT keeps its new values; give the base, with --base")
    return delta.value(tensor.detach()).detach()


def _whole_modules(names: Collection[str], weights: Outline) -> Iterator[str]:
    """Yield the outermost modules all of whose parameters are trained whole."""
    left: Counter[str] = Counter()
    for name in weights.parameters:
        left.update(dict.fromkeys(_parents(name.rpartition(".")[0]), name not in names))
    found: tuple[str, ...] = ()
    for path, module in weights.modules.items():
        able = path and module.class_name not in CONTAINERS and not path.startswith(found or " ")
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
