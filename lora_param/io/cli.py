"""The command line: looks into adapter files, converts, checks, merges and combines them."""

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

from ..combine import Fit
from ..errors import LoRAError
from ..summary import show_alpha
from .checkpoint import check_checkpoint, convert_file, merge_checkpoint
from .combination import combine_files, extract_checkpoint, resize_file
from .formats import WRITTEN
from .plot import plot_summary
from .summary import FileSummary, file_summary
from .tensors import AnyPath

PROGRAM = "lora-param"
RAW = argparse.RawDescriptionHelpFormatter  # an example stays one line


def info(arguments: argparse.Namespace) -> None:
    """Print what a file holds: its format, its base, and each update's size."""
    summary = file_summary(
        *(arguments.file, arguments.base),
        base_prefix=arguments.prefix,
        **_options(arguments.option),
    )
    if arguments.plot:
        plot_summary(summary, arguments.plot)
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


def combine(arguments: argparse.Namespace) -> None:
    """Combine adapters' files, each with a strength, into one of our own."""
    strengths: dict[AnyPath, float] = {}
    for said in arguments.files:
        path, _, strength = said.rpartition(":")
        try:
            strengths[Path(path)] = float(strength)
        except ValueError:
            rule = "a file with its strength, such as a.safetensors:0.7"
            raise LoRAError(f"each must be {rule}, got {said}") from None
        if not path or len(strengths) < arguments.files.index(said) + 1:
            raise LoRAError(f"each file can be given once, with its strength, got {said}")
    fits = combine_files(
        *(strengths, arguments.out),
        method=arguments.method,
        rank=_rank(arguments.rank),
        density=arguments.density,
    )
    _print_fits(arguments.out, fits)


def resize(arguments: argparse.Namespace) -> None:
    """Give a file's updates another rank, the nearest of a lower one."""
    _print_fits(arguments.out, resize_file(arguments.file, arguments.out, _rank(arguments.rank)))


def extract(arguments: argparse.Namespace) -> None:
    """Write what turns a checkpoint into a tuned one as an adapter, a tensor at a time."""
    fits = extract_checkpoint(
        *(arguments.base, arguments.tuned, arguments.out), rank=_rank(arguments.rank)
    )
    _print_fits(arguments.out, fits)


def _rank(said: str | None) -> Any:
    """Return a rank, or a share of the squared norm, as it was written."""
    if said is None:
        return None
    try:
        return float(said) if "." in said else int(said)
    except ValueError:
        raise LoRAError(f"rank must be a number such as 16, or a share, got {said:.40}") from None


def _print_fits(out: Path, fits: Sequence[Fit]) -> None:
    width = max(len(_printable(fit.weight)) for fit in fits)
    print("{:{}}  {:>5}  {:>10}".format("weight", width, "rank", "rel. error"))
    for fit in fits:
        rank = "-" if fit.rank is None else str(fit.rank)
        print(f"{_printable(fit.weight):{width}}  {rank:>5}  {fit.error:>10.3g}")
    print(f"\n{out}: {len(fits):,} weights")


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
    "--plot": PATH
    | {"metavar": "OUT.png", "help": "draw norms and effective ranks, by matplotlib"},
    "--any-base": {"action": "store_true", "help": "whether trained on this base or not"},
    "--option": REPEATED | {"help": "what FILE's format asks for, such as alpha=16"},
    "files": {"metavar": "FILE:STRENGTH", "nargs": "+", "help": "such as a.safetensors:0.7"},
    "--tuned": PATH | {"metavar": "CHECKPOINT", "required": True, "help": "what became of it"},
    "--rank": {"metavar": "RANK", "required": True, "help": "16, or a share such as 0.95"},
    "[--rank]": {"metavar": "RANK", "help": "16, or a share such as 0.95; else all of it"},
    "--method": {"choices": ("sum", "ties", "dare"), "default": "sum"},
    "--density": {"type": float, "help": "the share of entries that ties and dare keep"},
    "--write-option": REPEATED | {"help": "what OUT's format takes"},
}
COMMANDS: dict[Callable[[argparse.Namespace], None], tuple[str, tuple[str, ...]]] = {
    info: (
        "adapter.safetensors --base model.safetensors --plot adapter.png",
        ("file", "--json", "--plot", "[--base]", "--prefix", "--option"),
    ),
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
    combine: (
        "a.safetensors:0.7 b.safetensors:-0.3 --out ab.safetensors",
        ("files", "--out", "--method", "[--rank]", "--density"),
    ),
    resize: ("adapter.safetensors --rank 8 --out small.safetensors", ("file", "--rank", "--out")),
    extract: (
        "--base model.safetensors --tuned tuned.safetensors --rank 16 --out adapter.safetensors",
        ("--base", "--tuned", "--rank", "--out"),
    ),
}
"""Each command's example and arguments."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on the process's arguments or these, and return its status."""
    parser = _Parser(
        prog=PROGRAM, description="Look into, convert, merge and combine adapter files."
    )
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
