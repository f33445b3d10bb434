"""The command line: looks into adapter files, converts, checks, merges and combines them."""

import argparse
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from json import dumps, loads
from pathlib import Path
from typing import Any, NoReturn

from ..combine import Fit
from ..errors import LoRAError
from ..lowrank import Rank
from ..summary import aligned, show_alpha
from .checkpoint import check_checkpoint, combine_files, convert_file, merge_checkpoint, resize_file
from .extraction import extract_checkpoint
from .formats import WRITTEN
from .summary import FileSummary, UpdateSummary, file_summary, plot_summary
from .tensors import AnyPath

PROGRAM = "lora-param"
RAW = argparse.RawDescriptionHelpFormatter  # an example stays one line


def info(*, file: Path, base: Path | None, plot: Path | None, json: bool, **options: Any) -> None:
    """Print what a file holds: its format, its base, and each update's size."""
    summary = file_summary(file, base, **options)
    if plot:
        plot_summary(summary, plot)
    totals = {"weights": len(summary.weights), "parameters": summary.parameters}
    print(dumps(asdict(summary) | {"totals": totals}, indent=2) if json else _table(summary))


def _table(summary: FileSummary) -> str:
    header = ("weight", "kind", "shape", "rank", "alpha", "|dW|", "eff. rank")
    lines = [
        _printable(f"format {summary.format}, base {summary.base or 'not said'}"),
        *(_printable(f"{name}: {text}") for name, text in summary.metadata.items()),
        "",
        *aligned([header, *map(_cells, summary.weights)], header[2:]),
        f"\n{len(summary.weights):,} weights, {summary.parameters:,} parameters",
    ]
    return "\n".join(lines)


def _cells(update: UpdateSummary) -> tuple[str, ...]:
    strength = "" if update.strength == 1 else f" x {update.strength:g}"
    return (
        _name(update.weight),
        update.kind,
        "x".join(map(str, update.shape)),
        "-" if update.rank is None else str(update.rank),
        show_alpha(update.alpha, update.scaling) + strength,
        "-" if update.norm is None else f"{update.norm:.4g}",
        "-" if update.effective_rank is None else f"{update.effective_rank:.2f}",
    )


def convert(*, file: Path, out: Path, to: str, base: Path, **options: Any) -> None:
    """Write a file again in another format."""
    given = {name: options.pop(name) for name in ("base_prefix", "write_options")}
    names = convert_file(file, out, to, base, options=options, **given)
    print(f"{out}: {len(names):,} weights, format {to}")


def check(*, file: Path, base: Path, **options: Any) -> None:
    """Compare a checkpoint with the base that a file was trained on, bit for bit."""
    count = check_checkpoint(file, base, **options)
    print(f"{base}: the base to the bit, all {count:,} parameters")


def merge(*, file: Path, base: Path, out: Path, **options: Any) -> None:
    """Fold a file's adapter into a checkpoint, some rows of one tensor in memory at a time."""
    changed, total = merge_checkpoint(file, base, out, **options)
    print(f"{out}: {changed:,} of {total:,} tensors changed")


def combine(*, files: list[str], out: Path, **options: Any) -> None:
    """Combine adapters' files, each with a strength, into one of our own."""
    strengths: dict[AnyPath, float] = {}
    for said in files:
        path, _, strength = said.rpartition(":")
        if not path or path in strengths or isinstance(_value(strength), str):
            rule = "each file once, with its strength, such as a.safetensors:0.7"
            raise LoRAError(f"give {rule}, got {said}")
        strengths[path] = _value(strength)
    _print_fits(out, combine_files(strengths, out, **options))


def resize(*, file: Path, out: Path, rank: Rank) -> None:
    """Give a file's updates another rank, the nearest of a lower one."""
    _print_fits(out, resize_file(file, out, rank))


def extract(*, base: Path, tuned: Path, out: Path, rank: Rank) -> None:
    """Write what turns a checkpoint into a tuned one as an adapter, a tensor at a time."""
    _print_fits(out, extract_checkpoint(base, tuned, out, rank=rank))


def _print_fits(out: Path, fits: Sequence[Fit]) -> None:
    header = ("weight", "rank", "rel. error")
    cells = [(_name(fit.weight), f"{fit.rank or '-'}", f"{fit.error:.3g}") for fit in fits]
    print(*aligned([header, *cells], header[1:]), f"\n{out}: {len(fits):,} weights", sep="\n")


def _name(weight: str) -> str:
    return _printable(weight if len(weight) <= 100 else f"{weight[:80]}...{weight[-17:]}")


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
        options[name] = _value(value)
    return options


def _value(text: str) -> Any:
    """Return what is written as JSON or as a number, or text that is neither."""
    for read in (loads, int, float):
        with suppress(ValueError, RecursionError):
            return read(text)
    return text


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _said(shown: str | None, help: str, **more: Any) -> dict[str, Any]:
    return {"metavar": shown, "help": help, **more}


CHECKPOINT, RANK, OPTION, PREFIX = "CHECKPOINT", "RANK", "NAME=VALUE", "base_prefix"
PATH: dict[str, Any] = {"type": Path}
NEEDED: dict[str, Any] = {"type": Path, "required": True}
REPEATED: dict[str, Any] = {"action": "append", "default": []}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "file": _said("FILE", "the adapter, in any format", **PATH),
    "files": _said("FILE:STRENGTH", "such as a.safetensors:0.7", nargs="+"),
    "out": _said("OUT", "the file to write, for PEFT the folder", **PATH),
    "--out": _said("OUT.safetensors", "the file to write", **NEEDED),
    "--to": {"choices": WRITTEN, "required": True, "help": "the format to write"},
    "--base": _said(CHECKPOINT, "a file, an index of shards, or a folder with one", **NEEDED),
    "[--base]": _said(CHECKPOINT, "the base, where FILE doesn't say", **PATH),
    "--tuned": _said(CHECKPOINT, "what became of it", **NEEDED),
    "--prefix": _said("PREFIX", "in front of the model's names alone, such as bert.", dest=PREFIX),
    "--any-base": {"action": "store_true", "help": "whether trained on this base or not"},
    "--json": {"action": "store_true", "help": "print JSON"},
    "--plot": _said("OUT.png", "draw norms and effective ranks, by matplotlib", **PATH),
    "--rank": _said(RANK, "16, or a share such as 0.95", type=_value, required=True),
    "[--rank]": _said(RANK, "16, or a share such as 0.95; else all of it", type=_value),
    "--method": {"choices": ("sum", "ties", "dare"), "default": "sum"},
    "--density": {"type": float, "help": "the share of entries that ties and dare keep"},
    "--option": _said(OPTION, "what FILE's format asks for, such as alpha=16", **REPEATED),
    "--write-option": _said(OPTION, "what OUT's format takes", dest="write_options", **REPEATED),
}
COMMANDS: dict[Callable[..., None], tuple[str, str]] = {
    info: (
        "file --json --plot [--base] --prefix --option",
        "adapter.safetensors --base model.safetensors --plot adapter.png",
    ),
    convert: (
        "file out --to [--base] --prefix --option --write-option",
        "adapter.safetensors for_peft --to peft",
    ),
    check: ("file --base --prefix --option", "adapter.safetensors --base model.safetensors"),
    merge: (
        "file --base --prefix --out --any-base --option",
        "adapter.safetensors --base model.safetensors --out merged.safetensors",
    ),
    combine: (
        "files --out --method [--rank] --density",
        "a.safetensors:0.7 b.safetensors:-0.3 --out ab.safetensors",
    ),
    resize: ("file --rank --out", "adapter.safetensors --rank 8 --out small.safetensors"),
    extract: (
        "--base --tuned --rank --out",
        "--base model.safetensors --tuned tuned.safetensors --rank 16 --out adapter.safetensors",
    ),
}
"""Each command's arguments, which its function takes by name, and an example."""


def _parser() -> argparse.ArgumentParser:
    said = "Look into, convert, merge and combine adapter files."
    parser = _Parser(prog=PROGRAM, description=said)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for call, (names, example) in COMMANDS.items():
        said = f"{call.__doc__}".splitlines()[0]
        epilog = f"example: {PROGRAM} {call.__name__} {example}"
        command = commands.add_parser(
            call.__name__, help=said, description=said, epilog=epilog, formatter_class=RAW
        )
        command.set_defaults(call=call)
        for name in names.split():
            command.add_argument(name.strip("[]"), **ARGUMENTS[name])
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on the process's arguments or these, and return its status."""
    given = vars(_parser().parse_args(argv))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = lambda said, *rest: print(
                f"{PROGRAM}: {_as_typed(said)}", file=sys.stderr
            )
            if "write_options" in given:
                given["write_options"] = _options(given["write_options"])
            given.pop("call")(**_options(given.pop("option", [])), **given)
    except Exception as error:  # whatever a hostile file brings about
        kind = "" if isinstance(error, (LoRAError, OSError)) else f"{type(error).__name__}: "
        print(f"{PROGRAM}: {kind}{_as_typed(error)}", file=sys.stderr)
        return 1
    return 0
