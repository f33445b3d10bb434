"""What PEFT trains whole, heads, biases and tokens, both ways and held against the real PEFT."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file
from torch import nn

from lora_param import (
    FileError,
    LoRAError,
    load_lora,
    lora_parameters,
    lora_summary,
    register_lora,
    remove_lora,
    save_lora,
    select_lora,
)
from lora_param.io import convert_file
from lora_param.io.formats.peft_whole import difference

from .cases import shake
from .peft_cases import (
    LINEAR,
    PREFIX,
    Attention,
    Case,
    Experts,
    bert,
    config_of,
    edit_config,
    edit_tensors,
    floats,
    output,
    quiet,
    tokens,
    trained_in_peft,
    vit,
)

QUERY = ["query", "value"]
WHOLE = [
    Case("a head, by the task", bert, tokens(2, 5), QUERY, options={"task_type": "SEQ_CLS"}),
    Case("a head, named", vit, floats(2, 3, 8, 8), ["q_proj", "query"], options={"modules_to_save": ["classifier"]}),
    Case("every bias", bert, tokens(2, 5), QUERY, options={"bias": "all"}),
    Case("every bias, and a head's", bert, tokens(2, 5), QUERY, options={"bias": "all", "task_type": "SEQ_CLS"}),
    Case("adapted layers' biases", bert, tokens(2, 5), QUERY, options={"bias": "lora_only"}),
    Case("an update's bias", bert, tokens(2, 5), QUERY, options={"lora_bias": True}),
    Case("both biases of a layer", bert, tokens(2, 5), QUERY, options={"lora_bias": True, "bias": "all"}),
    Case("rows of tokens", bert, tokens(2, 5), QUERY, options={"trainable_token_indices": {"word_embeddings": [6, 3, 5, 4, 8]}}),
    Case("rows of tokens, of the only embedding", bert, tokens(2, 5), QUERY, options={"trainable_token_indices": [3, 5]}),
    Case("a head of several layers beside all biases", bert, tokens(2, 5), QUERY, options={"modules_to_save": ["pooler"], "bias": "all"}),
    Case("no low rank", bert, tokens(2, 5), "dummy-target-modules", options={"modules_to_save": ["pooler", "LayerNorm"]}),
    Case("an attention beside a head", Attention, floats(5, 2, 8), ["attention"], options={"modules_to_save": ["fc2"]}),
]  # fmt: skip


@pytest.mark.parametrize("case", WHOLE, ids=lambda case: case.id)
def test_what_peft_trained_whole_gives_the_same_outputs_here_and_there_again(
    case: Case, tmp_path: Path
) -> None:
    base, theirs = trained_in_peft(case, tmp_path)
    plain, x = copy.deepcopy(base), case.make_input()
    with quiet():
        names = load_lora(base, tmp_path)
        save_lora(base, tmp_path / "out", format="peft")
        again = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "out").eval()
        load_lora(fresh := copy.deepcopy(plain), tmp_path / "out")
    assert not torch.allclose(output(base, x), output(plain, x), rtol=1e-3)
    torch.testing.assert_close(output(base, x), output(theirs, x))
    torch.testing.assert_close(output(again, x), output(base, x))
    assert torch.equal(output(fresh, x), output(base, x))
    assert [each.name for each in lora_summary(fresh).weights] == names
    remove_lora(base)
    assert torch.equal(output(base, x), output(plain, x))


@pytest.mark.parametrize("make", [bert, vit])
def test_a_head_trained_whole_here_is_saved_by_peft_as_its_own(make: Any, tmp_path: Path) -> None:
    base = make().eval()
    model = copy.deepcopy(base)
    register_lora(model, rank=2, train=["classifier", nn.LayerNorm])
    shake(model)
    save_lora(model, tmp_path, format="peft")
    with quiet():
        theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    x = tokens(2, 5)() if make is bert else torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(output(theirs.eval(), x), output(model.eval(), x))
    trained = {name for name, each in theirs.named_parameters() if each.requires_grad}
    counted = sum(theirs.get_parameter(name).numel() for name in trained)
    assert counted == sum(each.numel() for each in lora_parameters(model))
    with quiet():
        theirs.save_pretrained(tmp_path / "theirs")
    first, second = (
        load_file(each / "adapter_model.safetensors") for each in (tmp_path, tmp_path / "theirs")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_new_values_that_no_weight_can_take_are_refused(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    model = copy.deepcopy(base)
    register_lora(model, rank=2, target="0", train="1")
    shake(model)
    save_lora(model, tmp_path, format="peft")
    with pytest.raises(LoRAError, match="on the meta device; load when the model has values"):
        load_lora(copy.deepcopy(base).to("meta"), tmp_path)
    for shape in ((1,), (3,)):
        edit_tensors(
            tmp_path, lambda t, shape=shape: t.update({f"{PREFIX}1.bias": torch.ones(shape)})
        )
        got = re.escape(f"1.bias: its new values are {shape}, should be (4,)")
        with pytest.raises(FileError, match=got):
            load_lora(copy.deepcopy(base), tmp_path)


def test_a_head_is_saved_as_strong_as_the_pairs_beside_it(tmp_path: Path) -> None:
    base, x = bert(), tokens(2, 5)()
    model = copy.deepcopy(base)
    register_lora(model, rank=2, target="query", train="classifier")
    shake(model)
    wanted = output(model.eval(), x)
    select_lora(model, {"default": 0.5})
    with pytest.warns(UserWarning, match="these are saved without"):
        save_lora(model, tmp_path, format="peft")
    load_lora(base, tmp_path)
    torch.testing.assert_close(output(base.eval(), x), wanted)


def test_a_head_alone_is_read_from_its_file_beside_the_config(tmp_path: Path) -> None:
    model = bert()
    register_lora(model, target=(), train="classifier")
    shake(model)
    save_lora(model, tmp_path, format="peft")
    names = load_lora(bert(), tmp_path / "adapter_model.safetensors")
    assert names == ["classifier.weight", "classifier.bias"]


def test_a_task_is_named_where_peft_would_save_what_is_saved(tmp_path: Path) -> None:
    for train, task in (("classifier", "SEQ_CLS"), ("classifier.bias", None)):
        model = bert()
        model.name_or_path = "hub/bert"
        register_lora(model, target="query", train=train)
        with quiet():
            save_lora(model, folder := tmp_path / train, format="peft")
        config = config_of(folder)
        assert config["task_type"] == task
        assert config["base_model_name_or_path"] == "hub/bert"
        assert ("auto_mapping" in config) == (task is None)


def test_the_folder_has_all_that_peft_finds_its_model_by(tmp_path: Path) -> None:
    base = bert().eval()
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base").eval()
    register_lora(base, target="query", rank=2, train="classifier")
    shake(base)
    save_lora(base, tmp_path / "adapter", format="peft")
    with quiet():
        theirs = AutoPeftModelForSequenceClassification.from_pretrained(
            tmp_path / "adapter", num_labels=3
        )
    x = tokens(2, 5)()
    torch.testing.assert_close(output(theirs.eval(), x), output(base, x))


def test_the_card_says_what_the_base_is_and_is_not_written_over(tmp_path: Path) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    model = bert()
    model.name_or_path = "hub/bert: base"
    register_lora(model, rank=2)
    with quiet():
        save_lora(model, tmp_path, format="peft")
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md").data
    assert (card.base_model, card.library_name) == ("hub/bert: base", "peft")
    assert card.tags == ["lora", "base_model:adapter:hub/bert: base"]
    (tmp_path / "README.md").write_text("mine")
    with quiet():
        save_lora(model, tmp_path, format="peft")
    assert (tmp_path / "README.md").read_text() == "mine"


def test_biases_that_the_config_does_not_tell_of_are_read_with_a_warning(tmp_path: Path) -> None:
    case = Case("", LINEAR.make, LINEAR.make_input, ["0"], options={"lora_bias": True})
    base, theirs = trained_in_peft(case, tmp_path)
    edit_config(tmp_path, lora_bias=False)
    with pytest.warns(UserWarning, match=r"0: lora_B\.bias is read; PEFT drops it: lora_bias=F"):
        assert load_lora(base, tmp_path) == ["0.weight", "0.bias"]
    x = case.make_input()
    torch.testing.assert_close(output(base, x), output(theirs, x))


def test_a_bias_of_a_layer_without_one_is_refused(tmp_path: Path) -> None:
    case = Case("", lambda: nn.Sequential(nn.Linear(6, 5, False)), floats(3, 6), ["0"])
    base, _ = trained_in_peft(case, tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({f"{PREFIX}0.lora_B.bias": torch.ones(5)}))
    with pytest.raises(FileError, match="0: lora_bias adds to the layer's bias, and it has none"):
        load_lora(base, tmp_path)


HOMELESS: list[tuple[str, nn.Module, dict[str, Any], str]] = [
    ("a weight without its bias", nn.Sequential(nn.Linear(4, 4)), {"train": "0.weight"}, "0.weight: PEFT trains biases and whole modules; train all of 0"),
    ("the model itself", nn.Linear(4, 4), {"train": "weight"}, "weight: PEFT trains biases and whole modules"),
    ("a parameter of a list", nn.Sequential(nn.ParameterList([torch.ones(3)])), {"train": "*"}, "0.0: PEFT trains biases"),
    ("a bias in an adapted attention", nn.Sequential(nn.MultiheadAttention(4, 2)), {"target": "0", "train": "*out_proj.bias"}, "0.out_proj.bias: PEFT trains"),
    ("a bias beside adapted experts", nn.Sequential(Experts()), {"target": "up", "train": "*.gate"}, "0.gate: PEFT trains"),
    ("names that end alike", nn.ModuleDict({"head": nn.Linear(4, 4), "overhead": nn.Linear(4, 4)}), {"train": "head"}, "overhead: PEFT would save it too, because it ends like head"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "options", "message"), [h[1:] for h in HOMELESS], ids=[h[0] for h in HOMELESS]
)
@pytest.mark.filterwarnings("ignore:PEFT adapts")
def test_what_peft_cannot_train_whole_is_refused_by_name_before_writing(
    model: nn.Module, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = copy.deepcopy(model)
    register_lora(model, **{"target": (), "rank": 2} | options)
    with pytest.raises(FileError, match=f"nothing was written: .*{message}"):
        save_lora(model, tmp_path / "out", format="peft")
    assert not (tmp_path / "out").exists()


def test_full_fine_tuning_is_written_for_peft(tmp_path: Path) -> None:
    base = bert().eval()
    model = copy.deepcopy(base)
    register_lora(model, target=(), train="*")
    shake(model)
    save_lora(model, tmp_path, format="peft")
    assert config_of(tmp_path)["modules_to_save"] == ["bert", "classifier"]
    with quiet():
        theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    x = tokens(2, 5)()
    torch.testing.assert_close(output(theirs, x), output(model, x))


DTYPES = [
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.float64),
]


@pytest.mark.parametrize(("dtype", "wide"), DTYPES, ids=str)
def test_new_values_come_back_to_the_bit(
    dtype: torch.dtype, wide: torch.dtype, tmp_path: Path
) -> None:
    base = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 3)).to(dtype)
    case = Case("", lambda: base, floats(2, 40), ["0"], options={"modules_to_save": ["1"]})
    _, theirs = trained_in_peft(case, tmp_path)
    load_lora(base, tmp_path)
    trained = dict(theirs.named_parameters())["base_model.model.1.modules_to_save.default.weight"]
    assert torch.equal(base[1].weight, trained)
    assert base[1].parametrizations.weight[0].D.dtype == wide


def test_a_difference_is_no_wider_than_it_has_to_be() -> None:
    old = torch.tensor([1.0, 2.0])
    assert difference(old * 1.5, old).dtype == torch.float32
    assert difference(old / 3, old).dtype == torch.float64
    assert difference(torch.tensor([1e-30, 2.0]), old).dtype == torch.float64
    assert difference(old * 1.5, old.bfloat16()).dtype == torch.float32  # nothing is lost of these


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4), nn.BatchNorm1d(4))


def test_a_norm_that_is_trained_whole_has_its_statistics_in_the_folder(tmp_path: Path) -> None:
    base, x = normed(), torch.randn(8, 6)
    model = copy.deepcopy(base)
    register_lora(model, rank=2, train=["1", "3"])
    shake(model)
    model(x)  # moves them
    save_lora(model, tmp_path, format="peft")
    with quiet():
        theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(output(theirs, x), output(model.eval(), x))
    load_lora(base, tmp_path)
    assert torch.equal(output(base.eval(), x), output(model, x))
    assert base[1].parametrizations.running_mean[0].kind == "statistics"
    assert base[1].num_batches_tracked == 1
    remove_lora(base)
    assert base[1].num_batches_tracked == 0


@pytest.mark.parametrize("format", ["peft", "kohya"])
def test_statistics_that_a_format_has_no_place_for_are_named(format: str, tmp_path: Path) -> None:
    model = normed()
    register_lora(model, rank=2, train="1" if format == "peft" else None)
    shake(model)
    names = "3.num_batches_tracked, 3" if format == "peft" else "1.running_mean, 1"
    with pytest.warns(UserWarning, match=f"no place for a norm's statistics: left out are {names}"):
        save_lora(model, tmp_path / "out", format=format)
    whole = ["1.weight", "1.bias"] if format == "peft" else []
    assert load_lora(normed(), tmp_path / "out") == ["0.weight", *whole, "2.weight"]


def test_statistics_that_are_left_out_need_no_base_to_convert(tmp_path: Path) -> None:
    model = normed()
    register_lora(model, rank=2)
    shake(model)
    save_lora(model, tmp_path / "native.safetensors")
    with pytest.warns(UserWarning, match=r"left out are 1\.num_batches_tracked, 1\.running_mean"):
        names = convert_file(tmp_path / "native.safetensors", tmp_path / "peft", "peft")
    assert load_lora(normed(), tmp_path / "peft") == ["0.weight", "2.weight"]
    assert "1.running_mean" in names


def test_a_buffer_that_nothing_trains_has_to_be_the_models_own(tmp_path: Path) -> None:
    base = bert()
    base.pooler = nn.Sequential(nn.Linear(4, 4))
    base.pooler.register_buffer("places", torch.arange(3))
    case = Case("", lambda: base, tokens(2, 5), QUERY, options={"modules_to_save": ["pooler"]})
    trained_in_peft(case, tmp_path)
    with quiet():
        load_lora(copy.deepcopy(base), tmp_path)
    edit_tensors(tmp_path, lambda t: t[f"{PREFIX}pooler.places"].add_(1))
    with pytest.raises(FileError, match=r"pooler\.places is neither a factor nor equal"):
        load_lora(base, tmp_path)
