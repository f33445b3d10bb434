"""A batch whose rows have adapters of their own."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .chains import chains_of
from .checks import Need, deltas_called, walk
from .errors import AdapterError, LoRAError, TargetError
from .places import Place, Places
from .routing import Routing, routed_here
from .select import Selection, check_together, strengths_of
from .targets import matches
from .walk import Walk
from .weight import Weight


@contextmanager
def lora_routed(
    model: nn.Module,
    adapters: Sequence[Selection] | Tensor,
    *,
    names: Sequence[str] | None = None,
    dim: int | None = None,
    dims: Mapping[str, int | None] | None = None,
) -> Iterator[None]:
    """Let each row of the batch have adapters of its own in a block, in inference and training.

    A row gives what `select_lora` of its setting gives it alone, within rounding, whatever is
    selected outside of the block; its gradient reaches its adapters only, and those on no row get
    none. The block is of one thread or task; blocks nest, those of `lora_selected` and
    `lora_disabled` too: the innermost one that knows a layer decides. Call `backward` in the block
    where activations are checkpointed.

    A layer has the rows where its input has exactly as many. Multiples (windows, frames, tokens
    laid out) are neighbours of one row each in a layer behind one with the rows. What else there
    may be is refused until `dims` says it: beams, positions, learned queries, dispatched tokens.

    Args:
        model: An adapted model.
        adapters: For each row of the batch what `select_lora` takes: a name, several, a mapping
            from name to strength, or `None` for the base; or a tensor of strengths
            `[rows, len(names)]`, which may require gradients.
        names: The adapters of a tensor's columns. With settings: adapters that take part whether
            they occur or not, so that compiled code stays the same when the rows change.
        dim: The dimension of all inputs that has the rows, or neighbours of one row each. By
            default the first, unless another one has their number too. Modules with a flag
            `batch_first`, and those below them, say it themselves.
        dims: The same by pattern, as for `register_lora`. `None` for inputs without rows: the layer
            then gives an output for each row, with the rows in front or in place of a batch of one.

    Raises:
        AdapterError: There is no such adapter.
        LoRAError: A strength is no finite number; a batch norm is in training; in a call, where a
            layer's input has the rows would be a guess.

    Example:
        >>> _ = register_lora(model, rank=1, adapter="b")
        >>> with lora_routed(model, ["default", "b", None, {"default": 0.7, "b": 0.3}]):
        ...     model(torch.ones(4, 3)).shape
        torch.Size([4, 2])
    """
    found = walk(model, "lora_routed", Need.STRUCTURE)
    weights, chosen = _weights(adapters, names)
    for name in chosen:
        deltas_called(found, name)
    _check_rows(found, weights, chosen)
    columns: dict[nn.Module, int] = {}
    for weight, delta in found.deltas:
        column = chosen.index(delta.adapter) if delta.adapter in chosen else -1
        for module in (delta, chains_of(weight.module)[weight.tensor], weight.module):
            columns[module] = max(columns.get(module, -1), column)
    own = {t for _, m in found.modules for t in (*m._parameters.values(), *m._buffers.values())}
    places = Places(len(weights), _places(found, dim, dims), own)
    with routed_here(Routing(weights, columns, places)):
        yield


def _weights(
    adapters: Sequence[Selection] | Tensor, names: Sequence[str] | None
) -> tuple[Tensor, list[str]]:
    """Return strengths, `[rows, adapters]`, and the adapters' names."""
    if isinstance(names, str) or (names is not None and len({*names}) < len(names)):
        raise AdapterError(f"names must be different adapters' names, got {names!r:.60}")
    if isinstance(adapters, Tensor):
        if adapters.shape[1:] != (len(names or ()),) or not adapters.numel():
            rule = "a tensor of strengths must be [rows, len(names)]"
            raise LoRAError(f"{rule}, got {tuple(adapters.shape)} and names={names!r:.60}")
        if not adapters.is_floating_point() or not adapters.isfinite().all():
            raise LoRAError(f"strengths must be finite numbers, got a tensor of {adapters.dtype}")
        return adapters, [*(names or ())]
    if isinstance(adapters, (str, Mapping)) or not isinstance(adapters, Sequence) or not adapters:
        rule = "adapters must have an entry for each row of the batch"
        raise LoRAError(f"{rule}, got {adapters!r:.60}; for all alike, use lora_selected")
    settings = [strengths_of(entry) for entry in adapters]
    occurring = [name for own in settings for name in own if own[name] != 0]
    chosen = list(dict.fromkeys([*(names or ()), *occurring]))
    if names is not None and (new := chosen[len(names) :]):
        raise AdapterError(f"names has not {new[0]!r}, which is on a row; add it, or drop names")
    rows = [[own.get(name, 0.0) for name in chosen] for own in settings]
    return torch.tensor(rows, dtype=torch.float64).view(len(rows), -1), chosen


def _check_rows(walk: Walk, weights: Tensor, chosen: Sequence[str]) -> None:
    """Raise for what can't act together on a row, or be learned, and for what would mix rows."""
    for own in dict.fromkeys(map(tuple, weights.tolist())):
        check_together(walk, {name: s for name, s in zip(chosen, own, strict=True) if s})
    for weight, delta in walk.deltas if weights.requires_grad else ():
        if delta.adapter in chosen and not (delta.adds or delta.of_buffers):
            what = f"strengths of a {delta.kind} delta, of adapter {delta.adapter!r},"
            fix = "detach the tensor, or leave it out"
            raise LoRAError(f"{weight.name}: {what} can't be learned; {fix}")
    for path, module in walk.modules:
        if isinstance(module, _BatchNorm) and module.training:
            reason = "a batch norm in training mixes the rows of a batch"
            raise LoRAError(f"{path}: {reason}; put it into eval mode, or train one at a time")


def _places(
    walk: Walk, dim: int | None, dims: Mapping[str, int | None] | None
) -> dict[nn.Module, Place]:
    """Return where each module has the rows in its input."""
    for each in [dim, *(dims or {}).values()]:
        if each is not None and (type(each) is not int or each < 0):
            raise LoRAError(f"a dimension must be an integer from 0 up, got {each!r:.40}")
    known, unused = dict[nn.Module, Place](), {*(dims or ())}
    flags: dict[str | None, tuple[int, int]] = {None: (dim or 0, dim is not None)}
    for path, module in walk.modules:
        own = module._modules.get("self_attn") or module  # says it for its layer
        first = own.__dict__.get("batch_first")
        above = flags.get(path.rpartition(".")[0] if path else None, flags[None])
        flags[path] = above if first is None else (int(not first), 1)
        known[module] = Place(*flags[path], path)
        for pattern, said in (dims or {}).items():
            if matches(pattern, Weight(path, module, "weight")):
                known[module] = Place(said, 2, path)
                unused.discard(pattern)
    if unused:
        raise TargetError(f'dims: "{min(unused)}" matches no module; mend it, or drop it')
    return known
