"""Models that two processes hold in pieces: training, and all that is done around it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from lora_param import (
    AdapterError,
    FileError,
    LoRAError,
    StateDictError,
    assert_frozen,
    base_frozen,
    base_state_dict,
    fingerprint,
    load_lora,
    load_lora_state_dict,
    lora_disabled,
    lora_merged,
    lora_parameters,
    lora_routed,
    lora_state_dict,
    lora_summary,
    merge_lora,
    register_lora,
    remove_lora,
    save_lora,
    select_lora,
)
from lora_param.sharding import whole

from .cases import shake
from .ranks import Ranks
from .sharded_cases import DATA_PARALLEL, ROWS, WAYS, adapted, net, sharded, split, trained

pytestmark = pytest.mark.skipif(torch.__version__ < "2.7", reason="FSDP2 shards on CUDA alone")


def factors(model: nn.Module) -> dict[str, Tensor]:
    return lora_state_dict(model, full=True)


def rank() -> int:
    return torch.distributed.get_rank()


def assert_same_state(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        assert torch.equal(tensor, expected[name]), name


# Training


def trains(way: str) -> None:
    model = adapted()
    losses, ends = trained(copy.deepcopy(model), halved=False)
    base = fingerprint(model)
    spread = WAYS[way](model)
    got, got_ends = trained(spread, halved=way in DATA_PARALLEL)
    torch.testing.assert_close(got, losses, rtol=0, atol=1e-6)
    for end, expected in zip(got_ends, ends, strict=True):
        torch.testing.assert_close(end, expected, rtol=0, atol=1e-5)
    assert_frozen(getattr(spread, "module", spread), base)


@pytest.mark.parametrize("way", WAYS)
def test_training_in_two_processes_gives_the_losses_of_one(way: str, ranks: Ranks) -> None:
    ranks(trains, way)


# State


def keeps_its_state(way: str) -> None:
    model = adapted()
    state = copy.deepcopy(lora_state_dict(model))
    model = WAYS[way](model)
    assert_same_state(factors(model), state)
    sums = {name: each + 1 if "lora_" in name else each for name, each in state.items()}
    load_lora_state_dict(model, sums)
    assert_same_state(factors(model), sums)
    pieces = {name: each.clone() for name, each in lora_state_dict(model).items()}
    load_lora_state_dict(model, state)
    load_lora_state_dict(model, pieces)
    assert_same_state(factors(model), sums)


SHARDED = [way for way in WAYS if way != "DDP"]


@pytest.mark.parametrize("way", SHARDED)
def test_whole_and_sharded_states_go_out_and_in(way: str, ranks: Ranks) -> None:
    ranks(keeps_its_state, way)


def refuses_a_state_together(way: str) -> None:
    model = WAYS[way](adapted())
    before = factors(model)
    wrong = dict(before)
    if rank() == 1:
        wrong["0.weight.default.lora_A"] = torch.full((3, 6), torch.nan)
    with pytest.raises(StateDictError, match=r"not finite: 0\.weight\.default\.lora_A"):
        load_lora_state_dict(model, wrong)
    assert_same_state(factors(model), before)


@pytest.mark.parametrize("way", ["FSDP2", "tensor parallel"])
def test_what_one_rank_refuses_all_do(way: str, ranks: Ranks) -> None:
    ranks(refuses_a_state_together, way)


# Proof, table, switches


def rows(model: nn.Module) -> list[Any]:
    """Return the table without where each weight is computed, which a sharded one isn't by cost."""
    table = lora_summary(model)
    return [(w.name, w.shape, w.adapters) for w in table.weights] + [str(table).splitlines()[-1]]


def is_itself(way: str) -> None:
    model = adapted()
    x = torch.randn(2, 6)
    base, table, output = fingerprint(model), rows(model), model(x)
    with lora_disabled(model):
        plain = model(x)
    model = WAYS[way](model)
    assert fingerprint(model) == base
    assert rows(model) == table
    with base_frozen(model):
        torch.testing.assert_close(model(x), output)
        with lora_disabled(model):
            torch.testing.assert_close(model(x), plain)
    state = base_state_dict(model)
    assert list(state) == ["0.weight", "0.bias", "2.weight"]
    alone = net()
    alone.load_state_dict({name: whole(each) for name, each in state.items()})
    assert fingerprint(alone) == base


@pytest.mark.parametrize("way", SHARDED)
def test_a_sharded_model_has_the_proof_and_the_table_of_the_whole(way: str, ranks: Ranks) -> None:
    ranks(is_itself, way)


def is_switched(way: str) -> None:
    model = net()
    for seed, name in enumerate("ab"):
        register_lora(model, rank=2, adapter=name)
        torch.manual_seed(seed)
        shake(model)
    x, choices = torch.randn(2, 6), ["a", "b", {"a": 0.5, "b": -1.0}, None]
    expected = []
    for choice in choices:
        select_lora(model, choice)
        expected.append(model(x))
    model = WAYS[way](model)
    for choice, wanted in zip(choices, expected, strict=True):
        select_lora(model, choice)
        torch.testing.assert_close(model(x), wanted)


@pytest.mark.parametrize("way", [way for way in SHARDED if "tensor" not in way])
def test_a_sharded_models_adapters_are_selected(way: str, ranks: Ranks) -> None:
    ranks(is_switched, way)


def computes_in_bfloat16(options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    model = net()
    register_lora(model, rank=3, **options)
    shake(model)
    plain = copy.deepcopy(model).bfloat16()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    x = torch.randn(ROWS, 6)
    y = sharded(model, mp_policy=policy)(x.chunk(2)[rank()])
    torch.testing.assert_close(y, plain(x.bfloat16()).chunk(2)[rank()], rtol=0.02, atol=0.02)
    y.float().square().mean().backward()
    plain(x.bfloat16()).float().square().mean().backward()
    for one, other in zip(lora_parameters(model), lora_parameters(plain), strict=True):
        assert one.dtype is torch.float32
        torch.testing.assert_close(whole(one.grad), other.grad.float(), rtol=0.05, atol=0.01)


@pytest.mark.parametrize("options", [{}, {"kind": "dora"}, {"init": "pissa"}], ids=str)
def test_fsdp_computes_in_bfloat16_and_keeps_the_factors_in_float32(
    options: dict[str, Any], ranks: Ranks
) -> None:
    ranks(computes_in_bfloat16, options)


# Files


def goes_through_a_file(way: str, path: Path, format: str) -> None:
    plain = adapted()
    x, state = torch.randn(2, 6), copy.deepcopy(lora_state_dict(plain))
    output = plain(x)
    model = WAYS[way](plain)
    save_lora(model, path, format=format)
    load_lora_state_dict(model, {n: t * 2 if "lora_" in n else t for n, t in state.items()})
    load_lora(model, path, base="require" if format == "native" else "ignore")
    assert_same_state(factors(model), state)
    other = adapted()
    remove_lora(other)
    load_lora(other, path, base="require" if format == "native" else "ignore")
    torch.testing.assert_close(other(x), output)


@pytest.mark.parametrize("format", ["native", "peft"])
@pytest.mark.parametrize("way", SHARDED)
def test_a_sharded_models_adapter_is_a_file_like_any_other(
    way: str, format: str, ranks: Ranks, tmp_path: Path
) -> None:
    ranks(goes_through_a_file, way, tmp_path / "adapter", format)


def fails_to_save_together(path: Path) -> None:
    model = sharded(adapted())
    with pytest.raises(FileError, match="nowhere"):
        save_lora(model, path)
    with pytest.raises(AdapterError, match="there is no weight with an adapter 'b'"):
        save_lora(model, path, adapter="b")


def test_what_the_first_rank_cannot_write_fails_on_all(ranks: Ranks, tmp_path: Path) -> None:
    ranks(fails_to_save_together, tmp_path / "nowhere" / "adapter.safetensors")


def fails_to_load_together(path: Path) -> None:
    model = sharded(adapted())
    before = factors(model)
    save_lora(model, path)
    with pytest.raises(FileError, match="nowhere"):
        load_lora(model, path if rank() else path.with_name("nowhere"))
    assert_same_state(factors(model), before)


def test_what_one_rank_cannot_read_fails_on_all(ranks: Ranks, path: Path) -> None:
    ranks(fails_to_load_together, path)


# The structure


def changes_no_structure() -> None:
    model = sharded(adapted())
    verbs: list[Any] = [merge_lora, remove_lora, lambda m: register_lora(m, adapter="b")]
    verbs += [lambda m: lora_merged(m).__enter__()]
    verbs += [lambda m: lora_routed(m, ["default", None]).__enter__()]
    for verb in verbs:
        with pytest.raises(LoRAError, match=r"shards: .*; call this before sharding, or on an uns"):
            verb(model)
    model.unshard()
    with pytest.raises(LoRAError, match="register_lora can't be called on what FSDP shards"):
        register_lora(model[2], adapter="b")  # whole for now, and no FSDPModule itself


def test_what_fsdp_shards_keeps_its_parameters(ranks: Ranks) -> None:
    ranks(changes_no_structure)


def is_taken_apart(verb: str) -> None:
    plain = adapted()
    x, output, base = torch.randn(2, 6), plain(torch.ones(2, 6)), fingerprint(plain)
    model = split(copy.deepcopy(plain))
    with lora_merged(model):
        torch.testing.assert_close(model(torch.ones(2, 6)), output)
    if verb == "merge":
        merge_lora(model)
        torch.testing.assert_close(model(x), plain(x))
    else:
        remove_lora(model)
        assert fingerprint(model) == base
        with lora_disabled(plain):
            torch.testing.assert_close(model(x), plain(x))
    assert [tuple(each.shape) for each in model.parameters()] == [(8, 6), (8,), (5, 8)]


@pytest.mark.parametrize("verb", ["merge", "remove"])
def test_a_tensor_parallel_models_adapter_is_merged_and_removed(verb: str, ranks: Ranks) -> None:
    ranks(is_taken_apart, verb)


def is_laid_out() -> dict[str, Tensor]:
    model = split(adapted())
    torch.manual_seed(rank())
    register_lora(model, rank=4, adapter="b")
    state = lora_state_dict(model, "b").items()
    assert {name: str(*each.placements) for name, each in state if "lora_" in name} == {
        "0.weight.b.lora_A": "R",
        "0.weight.b.lora_B": "S(0)",
        "2.weight.b.lora_A": "S(1)",
        "2.weight.b.lora_B": "R",
    }
    return {name: each for name, each in factors(model).items() if "lora_" in name}


def test_factors_lie_as_their_weight_does_and_are_drawn_once(ranks: Ranks) -> None:
    first, second = ranks(is_laid_out)
    assert_same_state(first, second)
