"""Files as they lie on a disk: opened and read once, and written whole or not at all."""

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..deltas.protocol import FLOATS
from ..errors import FileError, LoRAError
from ..frozen import bytes_of

AnyPath = str | os.PathLike[str]

Config = Mapping[str, Any]
Tensors = Mapping[str, Tensor]


class Content(NamedTuple):
    """What a file is going to hold, and a folder of PEFT's: a config, and a card if it has none."""

    tensors: Tensors
    metadata: Mapping[str, str]
    config: Config | None = None
    card: str = ""


CONFIG, SAFE, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
CARD = "README.md"
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
"""What the files in a folder of PEFT's are called."""

CODES = dict(zip(FLOATS, ("F16", "BF16", "F32", "F64"), strict=True))
CODES |= {torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8"}
CODES |= {torch.uint8: "U8", torch.bool: "BOOL", torch.complex64: "C64"}
CODES |= {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}
"""A header's names for the dtypes that are written."""

DAMAGE = (SafetensorError, OSError, ValueError, RuntimeError, TypeError, LookupError)
"""What opening a damaged file can raise, by release and platform."""

LONGEST_HEADER = 100_000_000  # what safetensors itself accepts
LONGEST_NAME = 1000  # longer ones no module has, and they take long to look up


class Entry(NamedTuple):
    """What a header says about one tensor: its dtype's name, its shape, where its bytes are."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def entry_of(name: str, tensor: Tensor) -> Entry:
    """Say what the header of a file says that holds a tensor alone."""
    if tensor.dtype not in CODES:
        raise FileError(f"{name}: no safetensors file can hold {tensor.dtype}")
    return Entry(CODES[tensor.dtype], tuple(tensor.shape), 0, tensor.nbytes)


def _header(path: Path, file: BinaryIO) -> tuple[dict[str, str], dict[str, Entry], str]:
    """Read an open file's metadata, its entries in the order of their bytes, and its fault."""
    try:
        with safe_open(path, "pt"):  # holds sizes, shapes and places against the file
            start = 8 + int.from_bytes(file.read(8), "little")
            content = strict_json(file.read(start - 8).decode())
    except DAMAGE as error:
        return {}, {}, f"no safetensors file, or a damaged one: {error!s:.200}"
    metadata = content.pop("__metadata__", None) or {}
    if any(len(name) > LONGEST_NAME for name in content):
        return {}, {}, f"no safetensors file: a name has more than {LONGEST_NAME} characters"
    entries = {}
    for name, said in sorted(content.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = said["data_offsets"]
        entries[name] = Entry(said["dtype"], tuple(said["shape"]), start + begin, start + end)
    return metadata, entries, ""


@dataclass(frozen=True)
class About:
    """What a file says besides its deltas, as far as its format has a place for it."""

    adapter: str = "default"
    model: str = ""  # what the base is called on a hub
    cls: str = ""  # the base's class
    base: Mapping[str, str] = field(default_factory=dict)  # its fingerprint
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)  # its parameters'
    layers: Mapping[str, Config] = field(default_factory=dict)  # facts of the adapted modules
    metadata: Mapping[str, str] = field(default_factory=dict)  # strings of whoever saved it

    @property
    def base_name(self) -> str:
        """What to call the base; empty if that isn't known."""
        return self.model or self.cls


@dataclass(eq=False)
class OpenFile:
    """An open file, and what its header says; `folder` is PEFT's, where that was named."""

    path: Path
    folder: Path | None
    file: BinaryIO
    metadata: Mapping[str, str]
    entries: Mapping[str, Entry]
    fault: str  # for which it is no safetensors file

    @cached_property
    def tensors(self) -> Tensors:
        """Its tensors: a safetensors file's, mapped, or those in a pickled state dict."""
        if self.fault and self.path.suffix == ".safetensors":
            raise FileError(f"{self.path}: {self.fault}")
        if self.fault:
            return _unpickled(self.path, self.file)
        try:
            with safe_open(self.path, "pt") as file:  # mapped: they are read when they are used
                return {name: file.get_tensor(name) for name in self.entries}
        except DAMAGE as error:
            text = f"{self.path}: a damaged safetensors file: {error!s:.200}"
            raise FileError(text) from None

    @property
    def strings(self) -> dict[str, str]:
        """Those beside its tensors, without the one that transformers asks for."""
        return {key: text for key, text in self.metadata.items() if key != "format"}

    def entry(self, key: str) -> Entry:
        """Say what a header says of a tensor, also of one in a pickle."""
        own = self.entries.get(key)
        return own or entry_of(f"{self.path}: {key}", self.tensors[key])

    def blocks(self, key: str, size: int) -> Iterator[bytearray]:
        """Yield a tensor's bytes, so many at a time."""
        entry = self.entry(key)
        held = bytes_of(key, self.tensors[key]) if self.fault else None
        for begin in range(entry.begin, entry.end, size):
            end = min(begin + size, entry.end)
            self.file.seek(begin)
            content = bytearray(self.file.read(end - begin) if held is None else held[begin:end])
            if len(content) < end - begin:
                raise FileError(f"{self.path}: has become shorter while it was read")
            yield content


@contextmanager
def open_file(path: Path) -> Iterator[OpenFile]:
    """Open a file, or the file of tensors in a folder of PEFT's, for a block."""
    with explained(f"{path}: can't be read"):
        folder = path if path.is_dir() else None
        if folder:
            path = next((p for n in (SAFE, PICKLED) if (p := folder / n).exists()), folder)
        if path == folder:
            raise FileError(f"{path}: is of no known format: it has no {SAFE}")
        check_regular(path)
        file = open(path, "rb")  # noqa: SIM115, because the block's errors aren't the file's
    with file:
        yield OpenFile(path, folder, file, *_header(path, file))


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn what the system can't do into a `FileError`."""
    try:
        yield
    except LoRAError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # of a name, or of a loop of links
        raise FileError(f"{what}: {getattr(error, 'strerror', None) or error}") from error


def check_regular(path: Path) -> None:
    """Raise for what can't be read, or could be waited for without end, such as a pipe."""
    if path.exists() and not path.is_file():
        raise FileError(f"{path}: can't be read: no regular file")


def _unpickled(path: Path, file: BinaryIO) -> dict[str, Tensor]:
    """Load a state dict with `weights_only=True`: tensors and plain containers, no code."""
    file.seek(0)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # damage can make anything of a pickle
        raise FileError(
            f"{path}: no state dict that can be read safely: damaged, or more than tensors"
        ) from None
    if isinstance(content, dict):  # of a training's checkpoint what is inside
        inner = map(content.get, ("state_dict", "model_state_dict", "model"))
        content = next((each for each in inner if isinstance(each, dict)), content)
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and len(key) <= LONGEST_NAME and isinstance(value, Tensor)
        for key, value in content.items()
    ):
        raise FileError(
            f"{path}: a state dict must hold tensors by names of up to {LONGEST_NAME} characters"
        )
    return content


def write_content(path: Path, content: Content) -> None:
    """Write a file, or with a config a folder, which is made if it isn't there."""
    tensors, metadata, config, card = content
    check_name(path, folder=config is not None)
    if config is None:
        save_tensors(path, tensors, metadata)
        return
    with explained(f"{path}: no folder can be made"):
        path.mkdir(parents=True, exist_ok=True)
    with replace_file(path / CONFIG) as file:  # takes its place after the tensors have taken theirs
        file.write(json.dumps(config, indent=2).encode())
        file.flush()
        save_tensors(path / SAFE, tensors, metadata)
    if not (path / CARD).exists():
        with replace_file(path / CARD) as file:
            file.write(card.encode())


def save_tensors(path: Path, tensors: Tensors, metadata: Mapping[str, str]) -> None:
    """Write tensors of the dtypes in `CODES` to a safetensors file, whole or not at all."""
    # Readers view the bytes in place, so every tensor has to begin at a multiple of its item size.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    entries = {name: entry_of(f"{path}: {name}", tensor) for name, tensor in ordered}
    write_blobs(path, entries, metadata, (bytes_of(name, tensor) for name, tensor in ordered))


def write_blobs(
    path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str], blobs: Iterable[Any]
) -> None:
    """Write a safetensors file from its tensors' bytes as they come, whole or not at all."""
    content: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for name, entry in entries.items():
        end = begin + entry.end - entry.begin
        content[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [begin, end]}
        begin = end
    with explained(f"{path}: can't be written: a name or metadata"):
        encoded = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    if len(encoded) > LONGEST_HEADER:
        raise FileError(
            f"{path}: can't be written: names and metadata take {len(encoded):,} bytes, and "
            f"{LONGEST_HEADER:,} can be read"
        )
    with replace_file(path) as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for blob in blobs:
            file.write(blob)


@contextmanager
def replace_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file in the same folder that takes the path's place when it is complete."""
    with explained(f"{path}: can't be written"):
        target = path.resolve()  # a link stays one
        if target.exists() and not target.is_file():
            raise OSError(f"{'a folder' if target.is_dir() else 'no regular file'} is there")
        temporary = target.with_name(f".{target.name[:50]}.{secrets.token_hex(4)}")
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if target.exists():
                shutil.copymode(target, temporary)
            os.replace(temporary, target)
        finally:
            with suppress(OSError):
                temporary.unlink()


def check_apart(out: Path, *inputs: Path) -> None:
    """Raise if what is going to be written is also read, itself or beside it."""
    written = [out, *out.iterdir()] if out.is_dir() else [out] * out.exists()
    for path in inputs:
        inside = [*path.iterdir()] if path.is_dir() else []
        for read in [path, path.parent / CONFIG, *inside]:
            if read.exists() and any(map(read.samefile, written)):
                raise FileError(f"{out}: would be read and written; name another")


def check_name(out: Path, folder: bool = False) -> None:
    """Raise if a name says that there is going to be something else than there is."""
    wrong = (*PICKLES, ".json", ".txt", *[".safetensors"] * folder)
    if out.suffix in wrong:
        what = ("a folder", "name one") if folder else ("a safetensors file", "end it so")
        raise FileError(f"{out}: {what[0]} is written, which {out.suffix} denies; {what[1]}")


def check_strings(name: str, given: Any) -> Mapping[str, str]:
    """Return what maps strings to strings, all of them fit for a file, or raise."""
    texts = [t for item in given.items() for t in item] if isinstance(given, Mapping) else [None]
    # A lone half of a surrogate pair has no bytes.
    if any(type(t) is not str or t.encode("utf-8", "ignore").decode() != t for t in texts):
        raise LoRAError(f"{name} must map strings to strings, got {given!r:.80}")
    return dict(given)


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object, or raise a `FileError`."""
    check_regular(path)
    with explained(f"{path}: can't be read as JSON"):
        return strict_json(path.read_text("utf-8"))


def strict_json(text: str) -> dict[str, Any]:
    """Parse a JSON object without duplicate keys, NaN or infinity, or raise a `ValueError`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            raise ValueError("a key is there twice")
        return content

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    content = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    if not isinstance(content, dict):
        raise ValueError("no JSON object")
    return content
