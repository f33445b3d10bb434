"""What a run of `mnist_finetune` measured, and what it shows: tables and a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import nn

import lora_param as lp

from .shared.scoring import Score, spread, wrong_counts
from .shared.tables import aligned

STATES = ("pretrained", "LoRA on", "LoRA off")

SOURCE = {
    "pretrained": Score((33, 28, 42, 95, 19, 10, 61, 52, 19, 107), 10_000),
    "LoRA on": Score((53, 32, 60, 201, 186, 85, 69, 677, 193, 11), 10_000),
    "LoRA off": Score((33, 28, 42, 95, 19, 10, 61, 52, 19, 107), 10_000),
}
"""The notebook's own run: digit 9, rank 1, alpha 1."""


@dataclass
class Run:
    """One seed's figures, filled in as the run goes on.

    Attributes:
        seed: The seed.
        scores: The test passes, by the names in `STATES`, and `"loaded"` of the adapter's file.
        losses: Mean loss over each training phase.
        seconds: Time of each phase.
    """

    seed: int
    scores: dict[str, Score] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def record(runs: Sequence[Run], net: nn.Module) -> dict[str, object]:
    """Gather a run's figures for `results.json`.

    Args:
        runs: One run or more.
        net: The adapted network.

    Returns:
        Parameter counts; mean and standard deviation of accuracy and wrong counts, by state; the
        source's figures; and each run's own.
    """
    counts = lp.lora_summary(net)
    return {
        "parameters": {
            "original": counts.base_parameters,
            "lora": counts.lora_parameters,
            "total": counts.total_parameters,
            "percentage": counts.percentage,
        },
        "summary": {
            state: {
                "accuracy": asdict(spread([score.accuracy for score in scores])),
                "wrong": [asdict(count) for count in wrong_counts(scores)],
            }
            for state in STATES
            for scores in [[run.scores[state] for run in runs]]
        },
        "source": {state: asdict(score) for state, score in SOURCE.items()},
        "runs": [asdict(run) for run in runs],
    }


def layer_table(net: nn.Module) -> str:
    """List each adapted layer's shapes and parameter counts, and the totals.

    Args:
        net: The network; each of its children has an adapted weight and a bias.

    Returns:
        The table, without a final line break.
    """
    rows = [["layer", "weight", "bias", "A", "B", "original", "LoRA"]]
    chain = "parametrizations.weight"
    names = (f"{chain}.original", "bias", f"{chain}.0.lora_A", f"{chain}.0.lora_B")
    for name, layer in net.named_children():
        tensors = [layer.get_parameter(tensor) for tensor in names]
        sizes = [tensor.numel() for tensor in tensors]
        shapes = ["x".join(map(str, tensor.shape)) for tensor in tensors]
        rows.append([name, *shapes, f"{sum(sizes[:2]):,}", f"{sum(sizes[2:]):,}"])
    counts = lp.lora_summary(net)
    return (
        f"{aligned(rows)}\n"
        f"{counts.base_parameters:,} original + {counts.lora_parameters:,} added by LoRA = "
        f"{counts.total_parameters:,} parameters together; LoRA adds {counts.percentage:.3f} %"
    )


def file_size(net: nn.Module, path: Path) -> str:
    """Compare the size of an adapter's file with that of its network.

    Args:
        net: The adapted network.
        path: The adapter's file.

    Returns:
        One line.
    """
    size, base = path.stat().st_size, sum(each.nbytes for each in lp.base_state_dict(net).values())
    return f"{path.name}: {size:,} bytes, the network {base:,}: {size / base:.1%}"


def table(runs: Sequence[Run], with_source: bool) -> str:
    """Lay out accuracies and wrong counts.

    Args:
        runs: One run or more; of several, the table has mean and standard deviation.
        with_source: Whether each has the source's figures beneath.

    Returns:
        The table, without a final line break.
    """
    rows = [("wrong, of about 1,000 a digit", "accuracy", *map(str, range(10)))]
    for state in STATES:
        rows.append(_row(state, [run.scores[state] for run in runs]))
        if with_source:
            rows.append(_row("  the notebook's own run", [SOURCE[state]]))
    return aligned(rows)


def _row(label: str, scores: Sequence[Score]) -> tuple[str, ...]:
    accuracy = spread([score.accuracy for score in scores])
    return (label, accuracy.text(3), *(count.text(0) for count in wrong_counts(scores)))


def verdict(runs: Sequence[Run], digit: int) -> str:
    """Say what the figures show, in words that hold for these very figures.

    Args:
        runs: One run or more; of several, the means are compared.
        digit: The digit that was fine-tuned on.

    Returns:
        One sentence a line.
    """
    before, on, off = (
        [count.mean for count in wrong_counts([run.scores[state] for run in runs])]
        for state in STATES
    )
    others_before, others_on = (sum(each) - each[digit] for each in (before, on))
    lines = [
        f"The {digit}s: {_change(before[digit], on[digit])}.",
        f"The other digits: {_change(others_before, others_on)}.",
    ]
    if others_on > others_before:
        lines.append(f"They pay for it, because the fine-tuning saw nothing but {digit}s.")
    back = "are exactly" if off == before else "are not"
    lines.append(f"LoRA off: the wrong counts {back} the pretrained network's.")
    return "\n".join(lines)


def _change(before: float, after: float) -> str:
    figures = f"{before:.0f} wrong before, {after:.0f} with LoRA on"
    if after == before:
        return f"{figures}: no change"
    if after > before:
        return f"{figures}: worse"
    return f"{figures}: better" + (f", {before / after:.1f}-fold" if after else "")
