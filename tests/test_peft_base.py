"""PEFT's folders with what is trained whole, beside the base that they are of."""

from __future__ import annotations

import copy
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_param import FileError, load_lora, merge_lora, register_lora, save_lora
from lora_param.io import convert_file, merge_checkpoint

from .cases import shake
from .peft_cases import Case, bert, tokens, trained_in_peft

QUERY = ["query", "value"]


@pytest.mark.parametrize("to", ["native", "merged"])
def test_a_folder_with_a_head_and_norms_is_read_beside_a_checkpoint(
    to: str, tmp_path: Path
) -> None:
    base = bert()
    base.norm = nn.BatchNorm1d(3)
    options = {"modules_to_save": ["classifier", "norm"], "bias": "all"}
    case = Case("", lambda: base, tokens(2, 5), QUERY, options=options)
    trained_in_peft(case, tmp_path / "peft")
    checkpoint, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    save_file({name: each.clone() for name, each in base.state_dict().items()}, checkpoint)
    load_lora(model := copy.deepcopy(base), tmp_path / "peft")
    if to == "native":
        convert_file(tmp_path / "peft", out, "native", checkpoint)
        load_lora(base, out, base="require")
    else:
        merge_checkpoint(tmp_path / "peft", checkpoint, out)
        base.load_state_dict(load_file(out))
    merge_lora(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(attrgetter(name)(base), tensor)


def test_new_values_are_not_written_without_the_whole_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = bert()
    register_lora(model, target="query", train="classifier")
    shake(model)
    save_lora(model, tmp_path / "native.safetensors")
    message = r"classifier.weight: PEFT keeps its new values; convert a native file with the base"
    with pytest.raises(FileError, match=message):
        convert_file(tmp_path / "native.safetensors", tmp_path / "out", "peft")
    monkeypatch.setattr("lora_param.io.formats.peft_whole.is_sharded", lambda tensor: True)
    with pytest.raises(FileError, match=message):
        save_lora(model, tmp_path / "out", format="peft")
    assert not (tmp_path / "out").exists()
