"""The experiment on the real data, shortened: what it claims, writes, refuses and says."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_param
from experiments import mnist_finetune
from experiments.mnist_network import RichBoyNet, check_counts, check_network
from experiments.mnist_report import STATES, Run
from experiments.shared.claims import BrokenClaimError
from experiments.shared.scoring import Score

SHORT = ["--train-images", "1000", "--finetune-batches", "10", "--device", "cpu"]


@pytest.fixture(autouse=True)
def denormals_kept_afterwards() -> Iterator[None]:
    """Take back a setting of the whole process, which `main` makes."""
    yield
    torch.set_flush_denormal(False)


def results(output: Path, number: str = "001") -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((output / number / "results.json").read_text())
    return loaded


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a first run has written."""
    folder = tmp_path_factory.mktemp("output")
    assert mnist_finetune.main([*SHORT, "--output", str(folder)]) == 0
    return folder


def test_figures_are_written(output: Path) -> None:
    found = results(output)
    assert found["settings"]["digit"] == 9
    assert found["environment"]["torch"] == torch.__version__
    assert found["environment"]["device"] == "cpu"
    assert set(found["seconds"]) == {"data", "pretraining", "testing", "fine-tuning", "checks"}
    (run,) = found["runs"]
    for state in STATES:
        assert len(run["scores"][state]["wrong"]) == 10
        assert run["scores"][state]["examples"] == 10_000


def test_training_learns_and_off_gives_the_pretrained_counts_back(output: Path) -> None:
    scores = results(output)["runs"][0]["scores"]
    assert sum(scores["pretrained"]["wrong"]) < 4000
    assert scores["LoRA on"]["wrong"] != scores["pretrained"]["wrong"]
    assert scores["LoRA off"] == scores["pretrained"]


def test_parameter_counts_are_the_sources(output: Path) -> None:
    counts = results(output)["parameters"]
    assert counts["original"] == 2_807_010
    assert counts["lora"] == 6_794
    assert counts["total"] == 2_813_804
    assert f"{counts['percentage']:.3f}" == "0.242"


def test_picture_is_a_png(output: Path) -> None:
    content = (output / "001" / "wrong_counts.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")


def test_adapter_file_fits_a_fresh_network(output: Path) -> None:
    net, path = RichBoyNet(), output / "001" / "adapter.safetensors"
    names = ["linear1.weight", "linear2.weight", "linear3.weight"]
    assert lora_param.load_lora(net, path, base="ignore") == names
    with pytest.raises(lora_param.FileError, match="6 of 6 parameters differ"):
        lora_param.load_lora(RichBoyNet(), path, base="require")


def test_same_seed_gives_the_same_figures_in_a_new_folder(
    output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(output / "001")
    assert mnist_finetune.main([*SHORT, "--output", str(output)]) == 0
    first, second = results(output), results(output, "002")
    assert contents(output / "001") == before
    assert second["runs"][0]["scores"] == first["runs"][0]["scores"]
    assert second["runs"][0]["losses"] == first["runs"][0]["losses"]
    assert (output / "002" / "adapter.safetensors").read_bytes() == before["adapter.safetensors"]
    printed = capsys.readouterr()
    assert "2,807,010 original + 6,794 added by LoRA = 2,813,804" in printed.out
    assert "adapter.safetensors: " in printed.out
    assert "bytes, the network 11,228,040: " in printed.out
    assert "LoRA off: the wrong counts are exactly the pretrained network's" in printed.out
    assert printed.err == ""  # no progress bars where the output is no terminal


def test_several_seeds_give_mean_and_spread(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--seeds", "2", "--seed", "3", "--output", str(tmp_path)]
    assert mnist_finetune.main([*SHORT, *arguments]) == 0
    found = results(tmp_path)
    accuracies = [1 - sum(run["scores"]["LoRA on"]["wrong"]) / 10_000 for run in found["runs"]]
    summary = found["summary"]["LoRA on"]["accuracy"]
    assert [run["seed"] for run in found["runs"]] == [3, 4]
    assert summary["mean"] == pytest.approx(sum(accuracies) / 2)
    assert summary["std"] == pytest.approx(abs(accuracies[0] - accuracies[1]) / 2**0.5)
    assert f"{summary['mean']:.3f}±{summary['std']:.3f}" in capsys.readouterr().out
    assert (tmp_path / "001" / "adapter_seed4.safetensors").is_file()


def nudge(name: str) -> Callable[[RichBoyNet], None]:
    """Change one entry of a tensor by one unit in the last place."""

    def apply(net: RichBoyNet) -> None:
        entry = net.get_parameter(name).data.view(-1)[:1]
        entry.copy_(torch.nextafter(entry, entry + 1))

    return apply


SABOTAGE = {
    "weight": (
        nudge("linear2.parametrizations.weight.original"),
        "linear2.weight's original is as before",
    ),
    "bias": (nudge("linear3.bias"), "linear3.bias is as before"),
}


@pytest.mark.parametrize("sabotage", SABOTAGE)
def test_changed_original_ends_the_run_and_is_named(
    sabotage: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    harm, message = SABOTAGE[sabotage]
    finetune = mnist_finetune.finetune

    def harmful(net: RichBoyNet, *rest: Any) -> float:
        harm(net)
        return finetune(net, *rest)

    monkeypatch.setattr(mnist_finetune, "finetune", harmful)
    assert mnist_finetune.main([*SHORT, "--output", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert f"broken claim: {message}" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "001" / "results.json").exists()


@pytest.fixture
def adapted() -> tuple[RichBoyNet, RichBoyNet]:
    """A network whose adapter is not zero, and its copy from before."""
    net = RichBoyNet()
    before = copy.deepcopy(net)
    lora_param.register_lora(net, rank=1)
    for parameter in lora_param.lora_parameters(net):
        torch.nn.init.normal_(parameter)
    return net, before


def test_promises_hold_of_an_adapted_network(adapted: tuple[RichBoyNet, RichBoyNet]) -> None:
    check_network(*adapted, scale=1.0)


def test_wrong_scale_breaks_the_formulas_claim(adapted: tuple[RichBoyNet, RichBoyNet]) -> None:
    with pytest.raises(BrokenClaimError, match=r"on, linear1\.weight is W \+ \(B @ A\) \* scale"):
        check_network(*adapted, scale=2.0)


def test_weight_that_stays_adapted_breaks_the_claim_of_off(
    adapted: tuple[RichBoyNet, RichBoyNet], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora_param, "lora_disabled", nullcontext)
    with pytest.raises(BrokenClaimError, match=r"off, linear1\.weight is its original"):
        check_network(*adapted, scale=1.0)


COUNTS = {"LoRA off": "off, the test counts are as before", "loaded": "loaded from its file"}


def test_same_counts_break_no_claim() -> None:
    check_counts(Run(0, dict.fromkeys((*STATES, "loaded"), Score((1, 2), 100))))


@pytest.mark.parametrize("state", COUNTS)
def test_other_counts_break_a_claim(state: str) -> None:
    run = Run(0, dict.fromkeys((*STATES, "loaded"), Score((1, 2), 100)))
    run.scores[state] = Score((2, 1), 100)
    with pytest.raises(BrokenClaimError, match=COUNTS[state]):
        check_counts(run)


BAD_OPTIONS = [
    (["--digit", "11"], "digit must be an integer from 0 to 9, got 11"),
    (["--digit", "nine"], "argument --digit: invalid int value: 'nine'"),
    (["--rank", "0"], "rank must be an integer from 1 to 10, got 0"),
    (["--rank", "11"], "rank must be an integer from 1 to 10, got 11"),
    (["--alpha", "inf"], "alpha must be a finite number, got inf"),
    (["--learning-rate", "nan"], "learning_rate must be a finite number above 0, got nan"),
    (["--learning-rate", "-1"], "learning_rate must be a finite number above 0, got -1.0"),
    (["--batch-size", "0"], "batch_size must be an integer from 1 to"),
    (["--test-batch-size", "-5"], "test_batch_size must be an integer from 1 to"),
    (["--finetune-batches", "0"], "finetune_batches must be an integer from 1 to"),
    (["--train-images", "60001"], "train_images must be an integer from 1 to 60000, got 60001"),
    (["--seeds", "0"], "seeds must be an integer from 1 to"),
    (["--seed", "-1"], "seed must be an integer from 0 to"),
    (["--device", "nonsense"], "device 'nonsense' can't be used; this machine has cpu"),
    (["--device", "meta"], "device 'meta' can't be used; this machine has cpu"),
    (["--data", "nowhere"], "train-images-idx3-ubyte.gz is missing; copy it again from"),
    (["--output", __file__], "File exists"),
    (["--digits", "9"], "digits must be two or more different ones such as 9,4,7, got '9'"),
    (["--digits", "9,9"], "digits must be two or more different ones"),
    (["--digits", "9,12"], "digits must be two or more different ones"),
    (["--nonsense"], "unrecognized arguments: --nonsense"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_OPTIONS)
def test_bad_option_ends_in_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delattr(mnist_finetune, "run_seed")  # nothing may be trained
    try:
        status = mnist_finetune.main(arguments)
    except SystemExit as exit_:
        status = exit_.code
    error = capsys.readouterr().err
    assert status not in (0, None)
    assert message in error
    assert error.count("\n") == 1


def test_divergence_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--learning-rate", "1e30", "--output", str(tmp_path)]
    assert mnist_finetune.main([*SHORT, *arguments]) == 1
    assert "pretraining diverged" in capsys.readouterr().err


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        mnist_finetune.main(["--help"])
    assert "--finetune-batch-size INT" in capsys.readouterr().out


def test_progress_shows_where_the_output_is_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert mnist_finetune.main([*SHORT, "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().err
    for phase in ("pretraining", "fine-tuning", "testing, LoRA on"):
        assert phase in shown
    assert "loss=" in shown


def test_an_adapter_for_each_of_several_digits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--digits", "9,4", "--output", str(tmp_path)]
    assert mnist_finetune.main([*SHORT, *arguments]) == 0
    wrong = results(tmp_path)["wrong"]
    for digit in (9, 4):
        assert wrong[f"adapter {digit}"][digit] < wrong["pretrained"][digit]
        assert abs(wrong["routed"][digit] - wrong[f"adapter {digit}"][digit]) <= 1
    assert "originals equal, bit for bit" in capsys.readouterr().out
    assert (tmp_path / "001" / "digits.png").is_file()


def test_the_network_multiplies_by_torchs_own_layers() -> None:
    layers = list(RichBoyNet().children())
    assert [type(layer) for layer in layers if list(layer.parameters())] == [torch.nn.Linear] * 3
