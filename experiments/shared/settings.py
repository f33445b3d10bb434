"""Settings of an experiment: a frozen dataclass whose fields are the options of its command line.

Example:
    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Settings:
    ...     rank: int = option(1, "rank of each weight's update", most=10)
    ...
    ...     def __post_init__(self) -> None:
    ...         check_options(self)
    >>> parse(Settings, ["--rank", "3"], "python -m experiments.this", "What it does.")
    Settings(rank=3)
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import Field, field, fields
from typing import Any, NoReturn, TypeVar

from .claims import BrokenClaimError

T = TypeVar("T")


def option(
    default: T, text: str, *, least: int = 1, most: int = 2**31, above: float = -math.inf
) -> T:
    """Declare a field that is an option of the command line as well.

    Args:
        default: The default, which says the type too: a flag, an integer, a number or a string.
        text: What `--help` says of it.
        least: The least that an integer may be.
        most: The most that an integer may be.
        above: What a number has to be above.

    Returns:
        The field; typed as its default, as `dataclasses.field` is.
    """
    bounds = {"least": least, "most": most, "above": above}
    value: T = field(default=default, metadata={"help": text, **bounds})
    return value


def check_options(settings: Any) -> None:
    """Hold each option against its bounds.

    Args:
        settings: The dataclass's instance.

    Raises:
        ValueError: A value is out of range; says which, the rule and what it got.
    """
    for each in fields(settings):
        value, bounds = getattr(settings, each.name), each.metadata
        if isinstance(each.default, bool | str):
            continue
        if isinstance(each.default, int):
            held = bounds["least"] <= value <= bounds["most"]
            rule = f"an integer from {bounds['least']} to {bounds['most']}"
        else:
            held = math.isfinite(value) and value > bounds["above"]
            rule = "a finite number"
            rule += f" above {bounds['above']}" if math.isfinite(bounds["above"]) else ""
        if not held:
            raise ValueError(f"{each.name} must be {rule}, got {value}")


def parse(kind: type[T], argv: Sequence[str] | None, program: str, description: str) -> T:
    """Read settings off a command line; what is wrong there ends the process with one line.

    Args:
        kind: The dataclass.
        argv: Arguments; those of the process if `None`.
        program: What was called, for messages.
        description: What `--help` says of the program.

    Returns:
        The settings.
    """
    parser = _Parser(
        prog=program,
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for each in fields(kind):  # type: ignore[arg-type]
        _add(parser, each)
    try:
        return kind(**vars(parser.parse_args(argv)))
    except ValueError as error:
        parser.error(str(error))


def call(
    run: Callable[[T], object], kind: type[T], argv: Sequence[str] | None, module: str, about: str
) -> int:
    """Call an experiment from a command line; what goes wrong is one line.

    Args:
        run: The experiment.
        kind: The dataclass of its settings.
        argv: Arguments; those of the process if `None`.
        module: The experiment's module.
        about: Its docstring, whose first line is what `--help` says of it.

    Returns:
        The exit status: 1 where a claim is broken or an input is bad.
    """
    program = f"python -m {module}"
    settings = parse(kind, argv, program, about.partition("\n")[0])
    try:
        run(settings)
    except (BrokenClaimError, ValueError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    return 0


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _add(parser: argparse.ArgumentParser, each: Field[Any]) -> None:
    name, text, kind = "--" + each.name.replace("_", "-"), each.metadata["help"], type(each.default)
    if kind is bool:
        action = argparse.BooleanOptionalAction
        parser.add_argument(name, action=action, default=each.default, help=text)
    else:
        metavar = kind.__name__.upper()
        parser.add_argument(name, type=kind, default=each.default, metavar=metavar, help=text)
