"""Random sequences of operations: after each of them every law holds."""

from __future__ import annotations

import copy
import pickle

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor, nn

from lora_param import (
    LoRAParametrization,
    assert_frozen,
    base_state_dict,
    disable_lora,
    enable_lora,
    fingerprint,
    load_lora_state_dict,
    lora_disabled,
    lora_parameters,
    lora_state_dict,
    lora_summary,
    merge_lora,
    register_lora,
    remove_lora,
)
from lora_param.checks import walk

from .cases import shake

NAMES = ["embed.weight", "rnn.weight_ih_l0", "rnn.weight_hh_l0", "head.weight"]
ADAPTERS = ["a", "b", "c"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.rnn = nn.LSTM(4, 3, batch_first=True)
        self.norm = nn.LayerNorm(3)
        self.head = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.rnn(self.embed(x))[0]))


class Sequences(RuleBasedStateMachine):
    """A model, and beside it a plain list of what has been registered where."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = Net()
        self.model.norm.bias.requires_grad_(False)
        self.x = torch.randint(0, 7, (2, 5))
        self.plain = copy.deepcopy(self.model)
        self.before = fingerprint(self.model)
        self.registered: dict[str, list[str]] = {name: [] for name in NAMES}
        self.enabled: dict[tuple[str, str], bool] = {}

    def has(self, adapter: str) -> bool:
        return any(adapter in adapters for adapters in self.registered.values())

    def adapters(self) -> list[str]:
        return [adapter for adapter in ADAPTERS if self.has(adapter)]

    def forget(self, adapter: str | None) -> None:
        for name, adapters in self.registered.items():
            kept = [each for each in adapters if adapter not in (None, each)]
            for gone in set(adapters) - set(kept):
                del self.enabled[name, gone]
            self.registered[name] = kept

    @rule(
        adapter=st.sampled_from(ADAPTERS),
        names=st.lists(st.sampled_from(NAMES), min_size=1, unique=True),
        rank=st.integers(1, 3),
    )
    def register(self, adapter: str, names: list[str], rank: int) -> None:
        if any(adapter in self.registered[name] for name in names):
            return
        expected = [name for name in NAMES if name in names]
        assert register_lora(self.model, rank=rank, target=names, adapter=adapter) == expected
        for name in names:
            self.registered[name].append(adapter)
            self.enabled[name, adapter] = True

    def switch(self, adapter: str | None, on: bool) -> None:
        (enable_lora if on else disable_lora)(self.model, adapter)
        for name, each in self.enabled:
            if adapter in (None, each):
                self.enabled[name, each] = on

    @precondition(lambda self: self.adapters())
    @rule(data=st.data(), on=st.booleans())
    def switch_one_or_all(self, data: st.DataObject, on: bool) -> None:
        self.switch(data.draw(st.sampled_from([None, *self.adapters()])), on)

    @precondition(lambda self: self.adapters())
    @rule(data=st.data())
    def disable_in_nested_blocks(self, data: st.DataObject) -> None:
        adapter = data.draw(st.sampled_from(self.adapters()))
        with lora_disabled(self.model, adapter):
            with lora_disabled(self.model), torch.no_grad():
                assert torch.equal(self.model(self.x), self.plain(self.x))
            enable_lora(self.model, adapter)

    @precondition(lambda self: self.adapters())
    @rule()
    def change_factors(self) -> None:
        shake(self.model)

    @precondition(lambda self: any(self.enabled.values()))
    @rule(optimizer=st.sampled_from([torch.optim.SGD, torch.optim.AdamW]))
    def train(self, optimizer: type[torch.optim.Optimizer]) -> None:
        step = optimizer(self.model.parameters(), lr=1e-2, weight_decay=0.1)
        self.model(self.x).square().sum().backward()
        step.step()

    @rule()
    def continue_with_a_deepcopy(self) -> None:
        left, self.model = self.model, copy.deepcopy(self.model)
        if self.adapters():
            shake(left)
            remove_lora(left)

    @rule()
    def continue_with_a_pickled_copy(self) -> None:
        self.model = pickle.loads(pickle.dumps(self.model))

    @precondition(lambda self: self.adapters())
    @rule()
    def save_change_and_load(self) -> None:
        saved = {name: tensor.clone() for name, tensor in lora_state_dict(self.model).items()}
        output = self.model(self.x)
        shake(self.model)
        load_lora_state_dict(self.model, saved)
        assert torch.equal(self.model(self.x), output)

    @rule()
    def load_a_plain_checkpoint(self) -> None:
        state = self.plain.state_dict()
        with torch.no_grad():
            for _, tensor in walk(self.model, "the test").parameters:
                tensor.zero_()
        self.model.load_state_dict(state, strict=True)
        assert list(base_state_dict(self.model)) == list(state)

    @rule(assign=st.booleans())
    def load_a_full_checkpoint(self, assign: bool) -> None:
        state = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        output = self.model(self.x)
        if self.adapters():
            shake(self.model)
        self.model.load_state_dict(state, strict=True, assign=assign)
        assert torch.equal(self.model(self.x), output)

    @rule()
    def cast_and_cast_back(self) -> None:
        self.model.double().float()

    @rule(training=st.booleans())
    def set_the_training_mode(self, training: bool) -> None:
        self.model.train(training)
        self.plain.train(training)

    @precondition(lambda self: self.enabled and all(self.enabled.values()))
    @rule(data=st.data())
    def merge_in_a_copy(self, data: st.DataObject) -> None:
        merged = copy.deepcopy(self.model)
        merge_lora(merged, data.draw(st.sampled_from([None, *self.adapters()])))
        torch.testing.assert_close(merged(self.x), self.model(self.x), rtol=1e-4, atol=1e-4)

    @precondition(lambda self: self.adapters())
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        adapter = data.draw(st.sampled_from([None, *self.adapters()]))
        remove_lora(self.model, adapter)
        self.forget(adapter)

    @invariant()
    def originals_keep_every_bit_and_have_no_gradient(self) -> None:
        assert_frozen(self.model, self.before)
        factors = set(lora_parameters(self.model)) if self.adapters() else set()
        assert all(p.grad is None for p in self.model.parameters() if p not in factors)

    @invariant()
    def weights_are_what_the_formula_says(self) -> None:
        for name in NAMES:
            path, _, tensor = name.rpartition(".")
            owner, expected = self.model.get_submodule(path), self.plain.get_parameter(name)
            entries = list(owner.parametrizations[tensor]) if self.registered[name] else []
            for adapter, entry in zip(self.registered[name], entries, strict=True):
                assert isinstance(entry, LoRAParametrization)
                assert entry.enabled == self.enabled[name, adapter]
                if entry.enabled:
                    update = (entry.lora_B @ entry.lora_A).view_as(expected)
                    expected = expected + update * entry.scale
            assert torch.equal(getattr(owner, tensor), expected)

    @invariant()
    def the_summary_lists_what_is_registered(self) -> None:
        if self.adapters():
            found = {w.name: [a.name for a in w.adapters] for w in lora_summary(self.model).weights}
            assert found == {name: each for name, each in self.registered.items() if each}

    @invariant()
    def without_adapters_the_model_is_plain(self) -> None:
        if not self.adapters():
            assert list(self.model.state_dict()) == list(self.plain.state_dict())
            flags = [(n, p.requires_grad) for n, p in self.model.named_parameters()]
            assert flags == [(n, p.requires_grad) for n, p in self.plain.named_parameters()]
            types = [(n, type(m), sorted(vars(m))) for n, m in self.model.named_modules()]
            assert types == [(n, type(m), sorted(vars(m))) for n, m in self.plain.named_modules()]


TestSequences = Sequences.TestCase
TestSequences.settings = settings(
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
