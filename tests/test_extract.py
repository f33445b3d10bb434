"""The difference between a model and a tuned twin as an adapter; combinations of files."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_param import (
    AdapterError,
    FileError,
    LoRAError,
    base_state_dict,
    combine_lora,
    extract_lora,
    load_lora,
    lora_selected,
    register_lora,
    remove_lora,
    resize_lora,
    save_lora,
    select_lora,
)
from lora_param.io import combine_files, extract_checkpoint
from lora_param.io.cli import main

from .cases import describe, shake


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 8)
        self.first, self.norm = nn.Linear(8, 12), nn.LayerNorm(12)
        self.second = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.second(self.norm(self.first(self.embedding(x))))
        return output


def twins(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = Net().to(dtype)
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for name in ("first.weight", "norm.bias", "second.weight", "embedding.weight"):
            parameter = tuned.get_parameter(name)
            parameter += torch.randn_like(parameter) / 4
    return model, tuned


X = torch.arange(9)


@pytest.mark.parametrize("form", ["module", "state dict", "file"])
def test_all_of_a_change_comes_back(form: str, tmp_path: Path) -> None:
    model, tuned = twins()
    given: Any = tuned
    if form == "state dict":
        given = tuned.state_dict()
    if form == "file":
        given = tmp_path / "tuned.safetensors"
        save_file(tuned.state_dict(), given)
    base = model(X)
    fits = extract_lora(model, given, rank=12, adapter="tuned")
    ranks = {fit.weight: fit.rank for fit in fits}
    want = {"embedding.weight": None, "first.weight": 8, "norm.bias": None, "second.weight": 5}
    assert ranks == want
    torch.testing.assert_close(model(X), tuned(X), rtol=0, atol=1e-10)
    with lora_selected(model, None):
        assert torch.equal(model(X), base)


@pytest.mark.parametrize("rank", [2, 0.8])
def test_an_error_is_the_best_there_is(rank: int | float) -> None:
    model, tuned = twins()
    change = (tuned.first.weight - model.first.weight).detach()  # type: ignore[union-attr, operator]
    values = torch.linalg.svdvals(change)
    fits = {fit.weight: fit for fit in extract_lora(model, tuned, rank=rank)}
    fit = fits["first.weight"]
    assert fit.rank is not None
    if isinstance(rank, float):
        shares = values.square().cumsum(0) / values.square().sum()
        assert fit.rank == 1 + int((shares < rank).sum())
    else:
        assert fit.rank == rank
    best = (values[fit.rank :].norm() / values.norm()).item()
    assert fit.error == pytest.approx(best, rel=1e-9)
    got = (model.first.weight - tuned.first.weight).norm() / change.norm()  # type: ignore[union-attr, operator]
    assert got.item() == pytest.approx(best, rel=1e-9)


def test_equal_weights_are_left_out_in_another_dtype_and_where_they_are_not_finite() -> None:
    model, tuned = nn.Linear(4, 3), nn.Linear(4, 3)
    model.weight.data.copy_(model.weight.bfloat16())
    model.mask = nn.Parameter(torch.tensor([0.0, -torch.inf]))
    weights = {"weight": model.weight.bfloat16(), "bias": tuned.bias, "mask": model.mask}
    fits = extract_lora(model, {name: each.detach() for name, each in weights.items()})
    assert [fit.weight for fit in fits] == ["bias"]


def test_a_half_precision_change_comes_back_to_the_bit_where_it_is_dense() -> None:
    model, tuned = twins(torch.bfloat16)
    extract_lora(model, tuned, rank=4)
    assert torch.equal(model.norm.bias, tuned.norm.bias)  # type: ignore[union-attr]
    assert torch.equal(model.embedding.weight, tuned.embedding.weight)  # type: ignore[union-attr]


def test_an_adapter_extracted_from_an_adapted_twin_is_that_adapter() -> None:
    model, _ = twins()
    tuned = copy.deepcopy(model)
    register_lora(tuned, rank=2)
    shake(tuned)
    fits = extract_lora(model, tuned, rank=0.999999)
    assert [fit.rank for fit in fits] == [2, 2]
    torch.testing.assert_close(model(X), tuned(X), rtol=0, atol=1e-2)


def test_a_target_says_what_is_extracted_and_a_warning_what_is_left() -> None:
    model, tuned = twins()
    with pytest.warns(
        UserWarning, match="not extracted: embedding.weight, norm.bias, second.weight"
    ):
        fits = extract_lora(model, tuned, rank=2, target="first")
    assert [fit.weight for fit in fits] == ["first.weight"]
    model, tuned = twins()
    fits = extract_lora(model, tuned, rank=2, exclude=["embedding", "second"])
    assert [fit.weight for fit in fits] == ["first.weight", "norm.bias"]


def test_statistics_that_moved_are_extracted() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)).double()
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned[0].weight += 1
        tuned(torch.randn(8, 4).double())
    twin = copy.deepcopy(model)
    extract_lora(model, tuned)
    x = torch.randn(3, 4).double()
    torch.testing.assert_close(model.eval()(x), tuned.eval()(x), rtol=0, atol=1e-10)
    with pytest.warns(UserWarning, match=r"not extracted: 1\.running_mean, 1\.running_var, 1\.num"):
        extract_lora(twin, tuned, target="0")


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        (lambda s: s.pop("first.bias"), {}, LoRAError, "missing: first.bias"),
        (lambda s: s.update(head=torch.ones(1)), {}, LoRAError, "unexpected: head"),
        (lambda s: s.update({"first.bias": torch.ones(3)}), {}, LoRAError, "misshapen: first.bias"),
        (lambda s: s["first.weight"].fill_(torch.nan), {}, LoRAError, "difference isn't finite"),
        (lambda s: None, {"rank": 0}, LoRAError, "rank must be a positive integer"),
        (lambda s: None, {"adapter": "a.b"}, AdapterError, "without dots"),
        (lambda s: None, {"tuned": 3}, LoRAError, "must be a module, a state dict of tensors or"),
        (lambda s: None, {"tuned": {"a": 3}}, LoRAError, "or a path, got dict"),
        (lambda s: None, {"tuned": "nowhere.safetensors"}, FileError, "nowhere.safetensors"),
        (lambda s: None, {"tuned": None}, LoRAError, "there is no difference"),
    ],
)
def test_what_makes_no_sense_is_refused_and_changes_nothing(
    change: Callable[[Any], Any], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model, tuned = twins()
    state = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
    change(state)
    if options.get("tuned", 0) is None:
        options = {"tuned": model.state_dict()}
    before = describe(model)
    with pytest.raises(error, match=message):
        extract_lora(model, **{"tuned": state} | options)
    assert describe(model) == before


def saved(tmp_path: Path) -> tuple[nn.Module, list[str]]:
    """Save two adapters of one model, and return it with their paths."""
    model, _ = twins()
    paths = []
    for name in ("a", "b"):
        register_lora(model, rank=2, adapter=name, train="norm")
        shake(model, name)
        save_lora(model, tmp_path / f"{name}.safetensors", name)
        paths.append(str(tmp_path / f"{name}.safetensors"))
    return model, paths


def outputs(model: nn.Module, path: Path) -> Tensor:
    load_lora(model, path, "loaded", base="require")
    with torch.no_grad(), lora_selected(model, "loaded"):
        output: Tensor = model(X)
        return output


def test_the_command_line_combines_files(tmp_path: Path, capsys: Any) -> None:
    model, (a, b) = saved(tmp_path)
    out = tmp_path / "ab.safetensors"
    assert main(["combine", f"{a}:.7", f"{b}:-0.3", "--out", str(out), "--rank", "+8"]) == 0
    assert "first.weight" in capsys.readouterr().out
    combine_lora(model, {"a": 0.7, "b": -0.3}, adapter="ab")
    with lora_selected(model, "ab"):
        want = model(X)
    torch.testing.assert_close(outputs(model, out), want, rtol=0, atol=1e-12)


def test_files_are_combined_as_strong_as_they_were_saved(tmp_path: Path) -> None:
    model, _ = saved(tmp_path)
    select_lora(model, {"a": 0.5, "b": -2})
    want = model(X)
    for name in ("a", "b"):
        save_lora(model, tmp_path / f"{name}.safetensors", name)
    files = {tmp_path / "a.safetensors": 1, tmp_path / "b.safetensors": 1}
    combine_files(files, tmp_path / "ab.safetensors")
    torch.testing.assert_close(outputs(model, tmp_path / "ab.safetensors"), want)
    remove_lora(model, "loaded")
    combine_files({tmp_path / "a.safetensors": -3}, tmp_path / "alone.safetensors")
    select_lora(model, {"a": -1.5})
    want = model(X)
    torch.testing.assert_close(outputs(model, tmp_path / "alone.safetensors"), want)


def test_files_of_blocks_are_combined_on_their_rows(tmp_path: Path) -> None:
    model, _ = twins()
    files = {tmp_path / f"{name}.safetensors": 1.0 for name in "ab"}
    for path in files:
        register_lora(model, rank=1, target="first[1:3]", adapter=path.stem)
        shake(model, path.stem)
        save_lora(model, path, path.stem)
    combine_files(files, tmp_path / "ab.safetensors")
    want = model(X)
    torch.testing.assert_close(outputs(model, tmp_path / "ab.safetensors"), want)


def test_the_command_line_resizes_files(tmp_path: Path, capsys: Any) -> None:
    model, (a, _) = saved(tmp_path)
    out = tmp_path / "small.safetensors"
    assert main(["resize", a, "--rank", "1", "--out", str(out)]) == 0
    assert "first.weight      1" in capsys.readouterr().out
    resize_lora(model, 1, "a")
    with lora_selected(model, "a"):
        want = model(X)
    torch.testing.assert_close(outputs(model, out), want, rtol=0, atol=1e-12)


def test_the_command_line_extracts_checkpoints(tmp_path: Path, capsys: Any) -> None:
    model, tuned = twins()
    for name, each in (("base", model), ("tuned", tuned)):
        save_file(base_state_dict(each), tmp_path / f"{name}.safetensors")
    out = tmp_path / "adapter.safetensors"
    base, other = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    command = ["extract", "--base", str(base), "--tuned", str(other), "--rank", "12"]
    assert main([*command, "--out", str(out)]) == 0
    assert "norm.bias            -" in capsys.readouterr().out
    torch.testing.assert_close(outputs(model, out), tuned(X), rtol=0, atol=1e-10)


def test_statistics_of_a_tuned_checkpoint_are_extracted(tmp_path: Path, capsys: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)).double()
    tuned = copy.deepcopy(model)
    tuned(torch.randn(8, 4).double())
    paths = [tmp_path / name for name in ("base.safetensors", "tuned.safetensors", "out")]
    for each, path in zip((model, tuned), paths, strict=False):
        save_file(each.state_dict(), path)
    names = [f"{path}" for path in paths]
    command = ["extract", "--base", names[0], "--tuned", names[1], "--rank", "2"]
    assert main([*command, "--out", names[2]]) == 0
    assert "0 weights" in capsys.readouterr().out
    load_lora(model, paths[2], base="require")
    x = torch.randn(3, 4).double()
    torch.testing.assert_close(model.eval()(x), tuned.eval()(x), rtol=0, atol=1e-12)


def test_what_no_adapter_can_hold_of_a_tuned_checkpoint_is_named(tmp_path: Path) -> None:
    base = {"0.weight": torch.randn(4, 4), "steps": torch.tensor(1)}
    tuned = {"0.weight": torch.randn(4, 4), "steps": torch.tensor(2)}
    paths = [tmp_path / name for name in ("base.safetensors", "tuned.safetensors", "out")]
    save_file(base, paths[0])
    for change, message in (
        ({}, "there is no difference"),
        ({"a": torch.ones(1)}, "unexpected: a"),
    ):
        save_file(base | change, paths[1])
        with pytest.raises(FileError, match=f"tuned.safetensors: held against .*{message}"):
            extract_checkpoint(*paths)
    save_file(tuned, paths[1])
    with pytest.warns(UserWarning, match="changed, and not extracted: steps"):
        assert [fit.weight for fit in extract_checkpoint(*paths)] == ["0.weight"]


def test_blocks_that_overlap_are_not_combined(tmp_path: Path) -> None:
    files = {}
    for rows in ("0:4", "2:6"):
        register_lora(model := nn.Sequential(nn.Linear(8, 8)), rank=1, target=f"0[{rows}]")
        shake(model)
        save_lora(model, tmp_path / f"{rows[0]}.safetensors", base={})
        files[tmp_path / f"{rows[0]}.safetensors"] = 1.0
    with pytest.raises(AdapterError, match=r"\[0:4\]: overlaps 0.weight\[2:6\] in part"):
        combine_files(files, tmp_path / "out.safetensors")


def test_files_of_different_bases_are_refused(tmp_path: Path, capsys: Any) -> None:
    _, (a, _) = saved(tmp_path)
    other, _ = twins()
    with torch.no_grad():
        other.first.weight += 1  # type: ignore[union-attr, operator]
    register_lora(other, rank=2)
    shake(other)
    save_lora(other, tmp_path / "other.safetensors")
    command = ["combine", f"{a}:1", f"{tmp_path / 'other.safetensors'}:1"]
    assert main([*command, "--out", str(tmp_path / "out.safetensors")]) == 1
    assert "is of another base than those in front of it: first.weight" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["combine", "{a}", "--out", "{out}"], "give each file once, with its strength"),
        (["combine", "{a}:1", "{a}:2", "--out", "{out}"], "give each file once"),
        (
            ["combine", "{a}:1", "--out", "{out}", "--rank", "x"],
            "rank must be a positive integer, or a share",
        ),
        (["combine", "{a}:1", "--out", "{out}", "--method", "ties"], "density must satisfy"),
        (["combine", "{a}:nan", "--out", "{out}"], "strength must be a finite number"),
        (["resize", "{a}", "--rank", "0", "--out", "{out}"], "rank must be a positive"),
        (["resize", "{a}", "--rank", "1", "--out", "{a}"], "safetensors"),
    ],
)
def test_the_command_line_says_what_is_wrong(
    command: list[str], message: str, tmp_path: Path, capsys: Any
) -> None:
    _, (a, _) = saved(tmp_path)
    out = tmp_path / "out.safetensors"
    assert main([each.format(a=a, out=out) for each in command]) == 1
    assert message in capsys.readouterr().err
    assert not out.exists()
