"""loralib's state dicts, against the real package."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import loralib
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_param import FileError, load_lora, lora_parameters, lora_summary
from lora_param.io.cli import main


@dataclass(frozen=True)
class Case:
    """A layer of loralib's, the plain layer in its place, and an input."""

    id: str
    theirs: Callable[[], nn.Module]
    plain: Callable[[], nn.Module]
    make_input: Callable[[], Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    def trained(self, folder: Path, bias: str = "none") -> tuple[nn.Module, nn.Module, Path]:
        """Return a trained layer, a plain one of the same weights, and the saved file."""
        torch.manual_seed(0)
        theirs, plain = nn.Sequential(self.theirs()), nn.Sequential(self.plain())
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape) / 3
        weights = {k.replace(".conv.", "."): v for k, v in theirs.state_dict().items()}
        plain.load_state_dict({k: v for k, v in weights.items() if "lora_" not in k})
        path = folder / "adapter.pt"
        torch.save(loralib.lora_state_dict(theirs, bias=bias), path)
        return theirs, plain, path


def merged(out: int, *enable: bool, **options: Any) -> Callable[[], nn.Module]:
    return lambda: loralib.MergedLinear(
        9, out, r=2, lora_alpha=3, enable_lora=list(enable), **options
    )


def conv(**options: Any) -> Callable[[], nn.Module]:
    return lambda: loralib.Conv2d(4, 20, 3, r=2, lora_alpha=3, **options)


def floats(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape)


TWO_OF_THREE = {"enable_lora": [True, False, True]}
SLICES = {"merged, all slices": (0, 1, 2), "merged, the last": (2,)}
"""Which slices of four rows are adapted."""


CASES = [
    Case("linear", lambda: loralib.Linear(6, 5, r=2, lora_alpha=3), lambda: nn.Linear(6, 5), floats(3, 6)),
    Case("embedding", lambda: loralib.Embedding(7, 5, r=2, lora_alpha=3), lambda: nn.Embedding(7, 5), lambda: torch.randint(0, 7, (3, 4))),
    Case("fan in, fan out", lambda: loralib.Linear(6, 5, r=2, lora_alpha=3, fan_in_fan_out=True), lambda: Conv1D(5, 6), floats(3, 6)),
    Case("merged, all slices", merged(12, True, True, True), lambda: nn.Linear(9, 12), floats(3, 9)),
    Case("merged, two of three", merged(12, True, False, True), lambda: nn.Linear(9, 12), floats(3, 9), TWO_OF_THREE),
    Case("merged, the last", merged(12, False, False, True), lambda: nn.Linear(9, 12), floats(3, 9), {"enable_lora": [False, False, True]}),
    Case("merged, fan in, fan out", merged(12, True, False, True, fan_in_fan_out=True), lambda: Conv1D(12, 9), floats(3, 9), TWO_OF_THREE),
    Case("convolution", conv(), lambda: nn.Conv2d(4, 20, 3), floats(2, 4, 7, 7)),
    Case("strided convolution", conv(stride=2, padding=1, dilation=2), lambda: nn.Conv2d(4, 20, 3, 2, 1, 2), floats(2, 4, 7, 7)),
    Case("convolution in groups", conv(groups=2), lambda: nn.Conv2d(4, 20, 3, groups=2), floats(2, 4, 7, 7)),
    Case("1x1 convolution", lambda: loralib.Conv2d(4, 6, 1, r=2, lora_alpha=3), lambda: nn.Conv2d(4, 6, 1), floats(2, 4, 3, 3)),
]  # fmt: skip


def load(case: Case, model: nn.Module, path: Path) -> list[str]:
    return load_lora(model, path, alpha=3, **case.options)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_the_update_is_loralibs_own(case: Case, tmp_path: Path) -> None:
    theirs, plain, path = case.trained(tmp_path)
    names = ["0.weight"]
    if "merged" in case.id:
        slices = SLICES.get(case.id, (0, 2))
        names = [f"0.weight[{4 * index}:{4 * index + 4}]" for index in slices]
    assert load(case, plain, path) == names
    x = case.make_input()
    if "fan" in case.id and "merged" in case.id:
        theirs.eval()  # unmerged, its forward transposes twice and fails
    torch.testing.assert_close(plain(x), theirs(x))
    update = plain[0].weight - plain[0].parametrizations.weight.original
    layer = theirs.eval()[0]
    merged_weight = getattr(layer, "conv", layer).weight  # in eval, loralib merges
    torch.testing.assert_close(update, merged_weight - plain[0].parametrizations.weight.original)
    assert update.abs().max() > 0.1


@pytest.mark.parametrize("index", [4, 6])
def test_a_merged_layers_other_slices_stay_when_training_goes_on(
    index: int, tmp_path: Path
) -> None:
    case = CASES[index]
    theirs, plain, path = case.trained(tmp_path)
    load(case, plain, path)
    own = [p for name, p in theirs.named_parameters() if "lora_" in name]
    trained = list(lora_parameters(plain))
    assert sum(p.numel() for p in trained) == sum(p.numel() for p in own)
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    plain(case.make_input()).square().sum().backward()
    optimizer.step()
    now, before = plain[0].weight, plain[0].parametrizations.weight.original
    same = (now == before).all(int("fan" not in case.id))
    assert same.tolist() == [4 <= row < 8 for row in range(12)]


def test_a_convolutions_rank_is_that_of_its_kernels(tmp_path: Path) -> None:
    case = CASES[7]
    _, plain, path = case.trained(tmp_path)
    load(case, plain, path)
    [weight] = lora_summary(plain).weights
    assert (weight.adapters[0].rank, weight.adapters[0].alpha) == (2 * 3 * 3, 3 * 3 * 3)


def test_a_convolution_of_few_channels_keeps_its_update(tmp_path: Path) -> None:
    case = Case("", lambda: loralib.Conv2d(4, 6, 3, r=2, lora_alpha=3), lambda: nn.Conv2d(4, 6, 3), floats(2, 4, 5, 5))  # fmt: skip
    theirs, plain, path = case.trained(tmp_path)
    with pytest.warns(UserWarning, match="rank lowered to the weight's smaller side"):
        load(case, plain, path)
    x = case.make_input()
    torch.testing.assert_close(plain(x), theirs(x))


def test_biases_that_are_the_models_own_pass(tmp_path: Path) -> None:
    for index in (0, 7):
        _, plain, path = CASES[index].trained(tmp_path, bias="all")
        assert load(CASES[index], plain, path) == ["0.weight"]


def test_a_whole_state_dict_of_the_same_base_passes(tmp_path: Path) -> None:
    theirs, plain, path = CASES[7].trained(tmp_path)
    torch.save({"model_state_dict": theirs.state_dict()}, path)
    assert load(CASES[7], plain, path) == ["0.weight"]


@pytest.mark.parametrize(("index", "key"), [(0, r"0\.bias"), (7, r"0\.bias")])
def test_a_trained_bias_is_refused_by_name(index: int, key: str, tmp_path: Path) -> None:
    _, plain, path = CASES[index].trained(tmp_path, bias="lora_only")
    state = torch.load(path)
    state |= {name: tensor + 1 for name, tensor in state.items() if "bias" in name}
    state["0.bias"] = torch.ones(len(plain[0].bias))
    torch.save(state, path)
    with pytest.raises(FileError, match=f"{key} is neither a factor nor equal to the model's"):
        load(CASES[index], plain, path)


def test_a_bias_is_no_meta_models_own(tmp_path: Path) -> None:
    _, plain, path = CASES[0].trained(tmp_path, bias="all")
    with pytest.raises(FileError, match=r"0\.bias is neither a factor nor equal to the model's"):
        load(CASES[0], plain.to("meta"), path)


BROKEN: list[tuple[str, int, Callable[[dict[str, Any]], Any], dict[str, Any], str]] = [
    ("no alpha", 0, lambda s: None, {}, r"the file doesn't hold its lora_alpha; pass it as alpha="),
    ("no enable_lora", 4, lambda s: None, {"alpha": 3}, "0: adapts 2 of 3 slices; say which by enable_lora="),
    ("enable_lora of others", 4, lambda s: None, {"alpha": 3, "enable_lora": [True, False]}, "0: adapts 2 of 3 slices"),
    ("enable_lora of fewer", 4, lambda s: None, {"alpha": 3, "enable_lora": [True, False, False]}, "0: adapts 2 of 3 slices"),
    ("no B", 0, lambda s: s.pop("0.lora_B"), {"alpha": 3}, "0: has no lora_B"),
    ("another module", 0, lambda s: s.update({"7.lora_A": s.pop("0.lora_A"), "7.lora_B": s.pop("0.lora_B")}), {"alpha": 3}, "no module for 7; the nearest"),
    ("another width", 0, lambda s: s.update({"0.lora_A": torch.ones(2, 7)}), {"alpha": 3}, r"0: has factors \(2, 7\)"),
    ("another kernel", 7, lambda s: s.update({"0.lora_A": torch.ones(6, 7)}), {"alpha": 3}, r"0: has factors \(6, 7\)"),
    ("three slices of none", 4, lambda s: s.update({"0.lora_A": torch.ones(3, 9)}), {"alpha": 3}, r"0: has factors \(3, 9\)"),
    ("65 slices", 4, lambda s: s.update({"0.lora_A": torch.ones(65, 9), "0.lora_B": torch.ones(65, 1)}), {"alpha": 3}, r"0: has factors \(65, 9\)"),
    ("NaN", 0, lambda s: s["0.lora_A"].fill_(float("nan")), {"alpha": 3}, "its tensors must be finite"),
    ("NaN for an alpha", 0, lambda s: None, {"alpha": float("nan")}, "alpha must be a finite number"),
    ("no tensor", 0, lambda s: s.update({"0.lora_A": 1}), {"alpha": 3}, "a state dict must hold tensors by name"),
    ("a long name", 0, lambda s: s.update({1001 * "a": torch.ones(1)}), {"alpha": 3}, "names of up to 1000 characters"),
    ("junk", 0, lambda s: s.update(junk=torch.ones(1)), {"alpha": 3}, "junk is neither a factor nor equal"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("index", "edit", "options", "message"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN]
)
def test_a_state_dict_that_does_not_fit_is_refused_whole(
    index: int,
    edit: Callable[[dict[str, Any]], Any],
    options: dict[str, Any],
    message: str,
    tmp_path: Path,
) -> None:
    _, plain, path = CASES[index].trained(tmp_path)
    state = torch.load(path)
    edit(state)
    torch.save(state, path)
    with pytest.raises(FileError, match=message):
        load_lora(plain, path, **options)
    assert not hasattr(plain[0], "parametrizations")


def test_a_layer_that_loralib_cannot_adapt_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "adapter.pt"
    torch.save({"0.lora_A": torch.ones(6, 12), "0.lora_B": torch.ones(18, 6)}, path)
    with pytest.raises(FileError, match="0: is a Conv1d, for which loralib has no layer"):
        load_lora(nn.Sequential(nn.Conv1d(4, 6, 3)), path, alpha=1)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02.", b"junk" * 99])
def test_a_damaged_pickle_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "adapter.pt"
    path.write_bytes(content)
    with pytest.raises(FileError, match="no state dict that can be read safely"):
        load_lora(nn.Linear(6, 5), path, alpha=1)


def test_every_truncation_of_a_pickle_is_refused(tmp_path: Path) -> None:
    _, plain, path = CASES[0].trained(tmp_path)
    content = path.read_bytes()
    for end in range(0, len(content), 7):
        path.write_bytes(content[:end])
        with pytest.raises(FileError, match="no state dict that can be read safely"):
            load_lora(copy.deepcopy(plain), path, alpha=3)


def test_the_command_line_compares_biases_with_the_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, file, base = nn.Sequential(nn.Linear(6, 5)), tmp_path / "lora.pt", tmp_path / "base.pt"
    save_file(plain.state_dict(), base)
    factors = {"0.lora_A": torch.ones(2, 6), "0.lora_B": torch.ones(5, 2)}
    command = [*map(str, ("merge", file, "--base", base, "--out", tmp_path / "out"))]
    for change, status in ((0.0, 0), (1.0, 1)):
        torch.save(factors | {"0.bias": plain[0].bias.detach() + change}, file)
        assert main([*command, "--option", "alpha=2"]) == status
    assert "0.bias is neither a factor nor equal to the model's" in capsys.readouterr().err


def test_a_convolution_inside_a_block_as_loralib_has_it_is_found(tmp_path: Path) -> None:
    theirs, plain, path = CASES[7].trained(tmp_path)
    model = nn.Sequential(nn.ModuleDict({"conv": plain[0]}))
    assert load_lora(model, path, alpha=3) == ["0.conv.weight"]
    x = CASES[7].make_input()
    torch.testing.assert_close(model[0]["conv"](x), theirs(x))
