"""LyCORIS's kinds, as the real package writes and computes them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris.modules import LokrModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from torch import Tensor, nn

from lora_param import FileError, load_lora, lora_summary
from lora_param.io import file_summary
from lora_param.io.cli import main

from .kohya_cases import saved


def linear() -> nn.Module:
    return nn.Linear(24, 36)


def conv1d() -> nn.Module:
    return nn.Conv1d(8, 12, 3, stride=2, padding=1)


def conv2d() -> nn.Module:
    return nn.Conv2d(8, 12, 3, stride=2, padding=1)


def conv3d() -> nn.Module:
    return nn.Conv3d(4, 6, 3)


def wide() -> nn.Module:
    return nn.Linear(96, 120)


INPUTS = {
    linear: (3, 24),
    conv1d: (2, 8, 9),
    conv2d: (2, 8, 7, 6),
    conv3d: (2, 4, 4, 4, 5),
    wide: (3, 96),
}


@dataclass(frozen=True)
class Case:
    """A module of LyCORIS's on a layer, and what it is read as."""

    id: str
    cls: Callable[..., Any]
    layer: Callable[[], nn.Module]
    read_as: str
    options: dict[str, Any] = field(default_factory=dict)
    rank: int = 2
    alpha: float = 3.0

    def trained(
        self, dtype: torch.dtype = torch.float32
    ) -> tuple[Any, nn.Module, dict[str, Tensor]]:
        torch.manual_seed(0)
        layer = self.layer()
        plain = nn.Sequential(copy.deepcopy(layer))
        theirs = self.cls("0", layer, 1.0, self.rank, self.alpha, **self.options)
        for name, parameter in theirs.named_parameters():
            if not name.startswith("org_"):
                parameter.data = torch.randn(parameter.shape).to(dtype).float() / 2
        own = {k: v.detach().clone() for k, v in theirs.custom_state_dict().items()}
        tensors = {f"lycoris_0.{k}": v.to(dtype).contiguous() for k, v in own.items()}
        return theirs.eval(), plain, tensors


FULL = {"full_matrix": True}
BOTH = {"decompose_both": True}
CASES = [
    *(Case(f"tucker {make.__name__}", LoConModule, make, "lora", {"use_tucker": True}) for make in (conv1d, conv2d, conv3d)),
    *(Case(f"loha {make.__name__}", LohaModule, make, "lora") for make in (linear, conv1d, conv2d, conv3d)),
    *(Case(f"loha tucker {make.__name__}", LohaModule, make, "lora", {"use_tucker": True}) for make in (conv1d, conv2d, conv3d)),
    Case("loha, large rank", LohaModule, linear, "dense", rank=4),
    Case("loha tucker, large rank", LohaModule, conv2d, "dense", {"use_tucker": True}, rank=4),
    Case("loha of alpha 0", LohaModule, linear, "lora", alpha=0),
    Case("lokr", LokrModule, wide, "lora", {"factor": 4}),
    Case("lokr, factored twice", LokrModule, wide, "lora", {"factor": 8, **BOTH}),
    Case("lokr, full", LokrModule, linear, "dense", {"factor": 4, **FULL}),
    Case("lokr, full, wide", LokrModule, wide, "dense", FULL),
    Case("lokr, one full, one factored", LokrModule, linear, "dense", {"factor": 6, **BOTH}, rank=3),
    Case("lokr conv1d", LokrModule, conv1d, "lora", {"factor": 2}),
    Case("lokr conv2d", LokrModule, conv2d, "lora", {"factor": 2}, rank=1),
    Case("lokr conv3d", LokrModule, conv3d, "lora", {"factor": 2}, rank=1),
    Case("lokr tucker conv2d", LokrModule, conv2d, "lora", {"factor": 2, "use_tucker": True}, rank=1),
    Case("lokr tucker conv1d", LokrModule, conv1d, "lora", {"factor": 2, "use_tucker": True}),
]  # fmt: skip
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)

DORA = {"weight_decompose": True}
WITH_LENGTHS = [
    *(Case(f"tucker {make.__name__}", LoConModule, make, "dora", {"use_tucker": True, **DORA}) for make in (conv1d, conv2d, conv3d)),
    *(Case(f"loha {make.__name__}", LohaModule, make, "dora", DORA) for make in (linear, conv1d, conv2d, conv3d)),
    Case("loha, of inputs", LohaModule, linear, "dora", {"wd_on_out": False, **DORA}),
    Case("loha tucker", LohaModule, conv2d, "dora", {"use_tucker": True, **DORA}),
    Case("lokr", LokrModule, wide, "dora", {"factor": 4, **DORA}),
    Case("lokr, of inputs, factored twice", LokrModule, wide, "dora", {"factor": 8, "wd_on_out": False, **BOTH, **DORA}),
    Case("lokr, full", LokrModule, linear, "dora", {"factor": 4, **FULL, **DORA}),
    Case("lokr conv2d", LokrModule, conv2d, "dora", {"factor": 2, **DORA}),
]  # fmt: skip


@pytest.mark.parametrize(
    "case", [*CASES, *WITH_LENGTHS], ids=lambda case: f"{case.id}, {case.read_as}"
)
def test_the_update_is_lycoris_own(case: Case, tmp_path: Path) -> None:
    theirs, plain, tensors = case.trained()
    x = torch.randn(INPUTS[case.layer])
    expected, before = theirs(x), plain(x)
    assert load_lora(plain, saved(tmp_path, tensors)) == ["0.weight"]
    torch.testing.assert_close(plain(x), expected, rtol=1e-4, atol=1e-4)
    assert (expected - before).abs().max() > 0.05
    assert lora_summary(plain).weights[0].adapters[0].kind == case.read_as


def test_with_lengths_a_rank_above_the_smaller_side_is_lowered(tmp_path: Path) -> None:
    case = Case("loha", LohaModule, linear, "dora", DORA, rank=6)  # which comes to 36, of 24
    theirs, plain, tensors = case.trained()
    x = torch.randn(INPUTS[linear])
    with pytest.warns(UserWarning, match="rank lowered to the weight's smaller side"):
        load_lora(plain, saved(tmp_path, tensors))
    torch.testing.assert_close(plain(x), theirs(x), rtol=1e-4, atol=1e-4)
    assert lora_summary(plain).weights[0].adapters[0].rank == 24


@each_case
def test_the_smaller_form_is_kept(case: Case, tmp_path: Path) -> None:
    _, plain, tensors = case.trained()
    load_lora(plain, saved(tmp_path, tensors))
    [adapter] = lora_summary(plain).weights[0].adapters
    assert adapter.parameters <= plain[0].parametrizations.weight.original.numel()


@each_case
def test_info_says_what_it_was(case: Case, tmp_path: Path, capsys: Any) -> None:
    _, plain, tensors = case.trained()
    path = saved(tmp_path, tensors)
    kind = case.id.split()[0].strip(",")
    [weight] = file_summary(path).weights
    assert weight.kind == kind
    load_lora(plain, path)
    added = plain[0].weight - plain[0].parametrizations.weight.original
    assert weight.norm == pytest.approx(added.norm().item(), rel=1e-3)
    assert main(["info", str(path)]) == 0
    assert f" {kind} " in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("index", [3, 13])
def test_products_of_half_precision_are_kept_exactly(
    index: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    _, plain, tensors = CASES[index].trained(dtype)
    load_lora(plain, saved(tmp_path, tensors))
    [delta] = plain[0].parametrizations.weight
    own = {key.rpartition(".")[2]: tensor.double() for key, tensor in tensors.items()}
    if "hada_w1_a" in own:
        expected = (own["hada_w1_a"] @ own["hada_w1_b"]) * (own["hada_w2_a"] @ own["hada_w2_b"])
    else:
        expected = torch.kron(own["lokr_w1"], own["lokr_w2_a"] @ own["lokr_w2_b"])
    got = delta.lora_B.detach().double() @ delta.lora_A.detach().double()
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


L = "lycoris_0"
BROKEN: dict[str, tuple[dict[str, Tensor], str]] = {
    "half a LoHa": ({"hada_w1_a": torch.ones(36, 2), "hada_w1_b": torch.ones(2, 24)}, "lycoris_0: has hada_w1_a, hada_w1_b, which are no loha's"),
    "one core": ({**dict.fromkeys(("hada_w1_a", "hada_w2_a"), torch.ones(2, 36)), **dict.fromkeys(("hada_w1_b", "hada_w2_b"), torch.ones(2, 24)), "hada_t1": torch.ones(2, 2)}, "which are no loha's"),
    "half a LoKr": ({"lokr_w1": torch.ones(4, 4)}, "has lokr_w1, which are no lokr's"),
    "two kinds": ({"lokr_w1": torch.ones(4, 4), "hada_w1_a": torch.ones(4, 4)}, "has hada_w1_a, lokr_w1, which are no"),
    "a core alone": ({"lora_mid.weight": torch.ones(2, 2, 3)}, "has lora_mid, which are no tucker's"),
    "another shape": ({"lokr_w1": torch.ones(4, 4), "lokr_w2": torch.ones(4, 4)}, r"is a lokr of 16x16 for a weight of \(36, 24\)"),
    "other ranks": ({"lokr_w1": torch.ones(4, 4), "lokr_w2_a": torch.ones(9, 2), "lokr_w2_b": torch.ones(3, 6)}, "lycoris_0: has factors"),
    "no other module": ({"hada_w1_a": torch.ones(2, 2)}, "no module for"),
}  # fmt: skip


@pytest.mark.parametrize(("own", "message"), BROKEN.values(), ids=BROKEN)
def test_what_is_no_kinds_is_refused(own: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    name = "lycoris_9" if "no module" in message else L
    model = nn.Sequential(linear())
    path = saved(tmp_path, {f"{name}.{key}": tensor.clone() for key, tensor in own.items()})
    with pytest.raises(FileError, match=message):
        load_lora(model, path)
    assert type(model[0]) is nn.Linear


def test_a_small_file_can_not_ask_for_a_huge_matrix(tmp_path: Path) -> None:
    ones = torch.ones(3000, 3000).half()
    path = saved(tmp_path, {f"{L}.lokr_w1": ones, f"{L}.lokr_w2": ones.clone()})
    with pytest.raises(FileError, match="is a lokr of 9000000x9000000, which is too large"):
        file_summary(path)
