"""Files of models that two processes hold in pieces: one writes, none waits, others merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_param import LoRAError, base_state_dict, load_lora, merge_lora, save_lora
from lora_param.io import files
from lora_param.sharding import whole

from .ranks import Ranks
from .sharded_cases import adapted, net, sharded, trained

pytestmark = pytest.mark.skipif(torch.__version__ < "2.7", reason="FSDP2 shards on CUDA alone")


def writes(path: Path) -> int:
    model, written, write = sharded(adapted()), [], files.write_adapter
    with pytest.MonkeyPatch.context() as patch:
        note = lambda *args, **options: written.append(args) or write(*args, **options)  # noqa: E731
        patch.setattr(files, "write_adapter", note)
        save_lora(model, path)
    return len(written)


def test_the_first_rank_alone_writes(ranks: Ranks, path: Path) -> None:
    assert ranks(writes, path) == [1, 0]


def fails_by_no_error_of_ours(path: Path) -> None:
    model = sharded(adapted())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "write_adapter", raises_memory_error)
        with pytest.raises(LoRAError, match="MemoryError"):
            save_lora(model, path)


def raises_memory_error(*args: Any, **options: Any) -> None:
    raise MemoryError


def test_whatever_fails_on_the_first_rank_leaves_none_waiting(ranks: Ranks, path: Path) -> None:
    ranks(fails_by_no_error_of_ours, path)


def is_merged_elsewhere(path: Path) -> None:
    model = sharded(adapted())
    trained(model, halved=True, steps=2)
    save_lora(model, path)
    plain, base = net(), base_state_dict(model)
    plain.load_state_dict({name: whole(each) for name, each in base.items()})
    load_lora(plain, path, base="require")
    merge_lora(plain)
    x = torch.randn(2, 6)
    torch.testing.assert_close(plain(x), model(x))


def test_what_fsdp_has_trained_is_merged_on_an_unsharded_model(ranks: Ranks, path: Path) -> None:
    ranks(is_merged_elsewhere, path)
