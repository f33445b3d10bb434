"""What can't be saved or loaded, and writes that fail: nothing has changed."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lora_param import (
    FileError,
    LoRAError,
    TargetError,
    load_lora,
    register_lora,
    remove_lora,
    save_lora,
)
from lora_param.io.formats import open_adapter
from lora_param.io.tensors import Entry, write_blobs
from lora_param.weight import Weight

from .file_cases import net, plain, refused, same, state


def nameless(model: nn.Module) -> None:
    """Adapt one more layer, whose name is half of a surrogate pair."""
    model.add_module("\ud800", nn.Linear(2, 2))
    remove_lora(model)
    register_lora(model, rank=1)


BAD_SAVES: dict[str, tuple[Callable[[nn.Sequential], Any], dict[str, Any], str]] = {
    "nan": (
        lambda model: model[0].parametrizations.weight[0].lora_A.data.fill_(torch.nan),
        {},
        r"0\.weight: its tensors must be finite",
    ),
    "meta": (lambda model: model.to("meta"), {}, r"0\.weight: its tensors have no values"),
    "no adapter": (remove_lora, {}, "the model has none"),
    "own key": (lambda model: None, {"metadata": {"lora_param": "x"}}, "have the key 'lora_param'"),
    "number": (lambda model: None, {"metadata": {"x": 1}}, "metadata must map strings to strings"),
    "list": (lambda model: None, {"metadata": ["x"]}, "metadata must map strings to strings"),
    "base": (lambda model: None, {"base": {"0.weight": 1}}, "base must map strings to strings"),
    "surrogate": (
        lambda model: None,
        {"metadata": {"x": "\ud800"}},
        "metadata must map strings to strings",
    ),
    "huge": (
        lambda model: None,
        {"metadata": {"x": "x" * 100_000_000}},
        r"names and metadata take 100,00.,... bytes, and 100,000,000 can be read",
    ),
    "format": (
        lambda model: None,
        {"format": "zip"},
        "format must be one of \\['native', 'peft', 'kohya'\\], got 'zip'",
    ),
    "option": (lambda model: None, {"colour": 1}, "native takes .*got colour"),
    "name without bytes": (
        nameless,
        {"base": {}},
        "can't be written: a name or metadata: .*surrogates",
    ),
    "missing": (lambda model: None, {"adapter": "x"}, "no weight with an adapter 'x'"),
}


@pytest.mark.parametrize("case", BAD_SAVES)
def test_what_can_not_be_saved_leaves_the_old_file(case: str, saved: Path) -> None:
    harm, options, match = BAD_SAVES[case]
    before, model = saved.read_bytes(), net()
    harm(model)
    with pytest.raises(LoRAError, match=match):
        save_lora(model, saved, **options)
    assert saved.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"base": "maybe"}, 'base must be "require", "warn" or "ignore", got \'maybe\''),
        ({"adapter": "a.b"}, "must be a non-empty string without dots"),
        ({"alpha": 16}, "the format native takes .*got alpha"),
        ({"row": 3}, "the format native takes .*got row"),
        ({"trainable": "x"}, "freeze and trainable must be bools, got True and 'x'"),
        ({"freeze": None}, "freeze and trainable must be bools, got None and True"),
    ],
)
def test_bad_arguments_of_loading_are_refused(
    options: dict[str, Any], match: str, saved: Path
) -> None:
    refused(plain(), saved, match, **options)


def test_a_tied_weight_is_refused(saved: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Linear(6, 5))
    model[3].weight = model[0].weight
    before = state(model)
    with pytest.raises(TargetError, match=r"0\.weight: 3\.weight is the same Parameter"):
        load_lora(model, saved, base="ignore")
    assert same(before, state(model))


def test_an_interruption_half_way_leaves_the_model(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attach, calls = Weight.attach, []

    def failing(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return attach(*arguments)

    monkeypatch.setattr(Weight, "attach", failing)
    model = plain()
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        load_lora(model, saved)
    assert same(before, state(model))


def full_disk(*arguments: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupt(*arguments: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("moment", ["fsync", "replace", "blob"])
@pytest.mark.parametrize(
    ("fault", "error"), [(full_disk, FileError), (interrupt, KeyboardInterrupt)]
)
def test_a_failure_while_writing_leaves_the_old_file_and_no_other(
    moment: str,
    fault: Callable[..., None],
    error: type[BaseException],
    saved: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = saved.read_bytes()
    if moment == "blob":
        monkeypatch.setattr("lora_param.io.tensors.bytes_of", fault)
    else:
        monkeypatch.setattr(os, moment, fault)
    with pytest.raises(error):
        save_lora(net("other"), saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_link_stays_a_link_and_permissions_stay(saved: Path, tmp_path: Path) -> None:
    saved.chmod(0o600)
    link = tmp_path / "latest"
    link.symlink_to(saved.name)
    save_lora(net("other"), link)
    assert link.is_symlink()
    assert saved.stat().st_mode & 0o777 == 0o600
    with open_adapter(saved) as file:
        assert file.about.adapter == "other"


@pytest.mark.parametrize("where", ["", "missing/adapter.safetensors"])
def test_where_no_file_can_be_is_said(where: str, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="can't be written: "):
        save_lora(net(), tmp_path / where)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("rows", "columns"), [(3, 5), (5, 3)])
def test_a_rank_above_the_smaller_side_is_lowered_with_a_warning(
    rows: int, columns: int, tmp_path: Path
) -> None:
    down, up = torch.randn(4, columns), torch.randn(rows, 4)
    tensors = {"lycoris_0.lora_down.weight": down, "lycoris_0.lora_up.weight": up}
    save_file(tensors | {"lycoris_0.alpha": torch.tensor(6.0)}, tmp_path / "kohya.safetensors")
    model = nn.Sequential(nn.Linear(columns, rows, bias=False))
    before = model[0].weight.clone()
    with pytest.warns(UserWarning, match=r"rank lowered to .* within rounding: 0\.weight"):
        load_lora(model, tmp_path / "kohya.safetensors")
    assert model[0].parametrizations.weight[0].rank == 3
    assert torch.allclose(model[0].weight, before + up @ down * 1.5, rtol=1e-5, atol=1e-5)


MISFITS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "layer norm": (lambda: nn.LayerNorm(5), "0.weight: a pair needs a matrix"),
    "lazy": (lambda: nn.LazyLinear(5), "it is lazy and has no shape yet"),
    "old weight norm": (lambda: nn.utils.weight_norm(nn.Linear(6, 5)), "sets this tensor before"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("layer", MISFITS)
def test_a_model_whose_layer_is_another_is_refused(layer: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    register_lora(model, rank=2)
    save_lora(model, tmp_path / "adapter.safetensors")
    make, message = MISFITS[layer]
    with pytest.raises(LoRAError, match=message):
        load_lora(nn.Sequential(make()), tmp_path / "adapter.safetensors", base="ignore")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in the file system here")
def test_a_pipe_is_neither_waited_for_nor_replaced(saved: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    refused(plain(), pipe, "no regular file")
    with pytest.raises(FileError, match="can't be written: no regular file is there"):
        save_lora(net(), pipe)
    assert pipe.is_fifo()


def test_an_alpha_that_is_no_real_number_is_refused(tmp_path: Path) -> None:
    model, file = nn.ModuleDict({"a": nn.Linear(6, 5)}), tmp_path / "kohya.safetensors"
    entries = {
        "lora_unet_a.alpha": Entry("C64", (), 0, 8),
        "lora_unet_a.lora_down.weight": Entry("F32", (2, 6), 0, 48),
        "lora_unet_a.lora_up.weight": Entry("F32", (5, 2), 0, 40),
    }
    write_blobs(file, entries, {}, [bytes(8 + 48 + 40)])
    register_lora(model, rank=2)
    with pytest.raises(
        FileError, match=r"lora_unet_a: has an alpha of|a damaged"
    ):  # older releases' words
        load_lora(model, file)
    assert model["a"].parametrizations.weight[0].scale == 1.0


@pytest.mark.parametrize("alpha", [1e-50, 1e60, 0.0])
def test_kohya_refuses_an_alpha_that_it_can_not_hold(alpha: float, tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(6, 5)})
    register_lora(model, rank=2, alpha=alpha)
    with pytest.raises(FileError, match=r"has an alpha of .*, in float32"):
        save_lora(model, tmp_path / "kohya.safetensors", format="kohya")


def test_a_file_where_the_folder_should_be_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    register_lora(model, rank=2)
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(FileError, match="no folder can be made"):
        save_lora(model, tmp_path / "taken", format="peft")


def test_a_name_that_no_file_can_have_is_refused() -> None:
    for name in ("x" * 5000, "x" * 5000 + ".safetensors", "nul\0"):
        refused(plain(), Path(name), "can't be (read|written)")
        with pytest.raises(FileError, match="can't be written"):
            save_lora(net(), name)


def test_a_rank_that_overflows_when_it_is_lowered_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "kohya.safetensors"
    factors = {"down": torch.full((8, 4), 200.0).half(), "up": torch.full((6, 8), 200.0).half()}
    tensors = {f"lora_unet_a.lora_{name}.weight": each for name, each in factors.items()}
    save_file(tensors | {"lora_unet_a.alpha": torch.tensor(8e-3)}, file)
    model = nn.ModuleDict({"a": nn.Linear(4, 6)})
    refused(model, file, r"a\.weight: its tensors must be finite")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in the file system here")
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.bin"])
def test_a_pipe_in_a_folder_of_pefts_is_not_waited_for(name: str, tmp_path: Path) -> None:
    save_lora(net(), tmp_path, format="peft")
    model_file = tmp_path / "adapter_model.safetensors"
    (model_file if name.endswith(".bin") else tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    refused(plain(), tmp_path, f"{name}: can't be read: no regular file")


@pytest.mark.parametrize("key", ["lora_param", "format", "lora_adapter_metadata"])
@pytest.mark.parametrize("format", ["native", "peft", "kohya"])
def test_metadata_under_a_key_of_the_files_own_are_refused(
    key: str, format: str, tmp_path: Path
) -> None:
    model = nn.Sequential(net())
    with pytest.raises(LoRAError, match=f"metadata can't have the key '{key}'"):
        save_lora(model, tmp_path / "adapter", metadata={key: "x"}, format=format)
    assert not list(tmp_path.iterdir())
