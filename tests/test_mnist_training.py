"""The experiment's training steps: layers in blocks, and the source's loop to compare with."""

from __future__ import annotations

import pytest
import torch

from experiments import mnist_finetune, mnist_source_loop, mnist_training
from experiments.mnist import Split
from experiments.mnist_training import RichBoyNet, in_blocks


@pytest.mark.parametrize("batch", [1, 10])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_layers_in_blocks_give_the_networks_outputs_and_gradients(
    batch: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    net = RichBoyNet(30, 21).double()
    pixels = torch.randn(batch, 784, dtype=torch.float64)
    plain, blocks = net(pixels), net(pixels, in_blocks)
    torch.testing.assert_close(blocks, plain)
    expected, found = (
        torch.autograd.grad(logits.square().sum(), list(net.parameters()))
        for logits in (plain, blocks)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("most", "shape"), [(1, (1, 30, 2)), (4, (2, 15, 2)), (15, (15, 2, 2))])
def test_blocks_are_even(most: int, shape: tuple[int, ...]) -> None:
    assert mnist_training._blocks(torch.zeros(30, 2), most).shape == shape


@pytest.fixture
def through_blocks(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """List the weights that the experiment or the source's loop applies in blocks."""
    shapes: list[torch.Size] = []

    def recorded(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        shapes.append(layer.weight.shape)
        return in_blocks(layer, x)

    for module in (mnist_finetune, mnist_source_loop):
        monkeypatch.setattr(module, "in_blocks", recorded)
    return shapes


LAYERS = [(1000, 784), (2000, 1000), (10, 2000)]


@pytest.mark.parametrize(("batch_size", "applied"), [(10, LAYERS * 11), (110, [])])
def test_only_few_images_go_through_blocks(
    batch_size: int, applied: list[tuple[int, int]], through_blocks: list[torch.Size]
) -> None:
    split = Split(torch.randn(110, 784), torch.randint(0, 10, (110,)))
    config = mnist_finetune.Config(batch_size=batch_size)
    mnist_finetune.pretrain(RichBoyNet(), split, config, torch.Generator())
    assert through_blocks == applied


def test_source_loop_compares_both_ways(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    through_blocks: list[torch.Size],
) -> None:
    phases = dict.fromkeys(mnist_source_loop.PHASES, (40, 20, 40))
    monkeypatch.setattr(mnist_source_loop, "PHASES", phases)
    mnist_source_loop.main(["--quick"])
    lines = capsys.readouterr().out.split("\n")
    assert [line[:18].strip() for line in lines[1:-1]] == [*phases, "whole run"]
    assert through_blocks[:3] == LAYERS
