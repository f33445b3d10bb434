"""Which adapters act, how strongly, and which are trained."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from .checks import deltas_called, walk
from .deltas import Delta
from .deltas.numbers import check_alpha
from .errors import AdapterError, LoRAError
from .routing import Switch, unrouted
from .undo import all_or_nothing
from .walk import Walk

Selection = str | Iterable[str] | Mapping[str, float] | None
"""One adapter's name, several, names with strengths, or `None` for none."""

Switches = list[tuple[Delta, Switch]]


def select_lora(
    model: nn.Module, adapters: Selection, *, trainable: str | Iterable[str] | None = None
) -> None:
    """Let these adapters act, with these strengths, and no others, and train what acts.

    A weight then reads `W + sum(strength * update)`; a strength is beside the scale, and known to
    state dicts, files and summaries. A batch norm's statistics are those of the one adapter that
    has some, at any strength. Factors that aren't trained get `requires_grad=False` and lose their
    gradients; their flags come back when the adapter is selected again. An adapter that is
    registered later acts beside these.

    Args:
        model: An adapted model.
        adapters: A name, several names, a mapping from name to strength, or `None` for the base
            alone. A strength of either sign; with 0 an adapter is off.
        trainable: The adapters to train instead of those that act.

    Raises:
        AdapterError: There is no such adapter, or two have statistics for one buffer.
        LoRAError: A strength is no finite number, or a kind of delta knows none but 1.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> for name in ("language", "task"):
        ...     _ = register_lora(model, rank=1, adapter=name)
        >>> select_lora(model, {"language": 0.7, "task": -0.3})
        >>> select_lora(model, ["language", "task"], trainable="task")
        >>> [name for name, factor in model.named_parameters() if factor.requires_grad]
        ['parametrizations.weight.1.lora_A', 'parametrizations.weight.1.lora_B']
    """
    _switch(_switches(walk(model, "select_lora"), adapters, trainable))


@contextmanager
def lora_selected(
    model: nn.Module, adapters: Selection, *, trainable: str | Iterable[str] | None = None
) -> Iterator[None]:
    """Select adapters for a block, as `select_lora` does, then give back what was before.

    Blocks may overlap, in threads or generators: the one that was entered last decides, for all.
    Flags come back with the block's end, and gradients of what wasn't trained in it.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> _ = register_lora(model, rank=1)
        >>> with lora_selected(model, {"default": 0.5}):
        ...     output = model(torch.ones(1, 3))
    """
    with _switched(_switches(walk(model, "lora_selected"), adapters, trainable)):
        yield


def enable_lora(model: nn.Module, adapter: str | None = None) -> None:
    """Switch the adapter of that name on, or all: as strong, and as trained, as when last selected.

    Raises:
        AdapterError: There is no such adapter.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> _ = register_lora(model, rank=1)
        >>> enable_lora(model)
    """
    _switch(_turned(model, "enable_lora", adapter, on=True))


def disable_lora(model: nn.Module, adapter: str | None = None) -> None:
    """Switch adapters off: with none on, reading a weight returns the original tensor itself.

    Raises:
        AdapterError: There is no such adapter.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> _ = register_lora(model, rank=1)
        >>> disable_lora(model, "default")
    """
    _switch(_turned(model, "disable_lora", adapter, on=False))


@contextmanager
def lora_disabled(model: nn.Module, adapter: str | None = None) -> Iterator[None]:
    """Switch adapters off for a block, then give each the state back that it had before.

    Blocks may overlap, as those of `lora_selected`. In `lora_routed`, they are off on all rows.

    Raises:
        AdapterError: There is no such adapter.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> _ = register_lora(model, rank=1)
        >>> with lora_disabled(model):
        ...     model.weight is model.parametrizations.weight.original
        True
    """
    with _switched(_turned(model, "lora_disabled", adapter, on=False), adapter):
        yield


def strengths_of(adapters: Selection) -> dict[str, float]:
    """Return what a selection says, by adapter; what it names has to be there."""
    several = isinstance(adapters, Iterable) and not isinstance(adapters, (str, Tensor))
    names: Any = [] if adapters is None else [*adapters] if several else [adapters]
    if not all(isinstance(name, str) for name in names):
        rule = "adapters must be a name, names, a mapping from name to strength, or None"
        raise AdapterError(f"{rule}, got {adapters!r:.60}")
    if len({*names}) < len(names):
        raise AdapterError(f"each adapter can be named once, got {names}")
    strengths = adapters if isinstance(adapters, Mapping) else dict.fromkeys(names, 1.0)
    return {n: check_alpha(s, 1, f"adapter {n!r}: a strength") for n, s in strengths.items()}


def check_together(walk: Walk, strengths: Mapping[str, float]) -> None:
    """Raise unless adapters can act together, at these strengths."""
    movers = dict[str, str]()
    for weight, delta in (pair for name in strengths for pair in walk.adapters[name]):
        name = delta.adapter
        if delta.of_buffers and (other := movers.setdefault(weight.name, name)) != name:
            reason = (
                "have statistics of their own here, of which one's alone can be moved; take one"
            )
            raise AdapterError(f"{weight.name}: adapters {other!r} and {name!r} {reason}")
        try:
            delta.check_strength(1 if delta.of_buffers else strengths[name])
        except LoRAError as error:
            raise LoRAError(f"{weight.name}: adapter {name!r}: {error}") from None


def _switches(walk: Walk, adapters: Selection, trainable: str | Iterable[str] | None) -> Switches:
    """Pair every delta of a model with what a selection makes of it, or raise."""
    strengths = strengths_of(adapters)
    acting = {name: strength for name, strength in strengths.items() if strength != 0}
    trained = acting
    if trainable is not None:
        trained = {name: own for name, own in strengths_of(trainable).items() if own}
    for name in (None, *strengths, *trained):
        found = deltas_called(walk, name)
        asked = trainable is not None and name in trained
        if asked and not any(delta.trains for _, delta in found):
            fix = "set requires_grad on lora_parameters(model, it) first"
            raise AdapterError(f"adapter {name!r} can't be trained: all of it was frozen; {fix}")
    check_together(walk, acting)
    switches = Switches()
    for _, delta in walk.deltas:
        name = delta.adapter
        strength = delta.strength if delta.of_buffers else acting.get(name, delta.strength)
        switches.append((delta, Switch(name in acting, strength, name in trained)))
    return switches


def _turned(model: nn.Module, call: str, adapter: str | None, on: bool) -> Switches:
    deltas = [delta for _, delta in deltas_called(walk(model, call), adapter)]
    return [(delta, delta.switch._replace(on=on)) for delta in deltas]


def _switch(switches: Switches) -> None:
    with all_or_nothing() as undo:
        for delta, switch in switches:
            undo.callback(setattr, delta, "switch", delta.switch)
            for parameter in delta.parameters():
                undo.callback(setattr, parameter, "grad", parameter.grad)
            delta.switch = switch


@contextmanager
def _switched(switches: Switches, adapter: str | None = None) -> Iterator[None]:
    with ExitStack() as block:
        for delta, switch in switches:
            block.enter_context(delta.switched_for_now(switch))
        block.enter_context(unrouted([delta for delta, _ in switches], adapter))
        yield
