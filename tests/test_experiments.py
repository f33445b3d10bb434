"""Each experiment, shortened: it runs to its end, claims what it claims, writes figures and picture."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.shared import sentiment
from experiments.shared.batches import Split, shuffled
from experiments.shared.memory import memory
from experiments.shared.training import adam

SHORT = {
    "from_scratch": [],
    "parameter_counts": [],
    "low_rank": ["--train-images", "300", "--batches", "3"],
    "full_against_lora": ["--quick", "--length", "16"],
    "sentiment_methods": ["--quick", "--epochs", "1", "--test-sentences", "40"],
    "kinds_compared": ["--quick"],
    "sentiment_tree": ["--quick", "--epochs", "1", "--test-sentences", "40", "--sentences", "60"],
}


@pytest.fixture(autouse=True)
def denormals_kept_afterwards() -> Iterator[None]:
    yield
    torch.set_flush_denormal(False)


def results(name: str, folder: Path) -> dict[str, Any]:
    module = importlib.import_module(f"experiments.{name}")
    assert module.main([*SHORT[name], "--output", str(folder)]) == 0
    assert (folder / "001" / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    loaded: dict[str, Any] = json.loads((folder / "001" / "results.json").read_text())
    assert loaded["environment"]["torch"] == torch.__version__
    assert loaded["seconds"]
    return loaded


def test_from_scratch_is_the_library(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = results("from_scratch", tmp_path)
    assert list(found["counts"].values()) == [1_049_600, 9_216, 5_000_000, 30_000]
    assert max(found["differences"].values()) < 1e-6
    assert "registered by torch: equal to the bit" in capsys.readouterr().out


def test_parameter_counts_are_the_papers(tmp_path: Path) -> None:
    found = results("parameter_counts", tmp_path)
    assert found["counts"]["GPT-3 175B, q v"][1] == 18_874_368
    assert found["counts"]["ChatGLM-6B, fused q k v"] == [6_173_286_400, 3_670_016]


def test_updates_cut_at_full_rank_are_whole(tmp_path: Path) -> None:
    found = results("low_rank", tmp_path)
    assert found["wrong"]["full, cut to 1000"] == found["wrong"]["full"]
    assert [len(values) for values in found["singular values"].values()] == [784, 1000, 10]


def test_lora_saves_gradients_and_state_and_not_activations(tmp_path: Path) -> None:
    found = results("full_against_lora", tmp_path)["training"]
    full, lora = found["small, full"], found["small, LoRA"]
    for part in ("gradients", "optimizer", "file"):
        assert lora[part] < full[part] / 5
    assert lora["activations"] > full["activations"] / 2


def test_methods_are_compared_on_sentences(tmp_path: Path) -> None:
    rows = results("sentiment_methods", tmp_path)["rows"]
    sizes = {row["method"]: row["parameters"] for row in rows}
    assert sizes["head only"] == 770
    assert sizes["head only"] < sizes["BitFit"] < sizes["LoRA"] < sizes["full"] == 22_566_146
    assert all(0 <= row["accuracies"][0] <= 1 for row in rows)


def test_a_tree_of_adapters_is_served_in_one_batch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = results("sentiment_tree", tmp_path)["accuracy"]
    assert set(map(len, found.values())) == {2}
    said = capsys.readouterr().out
    for claim in ("moved nothing of the root", "its path alone gives", "head and all"):
        assert claim in said


def test_kinds_are_compared_at_the_same_rates(tmp_path: Path) -> None:
    found = results("kinds_compared", tmp_path)
    sizes = {(row["task"], row["method"]): row["parameters"] for row in found["rows"]}
    assert len(sizes) == 10
    for task, lengths in (("nines", 1000 + 2000 + 10), ("tweets", 6 * (5 * 384 + 1536))):
        assert sizes[task, "LoRA"] == sizes[task, "PiSSA"] == sizes[task, "LoRA+"]
        assert sizes[task, "DoRA"] == sizes[task, "LoRA"] + lengths
        tried = [row["tried"].keys() for row in found["rows"] if row["task"] == task]
        assert all(rates == tried[0] for rates in tried)
        assert found[f"{task}, before"] < 1


@pytest.mark.parametrize("name", SHORT)
def test_help_and_bad_options_are_answered(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(f"experiments.{name}")
    with pytest.raises(SystemExit, match="0"):
        module.main(["--help"])
    assert "--output STR" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        module.main(["--nonsense"])
    assert capsys.readouterr().err.count("\n") == 1


def test_an_output_that_is_a_file_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module("experiments.parameter_counts")
    assert module.main(["--output", __file__]) == 1
    assert "File exists" in capsys.readouterr().err


RATED = {"film": 10_043, "product": 2_943, "tweet": 3_362, "news": 2_788}


@pytest.mark.parametrize("domain", RATED)
def test_sentences_are_all_there_and_documents_stay_together(domain: str) -> None:
    documents = sentiment.rated(domain)
    assert sum(map(len, documents.values())) == RATED[domain]
    home = {text: name for name, part in documents.items() for text, _ in part}
    parts = sentiment.split(domain, 100, 100)
    assert [len(part.texts) for part in parts] == [100, 100]
    first, second = ({home[text] for text in part.texts} for part in parts)
    assert not first & second


def test_damaged_sentences_are_named(tmp_path: Path) -> None:
    name = sentiment.DOMAINS["tweet"]
    with pytest.raises(sentiment.DataError, match=f"{name} is missing; get it again with: cp"):
        sentiment.rated("tweet", tmp_path)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(sentiment.DataError, match=f"{name} is damaged"):
        sentiment.rated("tweet", tmp_path)


def test_batches_by_length_hold_each_example_once_and_those_alike() -> None:
    split = Split(torch.arange(64.0), torch.arange(64))
    batches = shuffled(split, 8, torch.Generator().manual_seed(0), split.labels)
    epoch = [next(batches).labels for _ in range(8)]
    assert sorted(torch.cat(epoch).tolist()) == list(range(64))
    assert all(int(batch.max() - batch.min()) == 7 for batch in epoch)


def test_memory_of_a_step_counts_bytes() -> None:
    layer, x = torch.nn.Linear(10, 4, bias=False), torch.randn(7, 10)
    found = memory(layer, adam(layer.parameters(), 1e-3), lambda: layer(x).sum())
    assert (found.parameters, found.gradients) == (160, 160)
    assert found.activations == x.nbytes
    assert 320 <= found.optimizer <= 328  # two averages, and the count of steps
