"""What torch does with a whole model: compiling, tracing, functional calls, checkpointing."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo.testing
import torch.utils.checkpoint
from torch import Tensor, nn

from lora_param import disable_lora, lora_disabled, lora_parameters

from .cases import adapted


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it itself
@pytest.mark.parametrize("blocks", [24])
def test_blocks_compiled_one_by_one_make_no_more_graphs_than_plain_ones(blocks: int) -> None:
    def graphs(adapt: bool) -> int:
        torch._dynamo.reset()
        model = nn.Sequential(*[Block() for _ in range(blocks)])
        model.requires_grad_(False)
        if adapt:
            adapted(model)
        counter = torch._dynamo.testing.CompileCounter()
        for block in model:
            block.compile(backend=counter, fullgraph=True)
        model(torch.randn(4, 8))
        return int(counter.frame_count)

    assert graphs(adapt=True) <= graphs(adapt=False) + 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it itself
def test_compiled_blocks_follow_switches_and_scale() -> None:
    torch._dynamo.reset()
    model, x = nn.Sequential(*[Block() for _ in range(3)]), torch.randn(4, 8)
    twin = copy.deepcopy(adapted(model))
    for block in model:
        block.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(model(x), twin(x))
    with lora_disabled(model), lora_disabled(twin):
        torch.testing.assert_close(model(x), twin(x))
    for each in (model, twin):
        each[1].up.parametrizations.weight[0].scale = 5.0
    torch.testing.assert_close(model(x), twin(x))


@pytest.mark.slow
def test_a_compiled_model_has_no_break_and_follows_switches_and_scale() -> None:
    torch._dynamo.reset()
    model, x = adapted(nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6))), torch.ones(2, 6)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    with lora_disabled(model):
        torch.testing.assert_close(compiled(x), model(x))
    model[0].parametrizations.weight[0].scale = 7.0
    torch.testing.assert_close(compiled(x), model(x))


class Reader(nn.Module):
    """Keeps what it computes from its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.linear.weight.T


def test_functional_call_replaces_the_original_for_one_call() -> None:
    model, x = adapted(Reader()), torch.randn(2, 4)
    before = model(x)
    name = "linear.parametrizations.weight.original"
    zero = {name: torch.zeros(4, 4)}
    update = torch.func.functional_call(model, zero, (x,))
    assert not torch.equal(update, before)
    assert torch.equal(model(x), before)


def test_an_adapter_shows_in_the_output_of_every_factor() -> None:
    model, x = adapted(Reader()), torch.randn(2, 4)
    model(x).sum().backward()
    assert all(factor.grad.count_nonzero() for factor in lora_parameters(model))


def test_a_traced_graph_calls_adapted_layers_as_it_calls_plain_ones() -> None:
    model, x = adapted(nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 5))), torch.randn(3, 2, 4)
    graph = torch.fx.symbolic_trace(model)
    assert torch.equal(graph(x)[0], model(x)[0])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it itself
def test_attention_compiles_without_a_break() -> None:
    torch._dynamo.reset()
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    model, x = adapted(layer), torch.randn(2, 5, 8)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    model = adapted(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)))
    x = torch.randn(3, 6, requires_grad=True)
    model(x).square().sum().backward()
    expected = [factor.grad.clone() for factor in lora_parameters(model)]
    model.zero_grad()
    torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    for factor, gradient in zip(lora_parameters(model), expected, strict=True):
        torch.testing.assert_close(factor.grad, gradient)


def test_casting_a_model_casts_its_adapters_and_they_can_be_cast_back() -> None:
    model = adapted(nn.Linear(6, 5), dtype=torch.float32)
    model.to(torch.bfloat16)
    assert {each.dtype for each in model.parameters()} == {torch.bfloat16}
    for factor in lora_parameters(model):
        factor.data = factor.float()
    assert model.weight.dtype == torch.bfloat16


@pytest.mark.usefixtures("process_group")
def test_a_disabled_adapter_trains_on_in_distributed_data_parallel() -> None:
    model = adapted(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4)))
    disable_lora(model[0])
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    before = [factor.detach().clone() for factor in lora_parameters(model)]
    optimizer = torch.optim.SGD(lora_parameters(model), lr=0.1)
    for _ in range(2):
        wrapped(torch.randn(3, 6)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = [not torch.equal(a, b) for a, b in zip(before, lora_parameters(model), strict=True)]
    assert moved == [False, False, True, True]
