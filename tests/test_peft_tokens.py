"""PEFT's trained tokens: blocks of an embedding's rows, both ways and held against the real PEFT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from lora_param import FileError, TargetError, load_lora, lora_parameters, register_lora, save_lora
from lora_param.io import merge_checkpoint

from .cases import shake
from .peft_cases import (
    PREFIX,
    Case,
    bert,
    chain,
    config_of,
    edit_config,
    edit_tensors,
    gpt2,
    llama,
    output,
    quiet,
    tokens,
    trained_in_peft,
)

BOTH = {"embed_tokens": [7, 1, 2], "lm_head": [16, 0]}
CASES = [
    Case("tokens alone", bert, tokens(2, 5), "dummy-target-modules", options={"trainable_token_indices": [3, 5]}),
    Case("beside pairs", bert, tokens(2, 5), ["query"], options={"trainable_token_indices": {"word_embeddings": [6, 3, 4, 8]}}),
    Case("beside a head", bert, tokens(2, 5), ["query"], options={"trainable_token_indices": [2], "task_type": "SEQ_CLS"}),
    Case("of a head too", llama, tokens(2, 5), ["q_proj"], options={"trainable_token_indices": BOTH}),
]  # fmt: skip
TWO = CASES[0]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_tokens_come_here_and_go_back_to_peft_to_the_bit(case: Case, tmp_path: Path) -> None:
    base, theirs = trained_in_peft(case, tmp_path)
    plain, x = copy.deepcopy(base), case.make_input()
    load_lora(base, tmp_path)
    save_lora(base, tmp_path / "out", format="peft")
    with quiet():
        again = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "out").eval()
    assert not torch.allclose(output(base, x), output(plain, x), rtol=1e-3)
    assert torch.equal(output(again, x), output(theirs, x))
    torch.testing.assert_close(output(base, x), output(theirs, x))
    first, second = (
        load_file(each / "adapter_model.safetensors") for each in (tmp_path, tmp_path / "out")
    )
    assert first.keys() == second.keys()
    for key in first:
        rows = (
            each.sort(0).values if "tokens" in key else each for each in (first[key], second[key])
        )
        assert torch.equal(*rows)


def test_only_the_tokens_are_trained_on(tmp_path: Path) -> None:
    base, _ = trained_in_peft(TWO, tmp_path)
    before = base.bert.embeddings.word_embeddings.weight.detach().clone()
    [name] = load_lora(base, tmp_path)
    assert name == "bert.embeddings.word_embeddings.weight[3:7:2]"
    [D] = lora_parameters(base)
    assert D.shape == (2, 8)
    optimizer = torch.optim.SGD([D], lr=1.0)
    base(torch.arange(17)[None, :9]).logits.sum().backward()
    optimizer.step()
    changed = (base.bert.embeddings.word_embeddings.weight != before).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [3, 5]


def test_tokens_trained_here_are_told_to_peft(tmp_path: Path) -> None:
    base, x = bert().eval(), tokens(2, 5)()
    model = copy.deepcopy(base)
    for rows in ([2, 4], [7]):
        register_lora(model, kind="dense", target=[("word_embeddings", rows)])
    register_lora(model, rank=2, target="query")
    shake(model)
    save_lora(model, tmp_path, format="peft")
    path = "bert.embeddings.word_embeddings"
    assert config_of(tmp_path)["trainable_token_indices"] == {path: [2, 4, 7]}
    with quiet():
        theirs = PeftModel.from_pretrained(base, tmp_path, is_trainable=True).eval()
    torch.testing.assert_close(output(theirs, x), output(model.eval(), x))
    trained = sum(each.numel() for each in theirs.parameters() if each.requires_grad)
    assert trained == sum(each.numel() for each in lora_parameters(model))


def test_tokens_merge_into_a_checkpoint(tmp_path: Path) -> None:
    base, theirs = trained_in_peft(TWO, tmp_path)
    torch.save(base.state_dict(), tmp_path / "base.pt")
    merge_checkpoint(tmp_path, tmp_path / "base.pt", tmp_path / "merged.safetensors")
    base.load_state_dict(load_file(tmp_path / "merged.safetensors"))
    x = TWO.make_input()
    assert torch.equal(output(base, x), output(theirs, x))


NOT_SAID = [[3], [3, 4, 5], {"other": [3, 5]}, [3, -1], [3, 3], [3, 2.0], "3, 5", {"word_embeddings": 3}, [3, 17]]  # fmt: skip


@pytest.mark.parametrize("said", NOT_SAID, ids=str)
def test_tokens_that_are_not_said_are_refused(said: Any, tmp_path: Path) -> None:
    base, _ = trained_in_peft(TWO, tmp_path)
    edit_config(tmp_path, trainable_token_indices=said)
    with pytest.raises(FileError, match=r"embeddings: trainable_token_indices=.* for \(2, 8\)"):
        load_lora(base, tmp_path)


def test_an_embedding_with_tokens_and_a_pair_is_refused(tmp_path: Path) -> None:
    base, _ = trained_in_peft(TWO, tmp_path, r=2)
    name = f"{PREFIX}bert.embeddings.word_embeddings.lora_embedding_"
    pair = {f"{name}A": torch.ones(2, 17), f"{name}B": torch.ones(8, 2)}
    edit_tensors(tmp_path, lambda tensors: tensors.update(pair))
    with pytest.raises(FileError, match=r"word_embeddings.weight.* overlap"):
        load_lora(base, tmp_path)


def test_tokens_of_a_head_that_is_tied_are_refused(tmp_path: Path) -> None:
    trained_in_peft(Case("", gpt2, tokens(2, 5), ["c_attn"], options={"trainable_token_indices": [3]}), tmp_path)  # fmt: skip
    with pytest.raises(TargetError, match=r"wte.weight\[3:4\]: lm_head.weight is the same Param"):
        load_lora(gpt2(), tmp_path)


WITHOUT_PLACE: list[tuple[str, nn.Module, str, str]] = [
    ("biased", nn.Linear(4, 6), "0[1:3]", "0.weight.1:3.: PEFT trains rows of an embedding, or of a linear layer without bias"),
    ("convolution", nn.Conv1d(4, 6, 3, bias=False), "0[1:3]", "0.weight.1:3.: PEFT trains rows"),
    ("a bias's", nn.Linear(4, 6), "0.bias[1:3]", "0.bias.1:3.: PEFT trains rows"),
    ("adapted", nn.Embedding(6, 4), "0[1:3]", "0.weight.1:3.: PEFT has no rows of tokens of a layer that it adapts too"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("layer", "target", "message"),
    [r[1:] for r in WITHOUT_PLACE],
    ids=[r[0] for r in WITHOUT_PLACE],
)
def test_rows_that_are_no_tokens_of_pefts_are_refused_before_writing(
    layer: nn.Module, target: str, message: str, tmp_path: Path
) -> None:
    model = chain(layer)()
    register_lora(model, kind="dense", target=target)
    if isinstance(layer, nn.Embedding):
        register_lora(model, rank=1, target="0[3:5]")
    shake(model)
    with quiet(), pytest.raises(FileError, match=f"nothing was written: {message}"):
        save_lora(model, tmp_path / "out", format="peft")
    assert not (tmp_path / "out").exists()


def test_tokens_of_a_layer_whose_bias_peft_drops_are_refused(tmp_path: Path) -> None:
    base, _ = trained_in_peft(CASES[3], tmp_path)
    base.lm_head = nn.Linear(8, 17)
    with pytest.raises(FileError, match=r"lm_head.weight: PEFT trains rows of an embedding, or"):
        load_lora(base, tmp_path)


def test_a_model_without_the_embedding_lacks_it(tmp_path: Path) -> None:
    base, _ = trained_in_peft(TWO, tmp_path)
    base.bert.embeddings.word_embeddings = nn.Identity()
    with pytest.raises(FileError, match=r"lacks 1 of 1: bert.*word_embeddings.weight;"):
        load_lora(base, tmp_path)


def test_many_scattered_tokens_come_back_from_our_own_file(tmp_path: Path) -> None:
    rows = [number * number for number in range(400)]
    model = nn.Sequential(nn.Embedding(200_000, 1))
    register_lora(model, kind="dense", target=[("0", rows)])
    shake(model)
    path = tmp_path / "adapter.safetensors"
    save_lora(model, path)
    torch.nn.init.zeros_((twin := nn.Sequential(nn.Embedding(200_000, 1)))[0].weight)
    load_lora(twin, path, base="ignore")
    assert twin[0].weight.nonzero()[:, 0].tolist() == rows


HEADS = [("a task", {"task_type": "SEQ_CLS"}, "AutoModelForSequenceClassification"), ("a class", {"modules_to_save": ["classifier"]}, "BertForSequenceClassification")]  # fmt: skip


@pytest.mark.parametrize(("options", "fix"), [h[1:] for h in HEADS], ids=[h[0] for h in HEADS])
@pytest.mark.parametrize("inside", [True, False])
def test_a_base_without_the_trained_head_is_told_what_it_lacks(
    options: dict[str, Any], fix: str, inside: bool, tmp_path: Path
) -> None:
    base, _ = trained_in_peft(Case("", bert, tokens(2, 5), ["query"], options=options), tmp_path)
    base.classifier = nn.Identity()
    del base.classifier
    rule = "classifier: trained whole by modules_to_save, and this model has no such module"
    with pytest.raises(FileError, match=f"{rule}; load it on a model that has, {fix}"):
        load_lora(base.bert if inside else base, tmp_path)
