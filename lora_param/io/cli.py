"""The command line: looks into adapter files, converts, checks and merges them."""

from __future__ import annotations

import argparse
import json
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from ..errors import LoRAError
from ..summary import show_alpha
from .checkpoint import check_checkpoint, convert_file, merge_checkpoint
from .formats import WRITTEN
from .summary import FileSummary, file_summary

PROGRAM = "lora-param"
RAW = argparse.RawDescriptionHelpFormatter  # an example stays one line


def info(arguments: argparse.Namespace) -> None:
    """Print what a file holds: its format, its base, and each update's size."""
    summary = file_summary(arguments.file, **_options(arguments.option))
    if arguments.json:
        totals = {"weights": len(summary.weights), "parameters": summary.parameters}
        print(json.dumps(asdict(summary) | {"totals": totals}, indent=2))
    else:
        _print_table(summary)


def _print_table(summary: FileSummary) -> None:
    print(_printable(f"format {summary.format}, base {summary.base or 'not said'}"))
    for name, text in summary.metadata.items():
        print(_printable(f"{name}: {text}"))
    print()
    rows = [("weight", "kind", "shape", "rank", "alpha", "|dW|", "eff. rank")]
    rows += [
        (
            _printable(each.weight),
            each.kind,
            "x".join(map(str, each.shape)),
            "-" if each.rank is None else str(each.rank),
            show_alpha(each.alpha, each.scaling)
            + ("" if each.strength == 1 else f" x {each.strength:g}"),
            "-" if each.norm is None else f"{each.norm:.4g}",
            "-" if each.effective_rank is None else f"{each.effective_rank:.2f}",
        )
        for each in summary.weights
    ]
    width = max(len(row[0]) for row in rows)
    for row in rows:
        print("{:{}}  {:>6}  {:>14}  {:>5}  {:>8}  {:>11}  {:>9}".format(row[0], width, *row[1:]))
    print(f"\n{len(summary.weights):,} weights, {summary.parameters:,} parameters")


def convert(arguments: argparse.Namespace) -> None:
    """Write a file again in another format."""
    names = convert_file(
        *(arguments.file, arguments.out, arguments.to, arguments.base),
        base_prefix=arguments.prefix,
        options=_options(arguments.option),
        write_options=_options(arguments.write_option),
    )
    print(f"{arguments.out}: {len(names):,} weights, format {arguments.to}")


def check(arguments: argparse.Namespace) -> None:
    """Compare a checkpoint with the base that a file was trained on, bit for bit."""
    count = check_checkpoint(
        *(arguments.file, arguments.base),
        base_prefix=arguments.prefix,
        **_options(arguments.option),
    )
    print(f"{arguments.base}: the base to the bit, all {count:,} parameters")


def merge(arguments: argparse.Namespace) -> None:
    """Fold a file's adapter into a checkpoint, some rows of one tensor in memory at a time."""
    changed, total = merge_checkpoint(
        *(arguments.file, arguments.base, arguments.out),
        any_base=arguments.any_base,
        base_prefix=arguments.prefix,
        **_options(arguments.option),
    )
    print(f"{arguments.out}: {changed:,} of {total:,} tensors changed")


def _printable(text: str) -> str:
    """Escape what would move a terminal's cursor, or worse."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _as_typed(said: object) -> str:
    """Put a message on one line, with options as they are typed here."""
    line = _printable(" ".join(str(said).split()))
    return re.sub(r"\b(alpha|enable_lora|mha_out_proj)=\"?(\w*)\"?", r"--option \1=\2", line)


def _options(given: Sequence[str]) -> dict[str, Any]:
    options = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise LoRAError(f"an option is written NAME=VALUE, got {text}")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


PATH = {"type": Path}
REPEATED = {"metavar": "NAME=VALUE", "action": "append", "default": []}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "file": PATH | {"metavar": "FILE", "help": "the adapter, in any format"},
    "out": PATH | {"metavar": "OUT", "help": "the file to write, for PEFT the folder"},
    "--base": PATH
    | {
        "metavar": "CHECKPOINT",
        "required": True,
        "help": "the base: a file, an index of shards, or a folder with one",
    },
    "[--base]": PATH | {"metavar": "CHECKPOINT", "help": "the base, where FILE doesn't say"},
    "--prefix": {"help": "what the model's names have and CHECKPOINT's lack, such as bert."},
    "--out": PATH | {"metavar": "OUT.safetensors", "required": True},
    "--to": {"choices": WRITTEN, "required": True},
    "--json": {"action": "store_true", "help": "print JSON"},
    "--any-base": {"action": "store_true", "help": "whether trained on this base or not"},
    "--option": REPEATED | {"help": "what FILE's format asks for, such as alpha=16"},
    "--write-option": REPEATED | {"help": "what OUT's format takes"},
}
COMMANDS: dict[Callable[[argparse.Namespace], None], tuple[str, tuple[str, ...]]] = {
    info: ("adapter.safetensors --json", ("file", "--json", "--option")),
    convert: (
        "adapter.safetensors for_peft --to peft",
        ("file", "out", "--to", "[--base]", "--prefix", "--option", "--write-option"),
    ),
    check: (
        "adapter.safetensors --base model.safetensors",
        ("file", "--base", "--prefix", "--option"),
    ),
    merge: (
        "adapter.safetensors --base model.safetensors --out merged.safetensors",
        ("file", "--base", "--prefix", "--out", "--any-base", "--option"),
    ),
}
"""Each command's example and arguments."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on the process's arguments or these, and return its status."""
    parser = _Parser(prog=PROGRAM, description="Look into, convert, check and merge adapter files.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for call, (example, names) in COMMANDS.items():
        said = f"{call.__doc__}".splitlines()[0]
        epilog = f"example: {PROGRAM} {call.__name__} {example}"
        command = commands.add_parser(
            call.__name__, help=said, description=said, epilog=epilog, formatter_class=RAW
        )
        command.set_defaults(call=call)
        for name in names:
            command.add_argument(name.strip("[]"), **ARGUMENTS[name])
    arguments = parser.parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = lambda said, *rest: print(
                f"{PROGRAM}: {_as_typed(said)}", file=sys.stderr
            )
            arguments.call(arguments)
    except Exception as error:  # whatever a hostile file brings about
        kind = "" if isinstance(error, (LoRAError, OSError)) else f"{type(error).__name__}: "
        print(f"{PROGRAM}: {kind}{_as_typed(error)}", file=sys.stderr)
        return 1
    return 0
