"""The verbs that adapt a model and give it back. Each does all of its work or none."""

import inspect
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from numbers import Integral
from typing import Any

import torch
from torch import nn

from . import checks
from .checks import Need, deltas_called, walk
from .deltas import KINDS, Delta, DenseDelta, StatisticsDelta
from .deltas.inits import DRAWS, Init
from .deltas.numbers import SCALINGS, Scaling, check_alpha, check_dropout, check_scaling
from .deltas.protocol import check_adapter
from .errors import LoRAError, in_our_words
from .frozen import freeze as freeze_base
from .frozen import hold_frozen, is_over, let_go, thaw
from .optim import watch
from .quantised import dense, is_packed
from .targets import Target, number_for_each, resolve
from .undo import all_or_nothing
from .walk import Walk
from .weight import Weight


@in_our_words
def register_lora(
    model: nn.Module,
    *,
    rank: int | Mapping[str, int] = 8,
    alpha: float | Mapping[str, float | None] | None = None,
    target: Target | None = None,
    exclude: Target | None = None,
    train: Target | None = None,
    adapter: str = "default",
    freeze: bool = True,
    statistics: bool = True,
    kind: str = "lora",
    scaling: Scaling = "lora",
    dropout: float = 0.0,
    init: Init = "kaiming",
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    space: str = "auto",
) -> list[str]:
    """Adapt a model in place: each chosen weight reads `W + (B @ A).view_as(W) * alpha / rank`.

    Modules stay instances of their types, originals the same objects with the same bits, and the
    output is equal to the model's own until `lora_B` has been trained. An optimizer built earlier
    doesn't know the adapters, which its next step warns of: give it `lora_parameters(model)`.

    Args:
        model: Any module; the model itself may be the layer.
        rank: A positive integer, lowered to the smaller side of a weight's matrix view where that
            is less, with the scale that was asked for; or a mapping from pattern to the rank to
            take as it is, of which the first pattern that matches a weight decides.
        alpha: A finite number or a mapping from pattern to number; `None` means `rank`.
        target: What to adapt: a glob over a parameter's full name, its module's path, or a dotted
            suffix of either (`"q_proj"` finds `layers.3.q_proj`); a module type; a predicate
            `(module's path, module) -> bool`; or several of these. `None` means every weight of
            linear, convolution, bilinear, attention and recurrent layers. A glob may end in rows,
            `"*.c_attn[0:768]"`, for a block of output features, of an embedding tokens, with a pair
            of its own. Rows are `[start:stop]`, `[start:stop:step]` or, as for the queries of
            heads, `[start:stop:step+width]`. The pair `(selector, rows)` does the same for any
            selector, where rows are such a text, a slice, numbers, or a function from how many
            there are.
        exclude: The same, for what is left out of `target`, or with `target=()` out of `train`.
        train: What to train whole, as `W + D` (`DenseDelta`): parameters of any dimensions. A
            module's path, type or predicate means all below it. `target=()` trains nothing else;
            what both name is trained whole.
        adapter: The adapter's name, without dots. Several adapters on one weight add up.
        freeze: Freeze every parameter that is no adapter's and clear its `.grad`, with a warning of
            those in a frozen model that had been thawed; `remove_lora` gives the flags back.
        statistics: With `freeze`, give each buffer that training moves, a batch norm's statistics,
            a copy of the adapter's own to move. `False` lets training move the base's, and warns.
        kind: `"lora"`, or another row of `lora_param.deltas.KINDS`, with the options that it takes.
        scaling: What `alpha` is divided by: the rank, or with `"rslora"` its square root.
        dropout: As for `LoRAParametrization`; every weight must be computed in activation space.
        init: How a pair starts: `"kaiming"`, `"gaussian"` or `"orthogonal"`, drawn as
            `LoRAParametrization` says; from the weight's largest singular values, `"pissa"`, its
            smallest, `"milora"`, or its QR decomposition, `"olora"`; or a function `(matrix view,
            rank, scale, generator) -> (B0, A0)`. The update is `(B A - B0 A0) * scale`, so that
            the original stays and a fresh adapter changes nothing.
        generator: Source of the draws, made in model order; the global one if `None`.
        dtype: The factors' dtype; `None` means each weight's own. Weight space computes in the
            wider dtype and rounds once; activation space casts factors to the input's dtype.
        space: Where a layer computes that can do both: `"activation"`, `"weight"`, or with
            `"auto"`, for each input, whichever takes fewer multiplications. It isn't saved.

    Returns:
        The adapted parameters' names in model order, such as `["linear1.weight"]`.

    Raises:
        LoRAError: An option is out of range, or not for this kind; the model is wrapped or sharded;
            or the call is made in `torch.inference_mode`.
        TargetError: A pattern matches nothing, or a weight can't be adapted.
        AdapterError: The adapter's name is unusable, or taken on one of the weights.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(20, 10), torch.nn.Linear(10, 4))
        >>> register_lora(model, rank=2)
        ['0.weight', '1.weight']
        >>> [p.shape for p in model.parameters() if p.requires_grad][:2]
        [torch.Size([2, 20]), torch.Size([10, 2])]
        >>> register_lora(model, target="0", train="1", adapter="new head")
        ['0.weight', '1.weight', '1.bias']

    Source:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685,
        section 4.
    """
    found = walk(model, "register_lora", Need.CHANGE)
    checks.check_ready(found)
    check_adapter(adapter)
    if type(freeze) is not bool or type(statistics) is not bool:
        raise LoRAError(f"freeze and statistics must be bools, got {freeze!r} and {statistics!r}")
    given: dict[str, Any] = {"rank": rank, "alpha": alpha, "scaling": scaling, "dropout": dropout}
    given |= {"init": init, "generator": generator, "dtype": dtype}
    cls = _kind(kind, given)
    weights, whole = resolve(found, target, exclude, train, cls.least_dimensions)
    checks.check_weights([*weights, *whole], adapter)
    checks.check_trainable(found)
    if target is None:
        weights = checks.without_tied(found, weights)
    check_scaling(scaling)
    checks.check_space(weights, check_dropout(dropout), space, cls)
    ranks = number_for_each("rank", rank, weights)
    alphas = number_for_each("alpha", alpha, weights)
    pairs: list[tuple[Weight, Delta]] = []
    for weight, own_rank, own_alpha in zip(weights, ranks, alphas, strict=True):
        own = given | {"rank": own_rank, "alpha": own_alpha}
        try:
            delta = _fresh(weight, cls, own, lowered=isinstance(rank, Integral), adapter=adapter)
        except LoRAError as error:
            raise LoRAError(f"{weight.name}: {error}; or exclude this weight") from None
        delta.__dict__["space"] = space
        pairs.append((weight, delta))
    pairs += [(w, DenseDelta.make(w.like, (), adapter=adapter, dtype=dtype)) for w in whole]
    if whole:
        order = {weight.name: place for place, weight in enumerate(found.weights)}
        pairs.sort(key=lambda pair: order[pair[0].whole.name])
    if freeze:
        checks.warn_of_thawed(found, {weight.whole.name for weight, _ in pairs})
        moving = checks.moving_without(found, adapter, statistics)
        if statistics:
            pairs += [(w, StatisticsDelta(w.value, adapter=adapter)) for w in moving]
        else:
            checks.warn_of_moving(moving)
    return install(found, pairs, freeze)


def install(walk: Walk, pairs: Sequence[tuple[Weight, Delta]], freeze: bool) -> list[str]:
    """Attach deltas to weights that have passed the checks, all or none; name the parameters."""
    weights = [weight for weight, _ in pairs]
    names = [weight.name for weight, delta in pairs if not delta.of_buffers]
    checks.check_unshared(walk, weights, "an adapter here would not act there")
    checks.check_pairs(pairs)
    with all_or_nothing() as undo:
        if freeze:
            freeze_base(walk, undo)
        hold_frozen(walk, [delta for _, delta in pairs])
        for weight, delta in pairs:
            weight.attach(delta, undo)
        if freeze:
            watch(walk)
        return names


def _kind(kind: str, given: Mapping[str, Any]) -> type[Delta]:
    """Return the kind of that name; options that it doesn't take must be as by default."""
    known = sorted(name for name, cls in KINDS.items() if not cls.of_buffers)
    if kind not in known:
        raise LoRAError(f"kind must be one of {known}, got {kind!r}")
    defaults = inspect.signature(register_lora).parameters
    for name in given.keys() - set(KINDS[kind].options):
        default = defaults[name].default
        if type(given[name]) is not type(default) or given[name] != default:
            raise LoRAError(f"a {kind} delta takes no {name}, got {given[name]!r:.60}; drop it")
    return KINDS[kind]


def _fresh(
    weight: Weight, cls: type[Delta], given: Mapping[str, Any], lowered: bool, adapter: str
) -> Delta:
    """Make a fresh delta of a weight, with a rank that is `lowered` to what the weight can have."""
    own, view, beneath = {**given, "transposed": weight.layer.transposed}, weight.view, weight.like
    if cls.of_values or own["init"] not in [*DRAWS]:
        values = weight.original if is_packed(weight.original) else beneath
        beneath = dense(weight.value if cls.of_values else values)
    own = {name: own[name] for name in cls.options}
    if lowered and "rank" in own and (rank := own["rank"]) > (most := min(view[-2:])):
        scale = check_alpha(own["alpha"], rank) / SCALINGS[own["scaling"]](rank)
        own |= {"rank": most, "alpha": scale * SCALINGS[own["scaling"]](most)}
    return cls.make(beneath, view, adapter=adapter, **own)


def remove_lora(model: nn.Module, adapter: str | None = None) -> None:
    """Take adapters off: without the last one class, order, flags, keys and bits are as before.

    Others' parametrizations stay.

    Raises:
        AdapterError: There is no such adapter.
        LoRAError: The model is wrapped or sharded, or the call is made in `torch.inference_mode`.

    Example:
        >>> remove_lora(model)
        >>> type(model), [name for name, _ in model.named_parameters()]
        (<class 'torch.nn.modules.linear.Linear'>, ['weight', 'bias'])
    """
    found = walk(model, "remove_lora", Need.CHANGE)
    with all_or_nothing() as undo:
        # The adapters may have gone with a submodule, or torch may have taken them off.
        gone = adapter is None and not found.deltas and is_over(found)
        take_off(found, [] if gone else deltas_called(found, adapter), undo)


def take_off(walk: Walk, pairs: Sequence[tuple[Weight, Delta]], undo: ExitStack) -> None:
    """Detach deltas, and thaw what was frozen for their sake alone."""
    deltas = dict.fromkeys(delta for _, delta in pairs)
    for weight in dict.fromkeys(weight.whole for weight, _ in pairs):
        weight.detach(deltas, undo)
    for delta in deltas:
        let_go(delta, undo)
    thaw(walk, undo)
