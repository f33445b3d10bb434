"""The network of `mnist_finetune`, and what LoRA promises of each of its tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import lora_param as lp

from .mnist_report import STATES, Run
from .shared.claims import claim, same_bits, show


class RichBoyNet(nn.Module):
    """The source's network, `784 -> 1000 -> 2000 -> 10` with ReLU: far more than MNIST needs."""

    def __init__(self, hidden_size_1: int = 1000, hidden_size_2: int = 2000) -> None:
        super().__init__()
        self.linear1 = nn.Linear(784, hidden_size_1)
        self.linear2 = nn.Linear(hidden_size_1, hidden_size_2)
        self.linear3 = nn.Linear(hidden_size_2, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the digits' logits, `[batch, 10]`, for pixels `[batch, 784]`."""
        hidden = torch.relu(self.linear1(pixels))
        hidden = torch.relu(self.linear2(hidden))
        logits: Tensor = self.linear3(hidden)
        return logits


def check_network(net: RichBoyNet, before: RichBoyNet, scale: float) -> None:
    """Check what LoRA promises of each tensor.

    Args:
        net: The network, its adapter enabled.
        before: A copy from before the adapter was registered.
        scale: `alpha / rank`.
    """
    for name in ("linear1", "linear2", "linear3"):
        layer, plain = getattr(net, name), getattr(before, name)
        original, lora = layer.parametrizations.weight.original, layer.parametrizations.weight[0]
        formula = original + (lora.lora_B @ lora.lora_A) * scale
        claim(same_bits(original, plain.weight), f"{name}.weight's original is as before")
        claim(same_bits(layer.bias, plain.bias), f"{name}.bias is as before")
        claim(same_bits(layer.weight, formula), f"on, {name}.weight is W + (B @ A) * scale")
        with lp.lora_disabled(net):
            claim(same_bits(layer.weight, plain.weight), f"off, {name}.weight is its original")
    print("  it holds: each original and each bias is what it was, bit for bit")
    print("  it holds: on, each weight is W + (B @ A) * scale; off, it is W itself")


def check_counts(run: Run) -> None:
    """Check that the network errs as before with its adapter off, and as it does with it loaded."""
    before, on, off, loaded = (run.scores[state].wrong for state in (*STATES, "loaded"))
    show(off == before, "off, the test counts are as before")
    show(loaded == on, "loaded from its file into a copy, the adapter gives the same test counts")
