"""What attaching and detaching do to a module: class, copies, pickles, order, and who else is there."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import pickle
import sys
import weakref
from abc import ABC
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from lora_param import (
    LoRAError,
    LoRAParametrization,
    assert_frozen,
    base_state_dict,
    fingerprint,
    lora_disabled,
    lora_parameters,
    merge_lora,
    register_lora,
    remove_lora,
)

from .cases import shake


def adapted(module: nn.Module, **options: Any) -> nn.Module:
    register_lora(module, **{"rank": 2} | options)
    shake(module)
    return module


def test_an_adapted_layer_is_still_of_its_type() -> None:
    layer = adapted(nn.Linear(6, 5))
    assert isinstance(layer, nn.Linear)
    assert parametrize.is_parametrized(layer, "weight")
    assert parametrize.type_before_parametrizations(layer) is nn.Linear


def test_equal_layers_share_one_class() -> None:
    first, second = adapted(nn.Linear(6, 5)), adapted(nn.Linear(3, 2))
    assert type(first) is type(second)


def test_a_class_with_a_metaclass_can_be_adapted() -> None:
    class Abstract(nn.Linear, ABC):
        pass

    layer = adapted(Abstract(6, 5))
    assert isinstance(layer, Abstract)
    remove_lora(layer)
    assert type(layer) is Abstract


def test_torchs_own_removal_from_one_module_leaves_its_siblings_and_copies() -> None:
    layer = adapted(nn.Linear(6, 5))
    twin, sibling = copy.deepcopy(layer), adapted(nn.Linear(6, 5))
    expected, sibling_expected = layer.weight.clone(), sibling.weight.clone()
    parametrize.remove_parametrizations(twin, "weight")
    assert type(twin) is nn.Linear
    assert torch.equal(twin.weight, expected)
    assert torch.equal(layer.weight, expected)
    assert torch.equal(sibling.weight, sibling_expected)


def test_torchs_own_removal_of_one_of_two_tensors_leaves_the_other_adapted() -> None:
    cell = adapted(nn.LSTMCell(4, 5))
    expected = cell.weight_hh.clone()
    parametrize.remove_parametrizations(cell, "weight_ih", leave_parametrized=False)
    assert isinstance(cell.weight_ih, nn.Parameter)
    assert torch.equal(cell.weight_hh, expected)
    cell(torch.ones(2, 4))
    remove_lora(cell)
    assert type(cell) is nn.LSTMCell


def test_registering_on_a_further_tensor_of_a_copy_leaves_the_first() -> None:
    layer = adapted(nn.Linear(6, 5))
    twin, x = copy.deepcopy(layer), torch.ones(1, 6)
    expected = layer(x)
    parametrize.register_parametrization(twin, "bias", nn.Tanh())
    assert torch.equal(twin.bias, layer.bias.tanh())
    assert torch.equal(layer(x), expected)


def test_copies_share_no_cache() -> None:
    layer = adapted(nn.Linear(6, 5))
    twin = copy.deepcopy(layer)
    shake(twin)
    with parametrize.cached():
        assert layer.weight is layer.weight
        assert not torch.equal(layer.weight, twin.weight)


def test_a_copy_does_not_keep_its_original_alive() -> None:
    layer = adapted(nn.Linear(6, 5))
    twin, original = copy.deepcopy(layer), weakref.ref(layer)
    del layer
    gc.collect()
    assert original() is None
    twin(torch.ones(1, 6))


def test_an_encoder_built_from_an_adapted_layer_has_independent_layers() -> None:
    layer = adapted(nn.TransformerEncoderLayer(8, 2, 12))
    encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    x = torch.randn(5, 2, 8)
    outputs = [each(x) for each in encoder.layers]
    remove_lora(encoder.layers[2])
    shake(encoder.layers[1])
    assert type(encoder.layers[2].linear1) is nn.Linear
    assert torch.equal(encoder.layers[0](x), outputs[0])
    assert not torch.equal(encoder.layers[1](x), outputs[1])


def test_an_averaged_model_follows_and_stays_apart() -> None:
    model = adapted(nn.Linear(6, 5))
    average = torch.optim.swa_utils.AveragedModel(model)
    first = average.module.weight.clone()
    average.update_parameters(model)
    shake(model)
    average.update_parameters(model)
    after = average.module.weight.clone()
    assert not torch.equal(after, first)
    remove_lora(model)
    assert torch.equal(average.module.weight, after)


def test_an_lstm_can_be_copied_after_a_forward_with_gradients() -> None:
    lstm, x = adapted(nn.LSTM(4, 5)), torch.randn(3, 2, 4)
    expected = lstm(x)[0]
    twin = copy.deepcopy(lstm)
    assert torch.equal(twin(x)[0], expected)
    shake(twin)
    assert not torch.equal(twin(x)[0], expected)
    assert torch.equal(lstm(x)[0], expected)


def test_pickle_keeps_factors_state_and_frozen_flags() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5))
    adapted(model, adapter="a")
    model[0].parametrizations.weight[0].enabled = False
    loaded = pickle.loads(pickle.dumps(model))
    assert not loaded[0].parametrizations.weight[0].enabled
    assert [p.requires_grad for p in loaded.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]
    remove_lora(loaded)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert [name for name, _ in loaded.named_parameters()][:2] == ["0.weight", "0.bias"]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_pickle_protocol_works(protocol: int) -> None:
    layer = adapted(nn.Linear(6, 5))
    assert torch.equal(pickle.loads(pickle.dumps(layer, protocol)).weight, layer.weight)


def test_a_shallow_copy_reads_the_same_weight() -> None:
    layer = adapted(nn.Linear(6, 5))
    assert torch.equal(copy.copy(layer).weight, layer.weight)


def _total(layer: nn.Module, result: Any) -> None:
    result.put(float(layer.weight.sum()))


@pytest.mark.slow
def test_a_spawned_process_takes_an_adapted_model() -> None:
    layer = adapted(nn.Linear(6, 5))
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    context = multiprocessing.get_context("spawn")
    result = context.Queue()
    process = context.Process(target=_total, args=(layer, result))
    process.start()
    assert result.get(timeout=120) == pytest.approx(float(layer.weight.sum()), abs=1e-5)
    process.join()


def test_a_class_that_pickles_itself_is_refused_while_adapted() -> None:
    with pytest.raises(pickle.PicklingError, match="pickles itself in a way of its own"):
        pickle.dumps(adapted(OwnPickle(6, 5)))


class OwnPickle(nn.Linear):
    def __reduce__(self) -> tuple[Any, ...]:
        return OwnPickle, (self.in_features, self.out_features)


def test_a_copy_of_a_foreign_parametrized_layer_is_independent() -> None:
    layer = parametrizations.weight_norm(nn.Linear(6, 5))
    adapted(layer)
    twin, expected = copy.deepcopy(layer), layer.weight.clone()
    remove_lora(twin)
    parametrize.remove_parametrizations(twin, "weight")
    assert type(twin) is nn.Linear
    assert torch.equal(layer.weight, expected)


def test_assigning_to_an_adapted_weight_says_what_to_do_instead() -> None:
    layer = adapted(nn.Linear(6, 5))
    before = fingerprint(layer)
    with pytest.raises(
        LoRAError, match=r"assign to parametrizations\.weight\.original under no_grad"
    ):
        layer.weight = torch.zeros(5, 6)
    assert fingerprint(layer) == before


def test_parameters_called_like_a_dictionarys_methods_can_be_adapted() -> None:
    class Memory(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.keys, self.values = (nn.Parameter(torch.randn(4, 3)) for _ in range(2))

    memory = Memory()
    before = memory.keys
    adapted(memory, target="*")
    assert not torch.equal(memory.keys, before)
    remove_lora(memory)
    assert memory.keys is before


def test_registering_invalidates_no_graph() -> None:
    layer = nn.Linear(6, 5)
    x = torch.randn(2, 6, requires_grad=True)
    loss = layer(x).sum()
    adapted(layer)
    loss.backward()
    assert x.grad is not None


def test_reading_for_a_check_does_not_advance_a_spectral_norm() -> None:
    layer = parametrizations.spectral_norm(nn.Linear(6, 5))
    before = copy.deepcopy(dict(layer.named_buffers()))
    register_lora(layer, rank=2)
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, before[name])


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


VERBS = {
    "register": lambda model: register_lora(model, rank=2, target="*", adapter="second"),
    "remove": remove_lora,
    "merge": merge_lora,
}


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_a_fault_at_any_line_leaves_the_model_as_it_was(verb: str) -> None:
    model = nn.Sequential(
        nn.Linear(6, 5), nn.LSTM(5, 4), parametrizations.weight_norm(nn.Linear(4, 5))
    )
    adapted(model, target="*")
    model[0].bias.requires_grad_(True)
    model[0].bias.grad = torch.ones(5)
    model[1].parametrizations.weight_hh_l0[0].eval()
    before = _state(model)
    line, raised = 0, True
    while raised:
        raised = _raises_at(line, VERBS[verb], model)
        assert not raised or _state(model) == before, line
        line += 3  # every third line, to save time
    assert line > 300
    assert _state(model) != before


def _raises_at(line: int, verb: Any, model: nn.Module) -> bool:
    """Interrupt the library at the given line of all that a call executes in it."""
    left = line

    def trace(frame: Any, event: str, argument: object) -> Any:
        nonlocal left
        code = frame.f_code
        if "lora_param" not in code.co_filename or code.co_name in UNDOING:
            return None
        if event == "line":
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        verb(model)
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
        torch.set_grad_enabled(True)  # a tracer can raise between a block's end and its context's
    return False


UNDOING = ("snapshot", "bring_back", "all_or_nothing")
"""Where a call takes note of the state or restores it, and has changed nothing or everything."""


def _state(model: nn.Module) -> list[Any]:
    return [
        [
            (name, type(each), each.training, sorted(vars(each)))
            for name, each in model.named_modules()
        ],
        [
            (name, id(p), p.requires_grad, id(p.grad), p.detach().numpy().tobytes())
            for name, p in model.named_parameters()
        ],
        list(model.state_dict()),
    ]


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


READ_OFTEN = {
    "attention": lambda: nn.MultiheadAttention(8, 2),
    "attention kdim vdim": lambda: nn.MultiheadAttention(8, 2, kdim=8, vdim=8),
    "lstm": lambda: nn.LSTM(8, 5, 2, bidirectional=True),
    "gru": lambda: nn.GRU(8, 5),
}


@pytest.mark.parametrize("layer", READ_OFTEN)
@pytest.mark.parametrize("grad", [True, False])
def test_a_forward_computes_each_weight_once(layer: str, grad: bool) -> None:
    model, x = adapted(READ_OFTEN[layer]()), torch.randn(3, 2, 8)
    calls = []
    for entry in model.modules():
        if isinstance(entry, LoRAParametrization):
            entry.register_forward_hook(lambda *args: calls.append(args))
    with torch.set_grad_enabled(grad):
        model(x, x, x) if "attention" in layer else model(x)
    assert len(calls) == len(list(lora_parameters(model))) // 2


def test_between_forwards_a_weight_is_computed_anew() -> None:
    lstm, x = adapted(nn.LSTM(4, 5)), torch.randn(3, 2, 4)
    with torch.no_grad():
        before = lstm(x)[0]
    shake(lstm)
    after = lstm(x)[0]
    assert not torch.equal(after, before)
    assert after.requires_grad


class Watched(nn.LSTM):
    """Looks at its weight without a graph before it uses it."""

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            self.norm = self.weight_hh_l0.norm()
        return super().forward(x)


def test_a_weight_read_without_a_graph_still_gets_its_gradient() -> None:
    lstm = adapted(Watched(4, 5))
    lstm(torch.randn(3, 2, 4))[0].sum().backward()
    assert all(factor.grad is not None for factor in lora_parameters(lstm))


def test_switching_inside_a_cache_shows_at_once() -> None:
    layer, x = nn.Linear(6, 5).requires_grad_(False), torch.randn(2, 6)
    before = layer(x)
    adapted(layer)
    with parametrize.cached():
        assert not torch.equal(layer(x), before)
        with lora_disabled(layer):
            assert torch.equal(layer(x), before)


class Delegating(nn.Module):
    """Answers for the module it holds, as wrappers do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


@pytest.mark.parametrize("wrap", [Delegating, lambda m: torch.compile(m, backend="eager")])
def test_a_wrapper_that_answers_for_its_module_is_no_obstacle(wrap: Any) -> None:
    inner = nn.Linear(6, 5)
    model = wrap(inner)
    before = fingerprint(model)
    adapted(model)
    assert fingerprint(model) == before
    remove_lora(model)
    assert type(inner) is nn.Linear


def test_entries_of_a_parameter_list_can_be_adapted_and_a_slice_says_no() -> None:
    entries = nn.ParameterList([torch.randn(4, 3), torch.randn(4, 3)])
    before = entries[0].detach().clone()
    assert register_lora(entries, rank=2, target="*") == ["0", "1"]
    shake(entries)
    assert not torch.equal(entries[0], before)
    assert len(list(entries)) == 2
    with pytest.raises(LoRAError, match="a slice of an adapted ParameterList would hold copies"):
        entries[0:1]


def test_a_copy_of_an_adapted_parameter_dictionary_says_no() -> None:
    entries = nn.ParameterDict({"a": torch.randn(4, 3)})
    register_lora(entries, rank=2, target="a")
    with pytest.raises(LoRAError, match=r"would lose its adapters; use copy\.deepcopy"):
        entries.copy()


def test_a_traced_graph_calls_adapted_layers_as_it_calls_plain_ones() -> None:
    model, x = adapted(nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 5))), torch.randn(3, 2, 4)
    graph = torch.fx.symbolic_trace(model)
    assert torch.equal(graph(x)[0], model(x)[0])


@pytest.mark.parametrize("value", [nn.Parameter(torch.zeros(5, 6)), torch.zeros(5, 6), None])
def test_replacing_an_adapted_weight_in_any_way_is_refused(value: Any) -> None:
    layer = adapted(nn.Linear(6, 5))
    with pytest.raises(LoRAError, match="can't assign to an adapted weight"):
        layer.weight = value


def test_a_buffer_adapted_by_hand_stays_a_buffer() -> None:
    module = nn.Module()
    module.register_buffer("table", torch.randn(4, 3))
    parametrize.register_parametrization(module, "table", LoRAParametrization(4, 3, 1))
    remove_lora(module)
    assert list(module.state_dict()) == ["table"]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it itself
def test_attention_compiles_without_a_break() -> None:
    torch._dynamo.reset()
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    model, x = adapted(layer), torch.randn(2, 5, 8)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


def test_a_bare_module_can_be_adapted() -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(5, 6))
    checkpoint = {"weight": torch.randn(5, 6)}
    adapted(module, target="weight")
    module.load_state_dict(checkpoint, strict=True)
    with pytest.raises(LoRAError, match="can't assign to an adapted weight"):
        module.weight = nn.Parameter(torch.zeros(5, 6))
    remove_lora(module)
    assert type(module) is nn.Module
    assert torch.equal(module.weight, checkpoint["weight"])


class Doubling(nn.ParameterList):
    """Reads its entries in a way of its own."""

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(index) * 2


def test_a_parameter_list_keeps_its_own_way_of_reading() -> None:
    entries = Doubling([torch.ones(4, 3)])
    register_lora(entries, rank=1, target="*")
    assert torch.equal(entries[0], torch.full((4, 3), 2.0))


def test_the_state_dict_of_a_base_with_an_adapted_buffer_leaves_the_model_alone() -> None:
    module = nn.Module()
    module.register_buffer("table", torch.randn(4, 3))
    parametrize.register_parametrization(module, "table", LoRAParametrization(4, 3, 1))
    before, digests = list(module.state_dict()), fingerprint(module, buffers=True)
    assert list(base_state_dict(module)) == list(digests) == ["table"]
    assert list(module.state_dict()) == before
    remove_lora(module)
    assert_frozen(module, digests)


class Rewrapping(nn.Linear):
    """Wraps every Parameter that it is given anew."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, nn.Parameter(value.clone()) if name == "weight" else value)


def test_a_class_that_rewraps_parameters_gets_its_own_back() -> None:
    layer = Rewrapping(6, 5)
    before = layer.weight
    adapted(layer)
    remove_lora(layer)
    assert layer.weight is before


def test_a_recurrent_layers_own_list_of_weights_is_restored() -> None:
    lstm = adapted(nn.LSTM(4, 5))
    lstm(torch.randn(3, 2, 4))
    remove_lora(lstm)
    assert lstm._flat_weights[0] is lstm.weight_ih_l0


class Counted(nn.Linear):
    """Can't be made without its arguments."""

    def __new__(cls, width: int, height: int) -> Any:
        return super().__new__(cls)

    def __getnewargs__(self) -> tuple[int, int]:
        return self.in_features, self.out_features


def test_a_class_that_is_made_with_arguments_can_be_copied() -> None:
    layer = adapted(Counted(6, 5))
    assert torch.equal(copy.deepcopy(layer).weight, layer.weight)


def test_a_change_of_scale_shows_inside_a_cache() -> None:
    layer = adapted(nn.Linear(6, 5))
    with parametrize.cached():
        before = layer.weight
        layer.parametrizations.weight[0].scale *= 2
        assert not torch.equal(layer.weight, before)


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def test_a_layer_that_torch_parametrized_first_can_be_pickled_once_adapted() -> None:
    layer = parametrize.register_parametrization(nn.Linear(6, 5), "weight", Halved())
    adapted(layer)
    loaded = pickle.loads(pickle.dumps(layer))
    assert torch.equal(loaded.weight, layer.weight)
    remove_lora(loaded)
    assert torch.equal(loaded.weight, layer.parametrizations.weight.original / 2)


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
