"""`mnist_finetune --digits 9,4,7`: an adapter for each digit on one network, used in every way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

import lora_param as lp

from .shared.batches import Split
from .shared.claims import same_bits, show
from .shared.plots import draw_matrices
from .shared.scoring import score
from .shared.tables import aligned

Counts = dict[str, tuple[int, ...]]
"""Wrong counts by digit, by what acted."""


def chosen_digits(text: str) -> list[int]:
    """Read `"9,4,7"`.

    Raises:
        ValueError: It is no list of two or more different digits.
    """
    parts = text.split(",")
    if len(parts) < 2 or len(set(parts)) < len(parts) or not set(parts) <= {*"0123456789"}:
        raise ValueError(f"digits must be two or more different ones such as 9,4,7, got {text!r}")
    return [int(part) for part in parts]


def test_each(net: nn.Module, digits: Sequence[int], test: Split) -> Counts:
    """Test each adapter alone, none, some weights of the first, and the mean of all."""
    first, counts = str(digits[0]), Counts()
    choices: dict[str, object] = {"pretrained": None} | {f"adapter {d}": str(d) for d in digits}
    choices |= {f"{w} x adapter {first}": {first: w} for w in (0.25, 0.5, 0.75)}
    choices |= {"mean of all": dict.fromkeys(map(str, digits), 1 / len(digits))}
    for name, adapters in choices.items():
        with lp.lora_selected(net, adapters):  # type: ignore[arg-type]
            counts[name] = score(net, test, 1000, f"testing, {name}").wrong
    return counts


def test_routed(net: nn.Module, digits: Sequence[int], test: Split) -> tuple[int, ...]:
    """Test with each image on its own digit's adapter, or on none, in mixed batches.

    The label says which: it stands for what is known of a request in use, its user or task.
    """
    missed, batches = [], zip(*(torch.split(each, 1000) for each in test), strict=True)
    with torch.no_grad():
        for inputs, labels in batches:
            names = [str(label) if label in digits else None for label in labels.tolist()]
            with lp.lora_routed(net, names):
                missed.append(labels[net(inputs).argmax(1) != labels])
    return tuple(torch.cat(missed).bincount(minlength=10).tolist())


def run_digits(
    net: nn.Module,
    digits: Sequence[int],
    test: Split,
    adapt: Callable[[nn.Module, int], object],
    folder: Path,
) -> Counts:
    """Adapt a pretrained network to each digit, show what each adapter does, and draw it.

    Args:
        net: The pretrained network.
        digits: The digits.
        test: Test images.
        adapt: Registers the adapter `str(digit)` on the network, selects and trains it.
        folder: Where the picture goes.

    Returns:
        Wrong counts.
    """
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for digit in digits:
        adapt(net, digit)
    after = lp.base_state_dict(net)
    show(
        all(same_bits(after[name], before[name]) for name in before), "originals equal, bit for bit"
    )
    counts = test_each(net, digits, test)
    with lp.lora_selected(net, None):
        back = score(net, test, 1000, "testing, none").wrong
    show(back == counts["pretrained"], "with no adapter selected it errs as it did before")
    counts["routed"] = test_routed(net, digits, test)
    expected = [
        counts[f"adapter {label}" if label in digits else "pretrained"][label]
        for label in range(10)
    ]
    near = max(abs(a - b) for a, b in zip(counts["routed"], expected, strict=True))
    show(
        near <= 1, "routed, each image errs as with its adapter alone (one may differ by rounding)"
    )
    rows = [["wrong, of about 1,000 a digit", *map(str, range(10)), "all"]]
    rows += [[name, *map(str, wrong), str(sum(wrong))] for name, wrong in counts.items()]
    print("", aligned(rows), sep="\n")
    names = ["pretrained", *(f"adapter {digit}" for digit in digits), "routed"]
    matrix = torch.tensor([counts[name] for name in names])
    title = "wrong, of about 1,000 a digit 0 to 9:  " + ",  ".join(names)
    draw_matrices({title: matrix}, folder / "digits.png", decimals=0)
    return counts
