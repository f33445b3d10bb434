"""Whatever a file was made of comes back, of any kinds, numbers and dtypes: law 13."""

from __future__ import annotations

import copy
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor, nn

from lora_param import (
    enable_lora,
    fingerprint,
    load_lora,
    lora_parameters,
    lora_state_dict,
    register_lora,
    remove_lora,
    save_lora,
)

from .cases import shake
from .peft_cases import bert, output, quiet, tokens, vit

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Net(nn.Module):
    """Layers of many kinds, of which one's forward moves buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 6)
        self.fc, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.fc(self.tokens(x)).mT)
        return self.head(self.conv(h).mT)


ADAPTED = ["tokens", "fc", "conv", "head"]
WHOLE = ["tokens", "fc.bias", "norm", "norm.weight", "conv", "head", "*.bias"]
NUMBERS = {
    "rank": st.integers(1, 6),
    "alpha": st.none() | st.floats(-8, 8).filter(lambda alpha: abs(alpha) > 1e-3),
    "scaling": st.sampled_from(["lora", "rslora"]),
    "target": st.lists(st.sampled_from(ADAPTED), unique=True),
    "train": st.none() | st.lists(st.sampled_from(WHOLE), unique=True, min_size=1),
    "dtype": st.sampled_from([None, *DTYPES]),
    "statistics": st.booleans(),
    "kind": st.sampled_from(["lora", "dora", "dense"]),
}


def registered(model: nn.Module, dropout: float, **options: Any) -> list[str]:
    """Register what a kind takes of the options."""
    kind = options["kind"]
    if kind == "dense":
        options = {n: options[n] for n in ("kind", "target", "train", "dtype", "statistics")}
    elif dropout and not {"tokens"} & {*options["target"]} and kind == "lora":
        options["dropout"] = dropout
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what both patterns name, and of statistics=False
        return register_lora(model, **options)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    base_dtype=st.sampled_from(DTYPES),
    dropout=st.sampled_from([0.0, 0.25]),
    trained=st.booleans(),
    data=st.data(),
)
def test_all_that_an_adapter_is_comes_back_from_a_file(
    base_dtype: torch.dtype, dropout: float, trained: bool, data: st.DataObject
) -> None:
    options = {name: data.draw(strategy, name) for name, strategy in NUMBERS.items()}
    torch.manual_seed(0)
    model = Net().to(base_dtype)
    if not (options["target"] or options["train"]):
        return
    names = registered(model, dropout, **options)
    with torch.no_grad():
        for each in lora_parameters(model):
            each.copy_(torch.randn(each.shape) / 3)
        model(torch.randint(0, 7, (3, 4)))  # moves the statistics
    base = copy.deepcopy(model)
    remove_lora(base)
    before = fingerprint(base)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        save_lora(model, path)
        assert sorted(load_lora(base, path, base="require", trainable=trained)) == sorted(names)
    ours, theirs = lora_state_dict(base), lora_state_dict(model)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name])
    assert {each.requires_grad for each in lora_parameters(base)} == {trained}
    for each in lora_parameters(model):
        each.requires_grad_(trained)  # by which torch chooses how it multiplies
    x, outputs = torch.randint(0, 7, (3, 4)), []
    for each in (model, base):
        torch.manual_seed(1)  # of dropout
        outputs.append(each.train()(x))
    assert torch.equal(*outputs)
    assert torch.equal(model.eval()(x), base.eval()(x))
    remove_lora(base)
    assert not options["statistics"] or fingerprint(base) == before


HEADS: dict[str, Callable[[], nn.Module]] = {"bert": bert, "vit": vit}
INPUTS = {"bert": tokens(2, 5), "vit": lambda: torch.randn(2, 3, 8, 8)}
FRESH = """
import sys, torch
from lora_param import load_lora
from tests.test_round_trips import HEADS
torch.manual_seed(0)
base = HEADS[sys.argv[1]]().eval()
x, expected = torch.load(sys.argv[3])
before = base(x).logits
load_lora(base, sys.argv[2], base="require")
assert torch.equal(base(x).logits, expected) and not torch.allclose(before, expected)
"""


@pytest.mark.parametrize("name", HEADS)
def test_a_new_head_is_one_call_and_one_file_for_a_fresh_process(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = HEADS[name]().eval()
    base, x = copy.deepcopy(model), INPUTS[name]()
    register_lora(model, rank=2, train="classifier")
    shake(model)
    save_lora(model, path := tmp_path / "adapter.safetensors")
    torch.save((x, output(model, x)), tmp_path / "logits.pt")
    command = [sys.executable, "-c", FRESH, name, str(path), str(tmp_path / "logits.pt")]
    subprocess.run(command, check=True, cwd=Path(__file__).parent.parent)
    save_lora(model, tmp_path / "peft", format="peft")
    with quiet():
        theirs = PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    torch.testing.assert_close(output(theirs, x), output(model, x))


def test_whether_an_adapter_is_on_is_not_kept(path: Path) -> None:
    model = Net()
    register_lora(model, rank=2)
    shake(model)
    for delta in (each for each in model.modules() if hasattr(each, "lora_A")):
        delta.enabled = False
    save_lora(model, path)
    enable_lora(model)
    base = copy.deepcopy(model)
    remove_lora(base)
    load_lora(base, path)
    x = torch.randint(0, 7, (3, 4))
    assert torch.equal(base.eval()(x), model.eval()(x))
