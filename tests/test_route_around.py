"""Routed batches among blocks, threads, checkpoints, compilers and transforms."""

from __future__ import annotations

import contextlib
import copy
import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.exc import Unsupported
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from lora_param import (
    LoRAError,
    lora_merged,
    lora_routed,
    lora_selected,
    named_lora_parameters,
    register_lora,
)

from .cases import Case, shake
from .ranks import Ranks
from .test_route import NAMES, build, close, linear

newer = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7),
    reason="before torch 2.7 no compiled code can read a context variable",
)


def projected(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x @ weight.t()


def test_blocks_nest_and_models_are_routed_apart() -> None:
    first, second, x = linear(), linear(), torch.randn(2, 6).double()
    plain = first(x)
    with lora_routed(first, ["a", "b"]):
        want = first(x)
        with lora_routed(second, ["b", "a"]):
            assert torch.equal(first(x), want)
            assert torch.equal(second(x.flip(0)), want.flip(0))
        with lora_routed(first, ["c", None]):
            assert not torch.allclose(first(x), want)
        assert torch.equal(first(x), want)
    assert torch.equal(first(x), plain)


def test_a_block_is_of_one_thread() -> None:
    layer, x = linear(), torch.randn(2, 6).double()
    alone = {}
    for entries in (("a", "b"), ("c", None), None):
        with lora_routed(layer, entries) if entries else contextlib.nullcontext():
            alone[entries] = layer(x)
    together = threading.Barrier(3)
    faults = []

    def work(entries: Any) -> None:
        together.wait()
        for _ in range(50):
            with lora_routed(layer, entries) if entries else contextlib.nullcontext():
                if not torch.equal(layer(x), alone[entries]):
                    faults.append(entries)

    threads = [threading.Thread(target=work, args=(entries,)) for entries in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_the_routed_rows(reentrant: bool) -> None:
    layer, x = linear(), torch.randn(3, 6).double().requires_grad_()
    found = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        layer.zero_grad()
        with lora_routed(layer, ["a", None, "c"]):
            run(x).square().sum().backward()
        found.append({name: p.grad for name, p in named_lora_parameters(layer)})
    for name, gradient in found[0].items():
        assert (gradient is None) == (found[1][name] is None)
        assert gradient is None or torch.equal(gradient, found[1][name])  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", [1, 200], ids=["weighed", "gathered"])
def test_a_block_is_trained_in_after_inference(tokens: int) -> None:
    layer, x = linear(), torch.randn(2, tokens, 6).double()
    with lora_routed(layer, ["a", "b"]):
        with torch.inference_mode():
            expected = layer(x)
        y = layer(x)
        y.sum().backward()
    close(y, expected.clone())


@newer
def test_compiled_code_stays_the_same_when_the_rows_change() -> None:
    layer, x = linear(), torch.randn(3, 6).double()
    graphs = []
    backend = lambda module, _: graphs.append(module) or module  # noqa: E731
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    compiled(x)
    for entries in (["a", "b", None], ["b", {"a": 0.3}, "c"], [None, "c", "a"]):
        with lora_routed(layer, entries, names=NAMES):
            close(compiled(x), layer(x))
    with lora_routed(layer, torch.randn(3, 3).double(), names=NAMES):
        close(compiled(x), layer(x))
    assert len(graphs) == 2
    close(compiled(x), layer(x))


def test_transforms_differentiate_a_routed_batch() -> None:
    layer, x = linear(), torch.randn(3, 6).double()
    tensors = dict(layer.named_parameters())
    with lora_routed(layer, ["a", None, "c"]):
        call = lambda own: functional_call(layer, own, (x,)).square().sum()  # noqa: E731
        gradients = torch.func.grad(call)(tensors)
        layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        if parameter.grad is not None:
            close(gradients[name], parameter.grad)


def test_a_copy_made_in_a_block_is_not_routed() -> None:
    layer, x = linear(), torch.randn(2, 6).double()
    plain = layer(x)
    with lora_routed(layer, ["a", None]):
        assert torch.equal(copy.deepcopy(layer)(x), plain)


def test_hundreds_of_adapters_cost_a_routed_layer_those_that_occur() -> None:
    layer = nn.Linear(6, 5)
    for index in range(64):
        register_lora(layer, rank=1, adapter=f"n{index}")
    shake(layer)
    x = torch.randn(2, 6)
    with lora_routed(layer, ["n3", "n60"]), FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 2 * (6 * 5 + 2 * 6 + 2 * 5)


@pytest.mark.parametrize("kind", ["lora", "dense"])
def test_rows_that_vmap_hides_are_refused(kind: str) -> None:
    layer, _ = build(Case("", lambda: nn.Linear(6, 5), lambda: (torch.randn(2, 6),)), kind)
    x = torch.randn(5, 2, 6).double()
    with lora_routed(layer, ["a", "b"]), pytest.raises(LoRAError, match="vmap hides the rows"):
        torch.func.vmap(layer)(x)


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("beams", [1, 3])
def test_beam_search_gives_each_prompt_its_adapters_words(beams: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=17, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, bos_token_id=0, eos_token_id=None, pad_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    for name in NAMES:
        register_lora(model, rank=2, adapter=name, alpha=20)
    shake(model)
    prompts = torch.randint(2, 17, (1, 3)).expand(3, 3)  # as many tokens as rows
    options = {"max_new_tokens": 4, "num_beams": beams, "do_sample": False}
    entries: list[Any] = ["a", None, {"b": 0.5, "c": -1.0}]
    with lora_routed(model, entries, dim=0):
        got = model.generate(prompts, **options)
    alone = []
    for row, entry in enumerate(entries):
        with lora_selected(model, entry):
            alone.append(model.generate(prompts[row : row + 1], **options))
    assert torch.equal(got, torch.cat(alone))
    assert len({tuple(row) for row in got.tolist()}) == 3


@newer
def test_weight_space_leaves_compiled_code_and_is_refused_in_one_graph() -> None:
    layer = nn.Conv1d(4, 4, 1, groups=2).double()
    for name in NAMES:
        register_lora(layer, rank=2, adapter=name)
    shake(layer)
    x = torch.randn(2, 4, 5).double()
    compiled = torch.compile(layer, backend="eager")
    for entries in (["a", "b"], [None, "c"]):
        with lora_routed(layer, entries):
            close(compiled(x), layer(x))
    whole = torch.compile(layer, backend="eager", fullgraph=True)
    torch._dynamo.reset()
    with lora_routed(layer, ["a", "b"]), pytest.raises(Unsupported, match="disable"):
        whole(x)


@pytest.mark.filterwarnings("ignore")  # torch's own of its tracer
def test_a_block_can_be_traced() -> None:
    layer, x = linear(), torch.randn(2, 6).double()
    with lora_routed(layer, ["a", "b"]):
        traced = torch.jit.trace(layer, x)
        close(traced(x), layer(x))


@pytest.mark.filterwarnings("ignore")  # torch deprecates scripting
def test_scripted_code_gets_no_weight_that_no_row_has() -> None:
    product = torch.jit.script(projected)
    layer, x = linear(), torch.randn(2, 6).double()
    with lora_routed(layer, ["a", "b"]):
        assert product(x, layer.weight).isnan().all()
    with lora_routed(layer, ["a", "a"]), pytest.raises(LoRAError, match="outside of its layer"):
        x @ layer.weight.t()


def test_merging_in_a_block_is_refused() -> None:
    layer = linear()
    with lora_routed(layer, ["a", "b"]), pytest.raises(LoRAError, match="has adapters of its own"):
        lora_merged(layer).__enter__()


def distributed_gradients(unused: bool) -> list[Any]:
    model = linear()
    whole = nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
    entries: list[Any] = [["a", None], ["b", {"a": 0.5, "b": -1.0}]][torch.distributed.get_rank()]
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).double()
    for _ in range(2):
        model.zero_grad()
        with lora_routed(model, entries):
            whole(x.chunk(2)[torch.distributed.get_rank()]).square().mean().backward()
    return [None if p.grad is None else p.grad.tolist() for _, p in named_lora_parameters(model)]


def test_distributed_ranks_route_their_own_rows(ranks: Ranks) -> None:
    model = linear()
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).double()
    with lora_routed(model, ["a", None, "b", {"a": 0.5, "b": -1.0}]):
        model(x).square().mean().backward()
    found = ranks(distributed_gradients, True)
    for (name, parameter), *got in zip(named_lora_parameters(model), *found, strict=True):
        for gradient in got:
            assert (gradient is None) == (parameter.grad is None) == (".c." in name), name
            if gradient is not None:
                close(torch.tensor(gradient, dtype=torch.float64), parameter.grad)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="find_unused_parameters=True"):
        ranks(distributed_gradients, False)
