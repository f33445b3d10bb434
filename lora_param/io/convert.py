"""A file, written again in another format."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..errors import FileError
from .checkpoint import plain_tensors
from .content import check_apart, open_file
from .formats import open_adapter, write_adapter
from .outline import outline_of_tensors


def convert_file(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    format: str,
    base: str | os.PathLike[str] | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    write_options: Mapping[str, Any] | None = None,
) -> list[str]:
    """Write an adapter's file again in another format; what can't be known is an error.

    Args:
        path: The file, in any format.
        out: What to write: a file, for PEFT a folder.
        format: The format to write: `"native"`, `"peft"` or `"kohya"`.
        base: The checkpoint that it was trained on; needed unless the file is our own.
        options: What the file's own format takes, such as `{"alpha": 16}`.
        write_options: What the new format takes, see `save_lora`.

    Returns:
        The names of the weights, in model order.

    Raises:
        FileError: The file doesn't say enough, doesn't fit the checkpoint, or can't be held.
        LoRAError: A format doesn't know an option.

    Example:
        >>> import tempfile, torch
        >>> from lora_param import register_lora, save_lora
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2))
        >>> _ = register_lora(model, rank=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_lora(model, f"{folder}/adapter.safetensors")
        ...     convert_file(f"{folder}/adapter.safetensors", f"{folder}/for_peft", "peft")
        ['0.weight']
    """
    check_apart(Path(out), Path(path), Path(base) if base else None)
    with ExitStack() as stack:
        file = stack.enter_context(open_adapter(Path(path)))
        about, weights = file.about, file.outline
        if base:
            tensors = plain_tensors(stack.enter_context(open_file(Path(base))))
            weights = outline_of_tensors(tensors, about.layers)
        if weights.unknown:
            raise FileError(
                f"{path}: the format {file.format.name} doesn't say what its weights are; give the "
                "checkpoint that it was trained on with --base"
            )
        deltas = file.fit(weights, **options or {})
        write_adapter(format, Path(out), deltas, weights, about, **write_options or {})
    return list(deltas)
