"""What is done around statistics deltas: merging, sharing, resetting, replacing, subclasses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F  # noqa: N812 as everybody calls it
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lora_param import (
    LoRAError,
    TargetError,
    assert_frozen,
    base_frozen,
    disable_lora,
    enable_lora,
    fingerprint,
    load_lora,
    lora_disabled,
    lora_state_dict,
    merge_lora,
    register_lora,
    remove_lora,
    save_lora,
)

from .norm_cases import batches, net, same, statistics


def twice_adapted() -> nn.Module:
    """A network with two adapters, each of which has moved its own statistics."""
    model = net()
    for adapter, batch in zip("ab", batches(), strict=False):
        register_lora(model, rank=1, adapter=adapter)
        model(batch)
    return model.eval()


@pytest.mark.parametrize("merged", ["a", "b"])
def test_merging_one_of_two_keeps_the_output_however_the_other_is_switched(merged: str) -> None:
    model, x = twice_adapted(), batches()[2]
    other = "b" if merged == "a" else "a"
    with lora_disabled(model, other):
        alone = model(x)
    both = model(x)
    merge_lora(model, merged)
    torch.testing.assert_close(model(x), both)
    with lora_disabled(model, other):
        torch.testing.assert_close(model(x), alone)


def test_training_after_a_merge_moves_no_state_that_was_taken_before() -> None:
    model = net()
    register_lora(model, rank=1)
    model(batches()[0])
    state = lora_state_dict(model)
    before = copy.deepcopy(state)
    merge_lora(model)
    model(batches()[1])
    assert all(torch.equal(state[name], before[name]) for name in state)


def test_norms_that_share_their_statistics_are_refused_with_the_way_out() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[2].running_var = model[0].running_var
    with pytest.raises(
        TargetError, match=r"2\.running_var is the same buffer, .* statistics=False"
    ):
        register_lora(model, rank=1)
    with pytest.warns(UserWarning, match="training moves these buffers"):
        assert register_lora(model, rank=1, statistics=False) == ["1.weight"]


def test_a_norm_found_at_two_places_moves_its_one_copy_at_both() -> None:
    plain, model = nn.Sequential(*[nn.BatchNorm1d(4)] * 2), nn.Sequential(*[nn.BatchNorm1d(4)] * 2)
    register_lora(model, target=(), train="0")
    for batch in batches():
        assert torch.equal(model(batch), plain(batch))
    assert same(statistics(model[0]), statistics(plain[0]))


class Clipped(nn.BatchNorm1d):
    """A norm whose variance is read through a property."""

    @property
    def running_var(self) -> Tensor:  # type: ignore[override]
        return self._buffers["running_var"].clamp(min=1)


class FromTable(nn.BatchNorm1d):
    """A norm that takes what it moves out of torch's tables."""

    def forward(self, x: Tensor) -> Tensor:
        mean, var = (self._buffers[name] for name in ("running_mean", "running_var"))
        return F.batch_norm(x, mean, var, training=self.training)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Clipped, r"0\.running_var: reading it gives something else than"),
        (FromTable, r"0\.running_mean: FromTable\.forward takes it out of _buffers"),
    ],
)
def test_a_buffer_that_no_copy_could_stand_for_is_refused_with_the_way_out(
    kind: type[nn.Module], message: str, path: Path
) -> None:
    model = nn.Sequential(net()[0], nn.Linear(4, 2))
    register_lora(model, target="1")
    save_lora(model, path)
    model = nn.Sequential(net()[0], nn.Linear(4, 2))
    model[0].__class__ = kind
    for adapt in (register_lora, partial(load_lora, path=path)):
        with pytest.raises(LoRAError, match=message):
            adapt(model)
        assert type(model[1]) is nn.Linear
    with pytest.warns(UserWarning, match="training moves these buffers"):
        assert register_lora(model, target="1", statistics=False) == ["1.weight"]


def test_resetting_the_statistics_resets_the_copy_and_never_the_base() -> None:
    model = net()
    register_lora(model, rank=1)
    before = fingerprint(model)
    model[0].reset_running_stats()
    assert statistics(model[0])[2] == 0
    for mode in (True, False):
        with lora_disabled(model), pytest.raises(LoRAError, match=r"reset: .* enable_lora"):
            update_bn(batches(), model.train(mode))
    assert_frozen(model, before)


def test_without_copies_a_reset_is_the_bases_own() -> None:
    model = net()
    register_lora(model, target=(), train="0", freeze=False)
    model[0].reset_running_stats()
    assert model[0].num_batches_tracked == 0


def test_weight_averaging_finds_the_statistics_it_would_find_and_leaves_the_base() -> None:
    plain, model = net(), net()
    register_lora(model, rank=1)
    before = fingerprint(model)
    averages = [AveragedModel(each, use_buffers=True) for each in (plain, model)]
    for batch in batches():
        for each, average in zip((plain, model), averages, strict=True):
            each(batch)
            average.update_parameters(each)
    assert_frozen(averages[1].module, before)
    assert same(*(statistics(average.module[0]) for average in averages))
    for average in averages:
        update_bn(batches(), average)
    assert_frozen(averages[1].module, before)
    assert same(*(statistics(average.module[0]) for average in averages))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_moves_the_copy_as_it_would_move_the_base(reentrant: bool) -> None:
    plain, model = net(), net()
    register_lora(model, rank=1)
    for model_ in (plain, model):
        for batch in batches():
            x = batch.clone().requires_grad_()
            checkpoint(model_, x, use_reentrant=reentrant).sum().backward()
    assert same(statistics(model[0]), statistics(plain[0]))


def test_what_replaces_an_adapted_norm_is_named_by_the_next_verb() -> None:
    model = net()
    register_lora(model, rank=1)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for verb in (remove_lora, merge_lora, disable_lora, fingerprint):
        with pytest.raises(
            LoRAError, match="0: the adapters are in a SyncBatchNorm that has taken"
        ):
            verb(converted)


@pytest.mark.parametrize("value", [None, torch.zeros(4)])
def test_assigning_a_moved_buffer_is_refused_with_its_own_reason(value: Tensor | None) -> None:
    model = net()
    register_lora(model, rank=1)
    with pytest.raises(LoRAError, match="running_mean: can't assign to an adapter's copy of a buf"):
        model[0].running_mean = value


class Wrapped(nn.BatchNorm1d):
    """A norm whose forward does something around the stock one."""

    around: Any = None

    def forward(self, x: Tensor) -> Tensor:
        forward = super().forward
        return self.around(forward, x) if self.around else forward(x)


class Written(nn.BatchNorm1d):
    """A norm with a forward of its own, which reads what it moves several times."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
            share = 1 / float(self.num_batches_tracked)
            with torch.no_grad():
                self.running_mean.lerp_(x.mean(0), share)
                self.running_var.lerp_(x.var(0), share)
        y = F.batch_norm(x, self.running_mean, self.running_var)
        return y * self.weight + self.bias


class Added(nn.BatchNorm1d):
    """A norm that moves its mean as detectron2's NaiveSyncBatchNorm does."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked += 1
            self.running_mean += (x.mean(0) - self.running_mean) / self.num_batches_tracked
        return x - self.running_mean


@pytest.mark.parametrize("kind", [Wrapped, Written, Added])
@pytest.mark.parametrize("adapted", [True, False], ids=["on", "off"])
def test_a_subclass_with_its_own_forward_behaves_as_ever(
    kind: Callable[..., nn.Module], adapted: bool
) -> None:
    plain, model = (nn.Sequential(kind(4, momentum=None)) for _ in range(2))
    register_lora(model, target=(), train="0")
    if not adapted:
        disable_lora(model)
    with base_frozen(model):
        for batch in batches():
            fresh = plain if adapted else copy.deepcopy(plain)
            assert torch.equal(model(batch), fresh(batch))
        assert torch.equal(model.eval()(batch), plain.eval()(batch))
    enable_lora(model)
    assert same(statistics(model[0]), statistics(plain[0]))


def test_a_forward_that_learns_between_two_calls_of_the_stock_one_sees_what_it_learned() -> None:
    model, x = nn.Sequential(Wrapped(4)), batches()[0]
    norm = model[0]
    register_lora(model, target=(), train="0")

    def inside(stock: Any, x: Tensor) -> Any:
        stock(x)
        norm.parametrizations.weight[0].D.data.fill_(1.0)
        return stock(x)

    expected = 2 * norm(x)
    norm.around = inside
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, Written])
def test_compiled_training_of_a_cumulative_average_with_the_adapter_off_behaves_as_ever(
    kind: Callable[..., nn.Module],
) -> None:
    plain, model = (nn.Sequential(kind(4, momentum=None)) for _ in range(2))
    register_lora(model, target=(), train="0")
    compiled = torch.compile(model, backend="aot_eager")
    with base_frozen(model), lora_disabled(model):
        for batch in batches():
            torch.testing.assert_close(compiled(batch), copy.deepcopy(plain)(batch))


def test_a_parent_that_moves_what_it_reads_of_a_norm_in_eval_mode_moves_no_base() -> None:
    plain, model, x = net(), net(), batches()[0]
    register_lora(model, rank=1)
    for norm in (plain[0].eval(), model[0].eval()):
        F.batch_norm(x, norm.running_mean, norm.running_var, training=True)
    assert same(statistics(model[0])[:2], statistics(plain[0])[:2])
    with base_frozen(model), lora_disabled(model):
        F.batch_norm(x, model[0].running_mean, model[0].running_var, training=True)
    assert same(statistics(model[0])[:2], statistics(plain[0])[:2])


def test_in_a_cached_block_training_with_the_adapter_off_moves_nothing_that_eval_reads() -> None:
    model, x = net(), batches()[0]
    plain = copy.deepcopy(model).eval()
    register_lora(model, rank=1)
    disable_lora(model)
    with parametrize.cached():
        norm = model[0]
        F.batch_norm(x, norm.running_mean, norm.running_var, training=True)
        model.eval()
        assert same(statistics(norm), statistics(plain[0]))


def test_statistics_of_another_shape_are_refused(tmp_path: Path) -> None:
    source = nn.Sequential(nn.Linear(3, 4), nn.Identity(), nn.BatchNorm1d(4))
    other = nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (2, 2)), nn.BatchNorm1d(2))
    register_lora(source, rank=1)
    source(torch.randn(5, 3))
    with pytest.warns(UserWarning, match="never trained"):
        save_lora(source, tmp_path / "adapter.safetensors")
    with pytest.raises(LoRAError, match=r"2.running_mean: its S is \(4,\), should be \(2,\)"):
        load_lora(other, tmp_path / "adapter.safetensors")


class CudnnCalls(TorchDispatchMode):
    """The running mean and variance that each call of cuDNN's batch norm gets."""

    def __init__(self) -> None:
        super().__init__()
        self.statistics: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.cudnn_batch_norm.default:
            self.statistics.append(args[3:5])
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(
    not torch.backends.cudnn.is_available() or torch.__version__ < (2, 14),
    reason="needs cuDNN's operators for tensors of a GPU that isn't there, which end torch 2.6",
)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_cudnn_gets_the_copies_to_move_and_never_the_bases(dims: int) -> None:
    with FakeTensorMode():  # which calls what a GPU would be asked to do
        kind = getattr(nn, f"BatchNorm{dims}d")
        model = nn.Sequential(nn.Identity(), kind(3, device="cuda"))
        register_lora(model, target=(), train="1")
        x, norm = torch.randn(2, 3, *[4] * dims, device="cuda"), model[1]
        own = [norm.parametrizations[name][0].S for name in ("running_mean", "running_var")]
        bases = [norm.parametrizations[name].original for name in ("running_mean", "running_var")]
        with CudnnCalls() as calls:
            model(x)
            disable_lora(model)
            model(x)
    (mean, variance), spared = calls.statistics
    assert mean is own[0]
    assert variance is own[1]
    assert not {*map(id, spared)} & {*map(id, (*own, *bases))}
