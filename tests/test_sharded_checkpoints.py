"""Models that two processes hold in pieces: from the meta device, and in torch's checkpoints."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import fully_shard

from lora_param import (
    fingerprint,
    load_lora_state_dict,
    lora_state_dict,
    lora_summary,
    register_lora,
)

from .cases import shake
from .ranks import Ranks
from .sharded_cases import adapted, net, sharded

pytestmark = pytest.mark.skipif(torch.__version__ < "2.7", reason="FSDP2 shards on CUDA alone")


def factors(model: nn.Module) -> dict[str, Tensor]:
    return lora_state_dict(model, full=True)


def rank() -> int:
    return torch.distributed.get_rank()


def assert_same_state(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        assert torch.equal(tensor, expected[name]), name


def comes_from_meta(options: dict[str, Any]) -> dict[str, Tensor]:
    torch.manual_seed(5)
    plain = net()
    register_lora(model := net("meta"), rank=3)
    sharded(model).to_empty(device="cpu")
    state = dict(plain.state_dict())
    if options.get("broadcast_from_rank0") and rank():
        state = {}
    options = {"full_state_dict": True, **options}
    loaded = set_model_state_dict(model, state, options=StateDictOptions(**options))
    assert not any(loaded)
    assert fingerprint(model) == fingerprint(plain)
    x = torch.randn(2, 6)
    torch.testing.assert_close(model(x), plain(x))
    found = factors(model)
    assert all(found[f"{name}.weight.default.lora_A"].std() > 0 for name in (0, 2))
    return found


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("broadcast", [True, False])
def test_a_model_from_meta_is_sharded_and_takes_a_plain_base(
    strict: bool, broadcast: bool, ranks: Ranks
) -> None:
    options = {"strict": strict, "broadcast_from_rank0": broadcast}
    first, second = ranks(comes_from_meta, options)
    assert_same_state(first, second)
    drawn = first["0.weight.default.lora_A"]
    assert torch.linalg.matrix_rank(drawn) == 3  # no rank's rows are another's


def is_checkpointed() -> None:
    model = sharded(adapted())
    before = factors(model)
    options = StateDictOptions(ignore_frozen_params=True)
    state = get_model_state_dict(model, options=options)
    assert all("lora_" in name or "_extra_state" in name for name in state)
    kept = copy.deepcopy({name: each.clone() for name, each in state.items()})
    load_lora_state_dict(
        model, {name: each * 2 if "lora_" in name else each for name, each in before.items()}
    )
    set_model_state_dict(model, kept, options=StateDictOptions(strict=False))
    assert_same_state(factors(model), before)


def test_a_distributed_checkpoint_of_what_is_trained_is_the_adapter(ranks: Ranks) -> None:
    ranks(is_checkpointed)


def shards_a_layer() -> None:
    layer = nn.Linear(6, 4)
    register_lora(layer, rank=2)
    shake(layer)
    x = torch.randn(3, 6)
    expected = layer(x)
    fully_shard(layer, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (2,)))
    torch.testing.assert_close(layer(x), expected)
    assert lora_summary(layer).weights[0].space != "weight"


def test_a_whole_layer_can_be_sharded_by_itself(ranks: Ranks) -> None:
    ranks(shards_a_layer)
