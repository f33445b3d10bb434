"""What can't be done, and why: each rule is a row."""

import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from enum import IntEnum
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .activation import acts
from .chains import chains_of, type_before
from .deltas.protocol import FLOATS, SPACES, Delta, show_dtypes
from .errors import AdapterError, LoRAError, TargetError, shortened
from .quantised import is_packed, is_quantised, is_unfit, keeps_gradients, logical
from .sharding import is_sharded
from .walk import Walk
from .weight import Weight, merged_for_now

FIXED = {
    "DistributedDataParallel": "it synchronises the parameters it was given; register before "
    "wrapping, and afterwards pass its .module, when it is no longer trained",
    "FullyShardedDataParallel": "its parameters are sharded; call this before sharding",
    "ScriptModule": "its code is compiled; call this before scripting",
}
"""Torch's classes around or on a model after which no parameter can be added or taken away."""

OPTIMIZER = "build the optimizer after register_lora, of lora_parameters(model)"


class Need(IntEnum):
    """What a verb needs of a model, and all that is in front of it."""

    ANYTHING = 0
    TENSORS = 1  # of its adapters, in the model or never made
    ADAPTERS = 2  # that can be seen as they are
    STRUCTURE = 3  # that can change: nobody keeps a list of its parameters
    CHANGE = 4  # for good, with gradients


def walk(model: object, call: str, need: Need = Need.ANYTHING) -> Walk:
    """Walk a model once, or raise if it is no module, or not what a verb needs."""
    if not isinstance(model, nn.Module):
        raise LoRAError(f"{call} takes a torch.nn.Module, got {type(model).__name__}; pass a model")
    check_model(found := Walk(model), call, need)
    return found


def check_model(walk: Walk, call: str, need: Need) -> None:
    """Raise unless a model is what a verb needs."""
    for where, reason in _unmet(walk, need):
        raise LoRAError(f"{where}: {call} can't be called{reason}")
    if need >= Need.CHANGE and torch.is_inference_mode_enabled():
        reason = "what is made there never gets a gradient; call it outside"
        raise LoRAError(f"{call} can't be called in torch.inference_mode: {reason}")


def _unmet(walk: Walk, need: Need) -> Iterator[tuple[str, str]]:
    merged = {*merged_for_now}
    deltas = {delta: w.name for w, delta in walk.deltas} if need == Need.TENSORS else {}
    for module, path in (walk.owners | deltas).items() if need else ():
        where, marks = path or "model", module.__dict__
        below = getattr(marks.get("_hf_hook"), "place_submodules", False)
        needed = need > Need.TENSORS or below or module in deltas
        if (
            needed
            and "_hf_hook" in marks
            and any(each.is_meta for each in module.parameters(below))
        ):
            fix = "first call accelerate.hooks.remove_hook_from_submodules(model), and dispatch it"
            yield where, f": its weights are away, where accelerate has put them; {fix} again after"
        if need >= Need.ADAPTERS and module in merged:
            reason = "in a lora_merged block, in which there are no adapters"
            yield where, f" {reason}; call it after the block"
        for base in type(module).__mro__ if need >= Need.ADAPTERS else ():
            if base.__name__ in FIXED and base.__module__.startswith("torch."):
                yield where, f" on a {base.__name__}: {FIXED[base.__name__]}"
        if need >= Need.STRUCTURE and "_is_fsdp_managed_module" in marks:
            reason = "it knows those parameters alone that it was given"
            fix = "call this before sharding, or on an unsharded model, by save_lora and load_lora"
            yield where, f" on what FSDP shards: {reason}; {fix}"
    # Marks are there too while the parameters are whole for a moment.
    for weight, tensor in walk.parameters if need >= Need.STRUCTURE else ():
        if hasattr(tensor, "ds_id"):
            fix = "call this before deepspeed.initialize, and outside of zero.Init"
            yield weight.name, f": DeepSpeed partitions it; {fix}"


def check_ready(walk: Walk) -> None:
    """Raise while `from_pretrained` builds the model, whose weights it then looks for by name."""
    empty = [weight for weight, tensor in walk.parameters if tensor.is_meta]
    for frame, _ in traceback.walk_stack(None) if empty else ():
        home = frame.f_globals.get("__name__", "").partition(".")[0]
        if frame.f_code.co_name == "from_pretrained" and home in ("transformers", "diffusers"):
            reason = f"{home} would load neither the adapted weights nor adapters"
            fix = "call it on the model that from_pretrained returns"
            raise LoRAError(f"register_lora can't be called in from_pretrained: {reason}; {fix}")


def deltas_called(walk: Walk, adapter: str | None) -> list[tuple[Weight, Delta]]:
    """List the deltas, or those of one adapter, in model order, or raise an `AdapterError`."""
    if not isinstance(adapter, (str, type(None))):
        rule = "adapter must be one name, or None for all"
        raise AdapterError(f"{rule}, got {adapter!r:.60}; make a call for each")
    wanted = [pair for pair in walk.deltas if adapter in (None, pair[1].adapter)]
    if not wanted:
        names = sorted({delta.adapter for _, delta in walk.deltas})
        there = ", ".join(map(repr, names)) or "none; call register_lora(model) first"
        which = "an adapter" if adapter is None else f"an adapter {adapter!r}"
        raise AdapterError(f"there is no weight with {which}; the model has {there}")
    return wanted


def check_weights(weights: Sequence[Weight], adapter: str) -> None:
    """Raise for the first weight that can't be adapted, naming the rule and the fix."""
    for weight in weights:
        for reason in _reasons(weight):
            raise TargetError(f"{weight.name}: {reason}, or exclude this weight")
        for entry in weight.chain:
            ours = isinstance(entry, Delta) and entry.adapter == adapter
            if ours and weight.overlaps(entry.rows):  # type: ignore[arg-type]
                there = f'there is an adapter "{adapter}" on this weight already'
                fix = "choose another name, or remove that one first"
                raise AdapterError(f"{weight.name}: {there}; {fix}")


def check_trainable(walk: Walk) -> None:
    """Raise for the first weight in front of which nothing could be trained."""
    for weight, tensor in walk.parameters:
        known = type(tensor) is nn.Parameter or not is_quantised(tensor) or is_packed(tensor)
        if known or keeps_gradients(tensor):
            continue
        reason = "no gradient reaches a layer's input through it, because its activations are "
        fix = "quantise weights alone, or load an adapter with trainable=False"
        raise LoRAError(f"{weight.name}: {reason}quantised as they come; {fix}")


def check_space(
    weights: Sequence[Weight], dropout: float, space: str = "auto", kind: type[Delta] = Delta
) -> None:
    """Raise unless all of these weights can be computed in a space, and with a dropout."""
    if space not in SPACES:
        raise LoRAError(f"space must be one of {[*SPACES]}, got {space!r:.60}")
    if space == "weight" and dropout:
        raise LoRAError(f"dropout={dropout} needs activation space; drop space or the dropout")
    for weight in weights if dropout or space == "activation" else ():
        able, layer = acts(weight.module, weight.tensor), type_before(weight.module).__name__
        if dropout and not (able and weight.layer.drops):
            rule = "dropout needs a layer that computes in activation space, and an input to drop"
            fix = f"from, which a {layer} has not; use dropout=0, or exclude this weight"
            raise TargetError(f"{weight.name}: {rule} {fix}")
        if space == "activation" and not (able and kind.act):
            where = f"a {layer}'s {weight.tensor} here is computed in weight space"
            fix = 'drop space="activation", or exclude this weight'
            raise TargetError(f"{weight.name}: a {kind.kind} delta on {where}; {fix}")


def check_pairs(pairs: Sequence[tuple[Weight, Delta]]) -> None:
    """Raise for the first delta that would not be read, or would end another's dropout."""
    for weight, delta in pairs:
        if delta.of_buffers and not weight.chain:
            rule = _taken(weight, "_buffers")
            if getattr(weight.module, weight.tensor) is not weight.original:
                rule = "reading it gives something else than the buffer itself"
            if rule:
                raise TargetError(f"{weight.name}: {rule}, or register with statistics=False")
        for other in weight.whole.deltas if weight.chain and not delta.has_own("act") else ():
            if other.numbers.get("dropout"):
                what = f"adapter {other.adapter!r} drops entries of the input"
                reason = f"which a {delta.kind} delta beside it would end"
                fix = "set its dropout to 0, or exclude this weight"
                raise TargetError(f"{weight.name}: {what}, {reason}; {fix}")


def check_unshared(walk: Walk, weights: Sequence[Weight], consequence: str) -> None:
    """Raise for the first weight whose Parameter is another module's too."""
    for weight in weights if walk.shared else ():
        if others := walk.partners(weight):
            what = "buffer" if weight.is_buffer else "Parameter"
            otherwise = "pass statistics=False" if weight.is_buffer else "exclude this weight"
            fix = f"give each place a {what} of its own, or {otherwise}"
            same = all(other.original is weight.whole.original for other in others)
            what = f"is the same {what}" if same else "has memory in common with it"
            raise TargetError(f"{weight.name}: {_names(others)} {what}, and {consequence}; {fix}")


def without_tied(walk: Walk, weights: Sequence[Weight]) -> list[Weight]:
    """Leave out, with a warning that names them, the weights that are tied to an embedding."""
    tied = {}
    for weight in weights if walk.shared else ():
        others = walk.partners(weight)
        if any(isinstance(other.module, (nn.Embedding, nn.EmbeddingBag)) for other in others):
            tied[weight] = f"{weight.name} (is {_names(others)})"
    if tied:
        listing = "; ".join(tied.values())
        warnings.warn(f"not adapted, because tied to an embedding: {listing}", stacklevel=4)
    if tied and len(tied) == len(weights):
        raise TargetError("every weight is tied to an embedding; name other weights with target")
    return [weight for weight in weights if weight not in tied]


def warn_of_thawed(walk: Walk, trained: Collection[str]) -> None:
    """Warn of what was thawed in a frozen model, and is going to be frozen without an adapter."""
    thawed = [weight for weight, tensor in walk.parameters if tensor.requires_grad]
    able = [t for _, t in walk.parameters if type(t) is nn.Parameter or not is_quantised(t)]
    few = len(thawed) < len(able) / 2  # else they are as most models come
    if left := [weight.name for weight in thawed if weight.name not in trained] if few else []:
        fix = "name them with train= to train them whole, or pass freeze=False"
        reason = "could be trained in a model that was frozen else, and no adapter trains them"
        what = f"freeze=True freezes {shortened(left, 5, ', ')}"
        warnings.warn(f"{what}, which {reason}; {fix}", stacklevel=4)


def moving_without(walk: Walk, adapter: str, copied: bool = True) -> list[Weight]:
    """List the buffers that training moves and of which an adapter has no copy."""
    moving = [w for w in walk.moving if adapter not in (delta.adapter for delta in w.deltas)]
    for weight in moving if copied else ():
        if is_lazy(weight.original):  # type: ignore[arg-type]
            fix = "run one forward first, or pass statistics=False"
            raise TargetError(f"{weight.name}: it is lazy and has no shape yet; {fix}")
    return moving


def warn_of_moving(weights: Sequence[Weight]) -> None:
    """Warn of the base's buffers that training is going to move."""
    if weights:
        what = "training moves these buffers of the base, which no adapter holds"
        fix = "keep such layers in eval mode, or drop statistics=False"
        names = shortened([weight.name for weight in weights], 3, ", ")
        warnings.warn(f"{names}: {what}; {fix}", stacklevel=4)


def warn_of_saved(walk: Walk, pairs: Sequence[tuple[Weight, Delta]]) -> None:
    """Warn of an adapter that changes nothing, and of training of the base, which isn't saved."""
    trained = [list(delta.parameters()) for _, delta in pairs if not delta.of_buffers]
    if all(any(not each.any() for each in parameters) for parameters in trained):
        reason = f"adapter {pairs[0][1].adapter!r} was never trained: its update is zero everywhere"
        warnings.warn(f"{reason}; if it should have been, {OPTIMIZER}", stacklevel=3)
    if loose := [weight.name for weight, tensor in walk.parameters if tensor.requires_grad]:
        what = f"{shortened(loose, 3, ', ')} can be trained"
        fix = "freeze them, train them by train=, or keep base_state_dict(model) too"
        reason = "a file of adapters doesn't hold what trained the base"
        warnings.warn(f"{reason}, and {what}; {fix}", stacklevel=3)


def _names(weights: Sequence[Weight]) -> str:
    return ", ".join(weight.name for weight in weights)


def _reasons(weight: Weight) -> Iterator[str]:
    """Yield why a weight can't be adapted; a later rule relies on what an earlier one refuses."""
    module, tensor, chain = weight.module, weight.whole.original, weight.chain
    own = module._modules | module._parameters | module._buffers
    if "parametrizations" in own and not chains_of(module):
        yield 'its module has something else called "parametrizations", where torch keeps its own'
    yield from _norms(module, weight.tensor)
    if weight.tensor in own and getattr(module, weight.tensor, None) is not own[weight.tensor]:
        yield "reading it gives something else than the Parameter itself; adapt what computes it"
    if rule := _taken(weight, "_parameters"):
        yield rule
    if not chain and tensor is None and weight.tensor in module._parameters:
        yield "it is None; give the module a Parameter"
    elif not chain and tensor is None:
        yield "it is no Parameter of its module; make it one"
    if reason := weight.layer.refusal(module):
        yield reason
    for unfit, rule in TENSOR_RULES:
        if tensor is not None and unfit(tensor):
            yield rule.format(tensor, type(tensor).__name__, show_dtypes(tensor.dtype))
    try:
        _ = chain and weight.whole.like
    except Exception as error:
        names = ", ".join(type(entry).__name__ for entry in chain)
        yield f"reading it through {names} fails with {error!r}; mend or remove these"
    if weight.rows and getattr(module, "groups", 1) > 1 == weight.dim:
        yield "in groups, its output features are no rows of one tensor; adapt all of it"


def _taken(weight: Weight, table: str) -> str | None:
    """Say which code of its module's class takes a tensor out of a table, where it won't be."""
    for cls in type(weight.module).__mro__:
        for name, value in vars(cls).items() if not cls.__module__.startswith("torch.") else ():
            code = getattr(value, "__code__", None)
            if code and name != "__init__" and {table, weight.tensor} <= {*_words(code)}:
                return f"{cls.__name__}.{name} takes it out of {table}; read it as an attribute"
    return None


def _words(code: CodeType) -> Iterator[object]:
    yield from code.co_names
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield from _words(const)
        else:
            yield from const if isinstance(const, tuple) else [const]


def _norms(module: nn.Module, tensor: str) -> Iterator[str]:
    for hook in module._forward_pre_hooks.values():
        name = getattr(hook, "name", getattr(hook, "_tensor_name", None))
        torchs = type(hook).__module__.startswith("torch.nn.utils.")
        if torchs and name and tensor in (name, f"{name}_g", f"{name}_v", f"{name}_orig"):
            fix = "make it permanent (remove_weight_norm, remove_spectral_norm, prune.remove)"
            found = f"the forward hook {type(hook).__name__} sets this tensor before every forward"
            yield f"{found}; {fix}, or use torch.nn.utils.parametrizations"


def _cant_be_added_to(tensor: Tensor) -> bool:
    if type(tensor) in (Tensor, nn.Parameter) or is_sharded(tensor) or is_quantised(tensor):
        return False
    try:
        with torch.no_grad():
            tensor + torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    except (NotImplementedError, RuntimeError, TypeError):
        return True
    return False


TENSOR_RULES: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (is_lazy, "it is lazy and has no shape yet; run one forward first"),
    (lambda tensor: not tensor.numel(), "it has no elements"),
    (
        torch.is_inference,
        "it was made in torch.inference_mode and can never be trained; build the model outside",
    ),
    (
        is_unfit,
        "bitsandbytes hasn't quantised it, or has packed it for inference alone; build its layer "
        "with has_fp16_weights=False, move it to its device, and adapt it before it computes",
    ),
    (
        lambda tensor: tensor.dtype not in FLOATS and logical(tensor).dtype not in FLOATS,
        f"its dtype must be one of {show_dtypes(*FLOATS)}, got {{2}}; convert it",
    ),
    (
        lambda tensor: tensor.layout is not torch.strided,
        "its layout must be strided, got {0.layout}; make it dense",
    ),
    (_cant_be_added_to, "a {1} can't be added to a plain tensor; dequantize it first"),
)
"""What a tensor must not be, and why: the reason can name it {0}, its type {1}, its dtype {2}."""
