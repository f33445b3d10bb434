"""DoRA in files: PEFT's and LyCORIS's, held against these libraries themselves."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris.modules.locon import LoConModule
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_param import (
    FileError,
    base_state_dict,
    load_lora,
    lora_summary,
    merge_lora,
    named_lora_parameters,
    register_lora,
    save_lora,
)
from lora_param.deltas.dora import DoRA
from lora_param.io import file_summary, merge_checkpoint

from .cases import shake
from .peft_cases import (
    LINEAR,
    PREFIX,
    Attention,
    Case,
    chain,
    edit_config,
    edit_tensors,
    floats,
    gpt2,
    output,
    quiet,
    tokens,
    trained_in_peft,
)

CASES = [
    Case("linear", chain(nn.Linear(6, 5), nn.Linear(5, 4, False)), floats(3, 6), ["0", "1"]),
    Case("conv1d", chain(nn.Conv1d(4, 5, 3, padding=1)), floats(2, 4, 7), ["0"]),
    Case("conv2d", chain(nn.Conv2d(4, 5, (1, 3), stride=(2, 1))), floats(2, 4, 7, 7), ["0"]),
    Case("conv3d", chain(nn.Conv3d(3, 4, 2)), floats(2, 3, 4, 4, 4), ["0"]),
    Case("embedding", chain(nn.Embedding(9, 4), nn.Linear(4, 3)), tokens(2, 5), ["0", "1"]),
    Case("transformers Conv1D", chain(Conv1D(5, 6), Conv1D(5, 5)), floats(3, 6), ["0", "1"]),
    Case("GPT-2", gpt2, tokens(2, 5), ["c_attn", "c_proj", "wpe"]),
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


@pytest.fixture(params=[False, True], ids=["lora", "rslora"])
def theirs(request: Any) -> dict[str, Any]:
    return {"use_dora": True, "use_rslora": request.param}


def trained(case: Case, folder: Path, **options: Any) -> tuple[nn.Module, PeftModel]:
    """Return a base and what PEFT made of it, whose lengths have moved too."""
    with quiet():
        base, model = trained_in_peft(case, folder, **{"use_dora": True} | options)
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.data *= 1 + torch.rand(parameter.shape) / 2
        model.save_pretrained(folder)
    return base, model


@each_case
def test_what_peft_trained_gives_its_outputs_and_gradients(
    case: Case, theirs: dict[str, Any], tmp_path: Path
) -> None:
    base, model = trained(case, tmp_path, **theirs)
    x = case.make_input()
    load_lora(base, tmp_path)
    torch.testing.assert_close(output(base, x), output(model, x), rtol=1e-4, atol=1e-5)
    gradients = []
    for each in (base, model):
        y = each(x)
        y = getattr(y, "logits", y)
        with quiet():
            trainable = [p for p in each.parameters() if p.requires_grad]
            y.square().sum().backward()
        gradients.append(sorted(p.grad.norm().item() for p in trainable))
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-3, abs=1e-4)


@each_case
def test_what_is_trained_here_gives_the_same_in_peft(case: Case, tmp_path: Path) -> None:
    base = case.base()
    model = copy.deepcopy(base)
    register_lora(model, target=case.target, rank=2, alpha=3, kind="dora", scaling="rslora")
    shake(model)
    x = case.make_input()
    save_lora(model, tmp_path, format="peft")
    with quiet():
        theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(output(theirs, x), output(model, x), rtol=1e-4, atol=1e-5)
    load_lora(base, tmp_path)
    assert torch.equal(output(base, x), output(model, x))


def test_dropout_drops_what_pefts_does(tmp_path: Path) -> None:
    base, model = trained(LINEAR, tmp_path, lora_dropout=0.5)
    load_lora(base, tmp_path)
    x = LINEAR.make_input()
    outputs = []
    for each in (base.train(), model.train()):
        torch.manual_seed(0)
        outputs.append(output(each, x))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outputs[0], output(base.eval(), x))


@pytest.mark.parametrize("layer", [nn.Linear(6, 5), Conv1D(5, 6), nn.Conv2d(4, 5, 3)], ids=str)
def test_files_are_merged_block_by_block_where_lengths_are_of_rows(
    layer: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_param.io.checkpoint.BLOCK", 48)
    model, file, base, out = copy.deepcopy(layer), *(tmp_path / f"{n}.safetensors" for n in "abc")
    register_lora(model, rank=2, kind="dora", init="pissa")
    shake(model)
    save_lora(model, file)
    save_file(base_state_dict(model), base)
    merge_checkpoint(file, base, out)
    merge_lora(model)
    torch.testing.assert_close(load_file(out)["weight"], model.weight.detach())


def test_an_anchored_one_gets_twice_the_rank(tmp_path: Path) -> None:
    base = LINEAR.base()
    model = copy.deepcopy(base)
    register_lora(model, rank=2, kind="dora", init="pissa")
    shake(model)
    save_lora(model, tmp_path, format="peft")
    with quiet():
        theirs = PeftModel.from_pretrained(base, tmp_path).eval()
    x = LINEAR.make_input()
    torch.testing.assert_close(output(theirs, x), output(model, x), rtol=1e-4, atol=1e-5)


MAGNITUDE = f"{PREFIX}0.lora_magnitude_vector"


def test_a_folder_whose_lengths_and_config_differ_is_refused(tmp_path: Path) -> None:
    trained(LINEAR, tmp_path)
    edit_config(tmp_path, use_dora=False)
    with pytest.raises(FileError, match=r"0: has a lora_magnitude_vector, by .* use_dora=False"):
        load_lora(LINEAR.base(), tmp_path)
    edit_config(tmp_path, use_dora=True)
    edit_tensors(tmp_path, lambda tensors: tensors.update({MAGNITUDE: torch.ones(4)}))
    with pytest.raises(FileError, match=r"its magnitude is \(4, 1\), for a weight of \(5, 6\)"):
        load_lora(LINEAR.base(), tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.pop(MAGNITUDE))
    with pytest.raises(FileError, match=r"0: has no lora_magnitude_vector, by .* use_dora=True"):
        load_lora(LINEAR.base(), tmp_path)


def test_what_peft_has_no_place_for_is_refused(tmp_path: Path) -> None:
    mixed = LINEAR.base()
    register_lora(mixed, target="0", rank=2, kind="dora")
    register_lora(mixed, target="1", rank=2)
    with pytest.raises(FileError, match=r"1.weight: PEFT has one use_dora for all"):
        save_lora(mixed, tmp_path / "mixed", format="peft")
    attention = Attention()
    register_lora(attention, target="attention", rank=2, kind="dora")
    with pytest.raises(FileError, match="in_proj_weight: PEFT has no DoRA but of layers"):
        save_lora(attention, tmp_path / "attention", format="peft")
    lengths = {"lora_down.weight": (2, 6), "lora_up.weight": (5, 2), "dora_scale": (1, 6)}
    tensors = {f"lycoris_0.{role}": torch.rand(shape) for role, shape in lengths.items()}
    save_file(tensors, tmp_path / "inputs.safetensors")
    model = nn.Sequential(nn.Linear(6, 5))
    load_lora(model, tmp_path / "inputs.safetensors")
    with pytest.raises(FileError, match=r"0\.weight: PEFT has lengths of outputs, not of inputs"):
        save_lora(model, tmp_path / "inputs", format="peft")


def test_a_file_is_summed_up_without_its_model(tmp_path: Path) -> None:
    trained(LINEAR, tmp_path)
    weight = file_summary(tmp_path).weights[0]
    assert (weight.kind, weight.parameters) == ("dora", 2 * (6 + 5) + 5)


LAYERS = [nn.Linear(6, 5), nn.Conv2d(4, 5, 3), nn.Conv1d(4, 5, 3)]


@pytest.mark.parametrize("on_outputs", [True, False], ids=["outputs", "inputs"])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_lycoris_lengths_are_read_in_both_their_shapes(
    layer: nn.Module, on_outputs: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(copy.deepcopy(layer))
    theirs = LoConModule(
        "lycoris_0", copy.deepcopy(base[0]), lora_dim=2, alpha=3,
        weight_decompose=True, wd_on_out=on_outputs,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in (theirs.lora_up.weight, theirs.lora_down.weight, theirs.dora_scale):
            parameter += torch.rand(parameter.shape) / 3
        expected = theirs.get_merged_weight()[0]
    tensors = {f"lycoris_0.{n}": t.detach().contiguous() for n, t in theirs.state_dict().items()}
    save_file(tensors, tmp_path / "lycoris.safetensors")
    load_lora(base, tmp_path / "lycoris.safetensors")
    torch.testing.assert_close(base[0].weight, expected, rtol=1e-4, atol=1e-5)
    x = torch.randn(2, *({2: [6], 3: [4, 7], 4: [4, 7, 7]}[base[0].weight.dim()]))
    y = base(x)
    plain = copy.deepcopy(layer)
    plain.weight.data, plain.bias.data = expected.detach(), base[0].bias.detach()
    torch.testing.assert_close(y, plain(x), rtol=1e-3, atol=1e-4)


def test_what_is_trained_here_is_written_for_lycoris(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Conv2d(4, 5, 3))
    model = copy.deepcopy(base)
    register_lora(model, rank=2, kind="dora", scaling="rslora")
    shake(model)
    file = tmp_path / "kohya.safetensors"
    save_lora(model, file, format="kohya")
    tensors = {name.partition(".")[2]: each for name, each in load_file(file).items()}
    assert tensors["dora_scale"].shape == (5, 1, 1, 1)
    parts = ("lora_up.weight", "lora_down.weight")
    with torch.no_grad():
        theirs = LoConModule.make_module_from_state_dict(
            "lycoris_0", copy.deepcopy(base[0]), *(tensors[each] for each in parts), None,
            tensors["alpha"], tensors["dora_scale"],
        )  # fmt: skip
    expected = theirs.get_merged_weight()[0]
    torch.testing.assert_close(model[0].weight, expected, rtol=1e-4, atol=1e-5)
    load_lora(base, file)
    assert [weight.adapters[0].kind for weight in lora_summary(base).weights] == ["dora"]
    for (name, a), (_, b) in zip(
        named_lora_parameters(base), named_lora_parameters(model), strict=True
    ):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_lengths_keep_a_wider_dtype_than_the_factors(dtype: torch.dtype, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    register_lora(model, rank=2, kind="dora")
    save_lora(model, tmp_path / "a.safetensors", format="kohya")
    tensors = load_file(tmp_path / "a.safetensors")
    narrow = {k: t if k.endswith("dora_scale") else t.to(dtype) for k, t in tensors.items()}
    save_file(narrow, tmp_path / "b.safetensors")
    base = nn.Sequential(nn.Linear(6, 5))
    load_lora(base, tmp_path / "b.safetensors")
    delta = base[0].parametrizations.weight[0]
    assert isinstance(delta, DoRA)
    assert torch.equal(delta.magnitude, tensors["lycoris_0.dora_scale"])
