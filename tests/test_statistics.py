"""Statistics deltas: what training moves in a batch norm belongs to the adapter."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from lora_param import (
    FrozenError,
    LoRAError,
    TargetError,
    base_frozen,
    base_state_dict,
    disable_lora,
    fingerprint,
    load_lora,
    load_lora_state_dict,
    lora_disabled,
    lora_merged,
    lora_parameters,
    lora_state_dict,
    lora_summary,
    merge_lora,
    register_lora,
    remove_lora,
    save_lora,
)

from .cases import DEVICES
from .norm_cases import BUFFERS, NORMS, batches, net, same, statistics

each_norm = pytest.mark.parametrize("name", NORMS)
each_device = pytest.mark.parametrize("device", DEVICES)  # on CUDA by cuDNN


@each_device
@each_norm
def test_training_moves_the_copy_as_it_would_move_the_base_to_the_bit(
    name: str, device: str
) -> None:
    plain, model = net(name, device), net(name, device)
    before = statistics(model[0])
    register_lora(model, rank=1)
    for batch in batches(name, device=device):
        assert torch.equal(model(batch), plain(batch))
    assert same(statistics(model[0]), statistics(plain[0]))
    assert same(statistics(model[0]), before) == (name == "synchronised")
    assert same([model[0].parametrizations[n].original for n in BUFFERS], before)


@each_device
@each_norm
def test_off_the_base_has_its_own_statistics(name: str, device: str) -> None:
    model, inputs = net(name, device), batches(name, device=device)
    plain, x = copy.deepcopy(model).eval().requires_grad_(False), inputs[0]
    register_lora(model, rank=1)
    for batch in inputs:
        model(batch)
    model.eval()
    assert torch.equal(model(x), plain(x)) == (name == "synchronised")
    # Torch 2.6's instance norm gives other last digits by where its input happens to lie.
    as_before = torch.allclose if name == "instance norm" else torch.equal
    with lora_disabled(model):
        assert as_before(model(x), plain(x))
        for each in BUFFERS:
            read, original = getattr(model[0], each), model[0].parametrizations[each].original
            assert torch.equal(read, original)
            assert read is not original


@each_norm
def test_training_with_the_adapter_off_moves_nothing(name: str) -> None:
    plain, model = net(name), net(name)
    register_lora(model, rank=1)
    moved, (x, *_) = statistics(model[0]), batches(name)
    with base_frozen(model), lora_disabled(model):
        assert torch.equal(model(x), plain(x))
    assert same(statistics(model[0]), moved)


def test_removing_gives_the_buffers_back_and_merging_puts_the_moved_ones_in() -> None:
    model = net()
    kept, keys, before = list(model[0].buffers()), list(model.state_dict()), fingerprint(model)
    register_lora(model, rank=1)
    for batch in batches():
        model(batch)
    twin, moved = copy.deepcopy(model), statistics(model[0])
    remove_lora(model)
    assert list(map(id, model[0].buffers())) == list(map(id, kept))
    assert list(model.state_dict()) == keys
    assert fingerprint(model) == before
    assert type(model[0]) is nn.BatchNorm1d
    merge_lora(twin)
    assert list(twin.state_dict()) == keys
    assert same(list(twin[0].buffers()), moved)


def test_a_merged_block_reads_the_moved_ones_and_gives_all_back() -> None:
    model = net()
    register_lora(model, rank=1)
    model(batches()[0])
    model.eval()
    x, moved, before = batches()[1], statistics(model[0]), model(batches()[1])
    with lora_merged(model):
        assert type(model[0]) is nn.BatchNorm1d
        torch.testing.assert_close(model(x), before)
        model.train()(x)
    assert same(statistics(model[0]), moved)


@pytest.mark.parametrize("moved", [False, True])
def test_a_plain_checkpoint_goes_into_the_base_and_into_a_copy_that_has_not_moved(
    moved: bool,
) -> None:
    model, other = net(), net()
    other(batches()[1])
    register_lora(model, rank=1)
    if moved:
        model(batches()[0])
    own = statistics(model[0])
    model.load_state_dict(other.state_dict(), strict=True)
    assert same(statistics(model[0]), own if moved else statistics(other[0]))
    assert same([base_state_dict(model)[f"0.{n}"] for n in BUFFERS], statistics(other[0]))
    model(batches()[2])  # moves no memory of the base
    assert same([base_state_dict(model)[f"0.{n}"] for n in BUFFERS], statistics(other[0]))


@pytest.mark.parametrize("adapted", [False, True], ids=["of the base", "adapted"])
def test_a_checkpoint_that_is_older_than_the_count_of_batches_loads(adapted: bool) -> None:
    model = net()
    register_lora(model, rank=1)
    state = copy.deepcopy(dict(model.state_dict() if adapted else base_state_dict(model)))
    state.pop("0.num_batches_tracked", None)  # a plain dictionary has no version either
    model(batches()[0])
    model.load_state_dict(state, strict=True)
    assert base_state_dict(model)["0.num_batches_tracked"] == 3
    assert model[0].num_batches_tracked == (3 if adapted else 4)


def test_states_and_files_carry_them(path: Path) -> None:
    model, twin = net(), net()
    base = copy.deepcopy(model)
    for each in (model, twin):
        register_lora(each, rank=1)
    model(batches()[0])
    moved = statistics(model[0])
    load_lora_state_dict(twin, lora_state_dict(model))
    save_lora(model, path)
    assert load_lora(base, path, base="require") == ["2.weight"]
    for each in (twin, base):
        assert same(statistics(each[0]), moved)
        each(batches()[1])
    assert same(statistics(model[0]), moved)


@pytest.mark.parametrize("registered", [False, True])
def test_a_file_without_them_begins_with_the_bases_and_leaves_these(
    registered: bool, tmp_path: Path
) -> None:
    model, other = net(), net()
    register_lora(model, rank=1)
    model(batches()[0])
    with pytest.warns(UserWarning, match=r"no place for a norm's statistics: .* 0\.running_mean"):
        save_lora(model, tmp_path / "folder", format="peft")
    base = statistics(other[0])
    if registered:
        register_lora(other, rank=1)
        other(batches()[1])
    load_lora(other, tmp_path / "folder", "default")
    assert same(statistics(other[0]), base)
    with base_frozen(other):
        other(batches()[1])
    assert not same(statistics(other[0]), base)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_moves_its_own(twin: Callable[[nn.Module], nn.Module]) -> None:
    model = net()
    register_lora(model, rank=1)
    model(batches()[0])
    moved = statistics(model[0])
    twin(model)(batches()[1])
    assert same(statistics(model[0]), moved)


def test_compiled_training_moves_the_copy_and_switches() -> None:
    plain, model = net(), net()
    before = statistics(model[0])
    register_lora(model, rank=1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for batch in batches():
        compiled(batch), plain(batch)
    torch.testing.assert_close(statistics(model[0]), statistics(plain[0]))
    moved = statistics(model[0])
    disable_lora(model)
    compiled(batches()[0])
    assert same([model[0].parametrizations[n].original for n in BUFFERS], before)
    assert same([model[0].parametrizations[n][0].S for n in BUFFERS], moved)


def test_the_last_of_several_adapters_that_is_on_moves_its_own() -> None:
    model = net()
    for adapter in "ab":
        register_lora(model, rank=1, adapter=adapter)
    first, second = model[0].parametrizations.num_batches_tracked
    model(batches()[0])
    disable_lora(model, "b")
    model(batches()[0])
    model(batches()[0])
    assert (first.S, second.S) == (5, 4)


def test_a_second_call_for_one_adapter_keeps_its_one_copy() -> None:
    model = nn.Sequential(*net(), nn.Linear(2, 2))
    register_lora(model, rank=1, target="2")
    register_lora(model, rank=1, target="3")
    assert len(model[0].parametrizations.running_mean) == 1


def test_the_summary_counts_them() -> None:
    model = net()
    register_lora(model, rank=1)
    summary = lora_summary(model)
    assert [each.name for each in summary.statistics] == [f"0.{name}" for name in BUFFERS]
    assert [each.name for each in summary.weights] == ["2.weight"]
    assert str(summary).endswith("; 3 buffers are moved in copies")


def test_without_them_the_base_moves_after_a_warning_and_the_proof_names_it() -> None:
    model = net()
    with pytest.warns(UserWarning, match=r"0\.running_mean, .*: training moves these"):
        register_lora(model, rank=1, statistics=False)
    with (
        pytest.raises(FrozenError, match=r"0\.running_mean is a buffer, .* eval mode"),
        base_frozen(model),
    ):
        model(batches()[0])
    with base_frozen(model, exclude="0"), base_frozen(model, buffers=False):
        model(batches()[0])


def test_an_exclusion_from_the_proof_that_matches_nothing_is_refused() -> None:
    with (
        pytest.raises(TargetError, match='exclude "nothing" matches no original'),
        base_frozen(net(), exclude="nothing"),
    ):
        pass


def test_an_unfrozen_base_moves_its_own() -> None:
    model = net()
    register_lora(model, rank=1, freeze=False)
    assert type(model[0]) is nn.BatchNorm1d


@pytest.mark.parametrize(
    ("options", "message"),
    [({}, r"0\.running_mean: it is lazy .* statistics=False"), ({"kind": "statistics"}, "kind must be one of")],
)  # fmt: skip
def test_what_they_cannot_be_made_of_is_refused(options: dict[str, str], message: str) -> None:
    model = nn.Sequential(nn.LazyBatchNorm1d(), nn.Linear(4, 2))
    with pytest.raises(LoRAError, match=message):
        register_lora(model, rank=1, target="1", **options)  # type: ignore[arg-type]


@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel_moves_the_copy() -> None:
    plain, model = net(), net()
    before = statistics(model[0])
    register_lora(model, rank=1)
    parallel = nn.parallel.DistributedDataParallel(model)
    for batch in batches():
        parallel(batch).sum().backward()
        plain(batch)
    assert same(statistics(model[0]), statistics(plain[0]))
    assert same([base_state_dict(model)[f"0.{name}"] for name in BUFFERS], before)


FRESH_PROCESS = """
import sys, torch
from torchvision.models import resnet18
from lora_param import load_lora
torch.set_num_threads(1)
torch.manual_seed(0)
model, (x, expected) = resnet18().eval(), torch.load(sys.argv[2])
load_lora(model, sys.argv[1], base="require")
assert torch.equal(model(x), expected)
"""


def test_a_residual_network_trains_and_its_base_stays_and_its_file_says_all(path: Path) -> None:
    torch.manual_seed(0)
    model, x = resnet18(), torch.randn(4, 3, 32, 32)
    base = copy.deepcopy(model).eval().requires_grad_(False)
    register_lora(model, rank=2, target="layer4.*", train="fc")
    optimizer = torch.optim.SGD(lora_parameters(model), lr=0.01)
    with base_frozen(model):
        for _ in range(20):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), torch.arange(4)).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        expected = model(x)
        with lora_disabled(model):
            assert torch.equal(model(x), base(x))
    assert not torch.equal(expected, base(x))
    save_lora(model, path)
    torch.save((x, expected), path.with_suffix(".pt"))
    command = [sys.executable, "-c", FRESH_PROCESS, str(path), str(path.with_suffix(".pt"))]
    subprocess.run(command, check=True)
