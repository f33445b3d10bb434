"""The command line: what is in an adapter's file, in which format, for which base."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
from torch import Tensor, nn

from .base import bytes_of, digest, digest_of
from .errors import FileError, LoRAError
from .files import fitted
from .formats import FORMATS, About, Format, Pair, read, recognised, write
from .formats.layout import load_pickle
from .formats.pair import shortened
from .formats.peft import CONFIG
from .formats.skeleton import Shape, skeleton
from .formats.tensors import Entry, header, load_tensors, peek, write_blobs
from .parametrization import adapted
from .progress import progress
from .surgery import plain_name

PROGRAM = "lora-param"
BLOCK = 2**22  # bytes of a tensor that are merged at a time
OTHER_BASE = "give the base that the adapter was trained on, or --any-base"
RAW = argparse.RawDescriptionHelpFormatter  # an example stays one line


def info(arguments: argparse.Namespace) -> None:
    """Print what a file holds: its format, its base, and each update's size."""
    row, about = _recognised(arguments.file)
    pairs = read(row, arguments.file, None, **_options(arguments.option))
    weights = [
        _figures(pair, about.shapes.get(pair.weight)) for pair in progress(pairs, "measuring")
    ]
    totals = {"weights": len(pairs), "parameters": sum(map(_size, pairs))}
    if arguments.json:
        said = {"format": row.name, "base": about.called, "adapter": about.adapter}
        found = {"metadata": about.metadata, "weights": weights, "totals": totals}
        print(json.dumps(said | found, indent=2))
        return
    columns = "{weight:{width}}  {shape:>14}  {rank:>5}  {alpha:>8}  {norm:>11}  {effective:>9}"
    titles = {key: key for key in ("weight", "shape", "rank", "alpha")}
    width = max(len(pair.weight) for pair in pairs)
    print(_printable(f"format {row.name}, base {about.called or 'not said'}"), end="\n\n")
    print(columns.format(**titles, width=width, norm="|dW|", effective="eff. rank"))
    for each in weights:
        shown = each | {
            "weight": _printable(each["weight"]),
            "shape": "x".join(map(str, each["shape"])),
            "alpha": f"{each['alpha']:g}",
            "norm": f"{each['norm']:.4g}",
            "effective": f"{each['effective_rank']:.2f}",
        }
        print(columns.format(**shown, width=width))
    print(f"\n{totals['weights']:,} weights, {totals['parameters']:,} parameters")


def convert(arguments: argparse.Namespace) -> None:
    """Write a file again in another format."""
    row, about = _recognised(arguments.file)
    _keep_apart(arguments.out, arguments.file, arguments.base)
    tensors = _checkpoint(arguments.base) if arguments.base else {}
    if not tensors and not about.shapes:
        raise FileError(
            f"{arguments.file}: the format {row.name} doesn't say what its weights are; give the "
            "checkpoint that it was trained on with --base"
        )
    model, fitting = _fitting(arguments.file, row, about, tensors or about.shapes, arguments.option)
    guessed = [pair.weight for pair in fitting if not about.layers.get(pair.weight)]
    if arguments.to == "peft" and any(model.get_parameter(name).dim() > 2 for name in guessed):
        raise FileError(
            f"{arguments.file}: no checkpoint says how a convolution is grouped; load this file on "
            'the model and call save_lora(..., format="peft")'
        )
    options = _options(arguments.write_option)
    if arguments.to == "native":
        found = progress([] if about.base else list(tensors), "digesting")
        digests = about.base or {name: digest_of(name, tensors[name]) for name in found}
        options.setdefault("base", digests)
    write(arguments.to, arguments.out, fitting, model, about, **options)
    print(f"{arguments.out}: {len(fitting):,} weights, format {arguments.to}")


def check(arguments: argparse.Namespace) -> None:
    """Compare a checkpoint with the base that a file was trained on, bit for bit."""
    row, about = _recognised(arguments.file)
    tensors = _checkpoint(arguments.base)
    _fitting(arguments.file, row, about, tensors, arguments.option)
    if not about.base:
        raise FileError(
            f"{arguments.file}: fits by names and shapes; it holds no fingerprint of its base, so "
            "whether it was trained on these very bits can't be said"
        )
    present = progress([name for name in about.base if name in tensors], "digesting")
    found = [name for name in present if digest_of(name, tensors[name]) != about.base[name]]
    if found := [*_missing(about.base, tensors), *found]:
        raise FileError(
            f"{arguments.file}: {len(found)} of {len(about.base)} parameters of its base aren't "
            f"those of {arguments.base}: {shortened(found)}"
        )
    print(f"{arguments.base}: the base to the bit, all {len(about.base):,} parameters")


def merge(arguments: argparse.Namespace) -> None:
    """Fold a file's adapter into a checkpoint, some rows of one tensor in memory at a time."""
    row, about = _recognised(arguments.file)
    _keep_apart(arguments.out, arguments.file, arguments.base)
    head = header(arguments.base)
    tensors = _checkpoint(arguments.base)
    _, fitting = _fitting(arguments.file, row, about, tensors, arguments.option)
    places = {plain_name(place): place for place in head.tensors}
    if hidden := [p.weight for p in fitting if "parametrizations." in places[p.weight]]:
        raise FileError(
            f"{arguments.base}: parametrized: {shortened(hidden)}; load both, and call merge_lora"
        )
    pairs = {pair.weight: pair for pair in fitting}
    base = {} if arguments.any_base else about.base
    if missing := _missing(base, tensors):
        raise FileError(f"{arguments.base}: lacks {shortened(missing)}; {OTHER_BASE}")
    # A file that knows its base's class was saved beside the model, and has all its names.
    known = about.shapes if about.cls else {}
    changing = [tensors[name] for name in pairs]
    others = tensors.keys() - known - pairs.keys()
    twins = [name for name in others if any(_is_same(tensors[name], each) for each in changing)]
    if twins and not arguments.any_base:
        raise FileError(
            f"{arguments.base}: {shortened(twins)} may be adapted weights by other names, having "
            "their bits, and would not change; take them out, or give --any-base if they aren't"
        )
    with open(arguments.base, "rb") as file:
        blocks = (
            block
            for place, entry in progress(list(head.tensors.items()), "merging")
            for name in [plain_name(place)]
            for block in _merged(file, name, entry, tensors[name].dtype, pairs.get(name), base)
        )
        write_blobs(arguments.out, head.tensors, head.metadata, blocks)
    print(f"{arguments.out}: {len(pairs):,} of {len(head.tensors):,} tensors changed")


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Compare two tensors, their beginnings first, because these tell nearly all apart."""
    begins = a.shape == b.shape and torch.equal(a.flatten()[:64], b.flatten()[:64])
    return begins and torch.equal(a, b)


def _merged(
    file: BinaryIO,
    name: str,
    entry: Entry,
    dtype: torch.dtype,
    pair: Pair | None,
    base: Mapping[str, str],
) -> Iterator[Any]:
    """Yield a tensor's bytes in blocks of whole rows, with the update added."""
    found, size = digest(dtype, entry.shape), entry.end - entry.begin
    row = size // entry.shape[0] if pair else 1
    rows = max(1, BLOCK // row)
    file.seek(entry.begin)
    for begin in range(0, size // row, rows):
        wanted = min(rows * row, size - begin * row)
        content: Any = bytearray(file.read(wanted))
        if len(content) < wanted:
            raise FileError(f"{file.name}: has become shorter while it was read")
        found.update(content)
        if pair:
            weight = torch.frombuffer(content, dtype=dtype).view(-1, *entry.shape[1:])
            A, B = pair.lora_A, pair.lora_B[begin : begin + rows]
            A = A[begin : begin + rows] if A.dim() > 2 else A
            weight, old = adapted(weight, A, B, pair.alpha / pair.rank), weight
            if not weight.isfinite().all() and old.isfinite().all():
                raise FileError(f"{file.name}: {name} would not be finite in {dtype}")
            content = bytes_of(name, weight)
        yield content
    if base.get(name, found.hexdigest()) != found.hexdigest():
        raise FileError(f"{file.name}: {name} has other bits; {OTHER_BASE}")


def _missing(base: Mapping[str, str], tensors: Mapping[str, Tensor]) -> list[str]:
    """List the parameters of a base that a checkpoint lacks, and doesn't hold by another name."""
    # A checkpoint may hold tied weights once; equal biases are no sign of that.
    held = {name: digest for name, digest in base.items() if name in tensors}
    tied = {digest for name, digest in held.items() if tensors[name].dim() > 1}
    return [name for name, digest in base.items() if name not in held and digest not in tied]


def _recognised(path: Path) -> tuple[Format, About]:
    row = recognised(path)
    return row, row.about(path)


def _checkpoint(path: Path) -> dict[str, Tensor]:
    tensors = load_tensors(path) if peek(path).tensors else load_pickle(path)
    times = Counter(map(plain_name, tensors))
    if twice := [name for name in times if times[name] > 1]:
        raise FileError(f"{path}: more than one tensor is {shortened(twice)}; keep one of them")
    return {plain_name(name): tensor for name, tensor in tensors.items()}


def _fitting(
    path: Path,
    row: Format,
    about: About,
    base: Mapping[str, Tensor | Shape],
    options: Sequence[str],
) -> tuple[nn.Module, list[Pair]]:
    """Read a file's pairs against a model's outline; return both."""
    model = skeleton(base, about.layers)
    pairs = read(row, path, model, **_options(options))
    return model, [pair for _, pair in fitted(path, pairs, model, about)]


def _figures(pair: Pair, shape: Shape | None) -> dict[str, Any]:
    """Measure an update by its singular values, found from the factors without forming it.

    The effective rank is the exponential of the entropy of the singular values' distribution, the
    mean over a stack: Roy and Vetterli, "The effective rank", EUSIPCO 2007, definition 1.
    """
    A, B = (torch.linalg.qr(each.double())[1] for each in (pair.lora_A.mT, pair.lora_B))
    values = torch.linalg.svdvals(B @ A.mT) * abs(pair.alpha / pair.rank)
    share = values / values.sum(-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
    if not values.norm().isfinite():
        raise FileError(f"{pair.weight}: its update isn't finite")
    effective = torch.special.entr(share).sum(-1).exp() * (values.sum(-1) > 0)
    return {
        "weight": pair.weight,
        "shape": shape or (*pair.lora_B.shape[:-1], pair.lora_A.shape[-1]),
        "rank": pair.rank,
        "alpha": pair.alpha,
        "norm": values.norm().item(),
        "effective_rank": effective.mean().item(),
        "parameters": _size(pair),
    }


def _size(pair: Pair) -> int:
    return pair.lora_A.numel() + pair.lora_B.numel()


def _keep_apart(out: Path, *inputs: Path | None) -> None:
    written = [out, *out.iterdir()] if out.is_dir() else [out] * out.exists()
    for given in inputs:
        inside = [*given.iterdir()] if given and given.is_dir() else []
        for each in [given, given.parent / CONFIG, *inside] if given else []:
            if each.exists() and any(map(each.samefile, written)):
                raise FileError(f"{out}: would be read and written; name another")


def _printable(text: str) -> str:
    """Escape what would move a terminal's cursor, or worse."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _options(given: Sequence[str]) -> dict[str, Any]:
    options = {}
    for each in given:
        name, equals, value = each.partition("=")
        if not equals:
            raise LoRAError(f"an option is written NAME=VALUE, got {each}")
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
    "--base": PATH | {"metavar": "CHECKPOINT", "required": True, "help": "the base"},
    "[--base]": PATH | {"metavar": "CHECKPOINT", "help": "the base, where FILE doesn't say"},
    "--out": PATH | {"metavar": "OUT.safetensors", "required": True},
    "--to": {"choices": [each.name for each in FORMATS if each.write], "required": True},
    "--json": {"action": "store_true", "help": "print JSON"},
    "--any-base": {"action": "store_true", "help": "whether trained on this base or not"},
    "--option": REPEATED | {"help": "what FILE's format asks for, such as alpha=16"},
    "--write-option": REPEATED | {"help": "what OUT's format takes"},
}
COMMANDS: dict[Callable[[argparse.Namespace], None], tuple[str, tuple[str, ...]]] = {
    info: ("adapter.safetensors --json", ("file", "--json", "--option")),
    convert: (
        "adapter.safetensors for_peft --to peft",
        ("file", "out", "--to", "[--base]", "--option", "--write-option"),
    ),
    check: ("adapter.safetensors --base model.safetensors", ("file", "--base", "--option")),
    merge: (
        "adapter.safetensors --base model.safetensors --out merged.safetensors",
        ("file", "--base", "--out", "--any-base", "--option"),
    ),
}
"""Each command's example and arguments."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments; those of the process if `None`.

    Returns:
        The exit status.
    """
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
            warnings.showwarning = lambda said, *rest: print(f"{PROGRAM}: {said}", file=sys.stderr)
            arguments.call(arguments)
    except Exception as error:  # whatever a hostile file brings about
        kind = "" if isinstance(error, (LoRAError, OSError)) else f"{type(error).__name__}: "
        print(f"{PROGRAM}: {kind}{_printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
