"""Files of the image generators' world, against the real diffusers and LyCORIS."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from lycoris import create_lycoris, create_lycoris_from_weights
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from lora_param import load_lora, register_lora, save_lora

from .cases import shake

TOKENS = torch.arange(10).view(2, 5)
TARGETS = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in"],
    "text_encoder": ["q_proj", "out_proj", "fc1"],
}
PARTS = list(TARGETS)


@functools.cache
def made() -> nn.ModuleDict:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=2,
    )
    config = CLIPTextConfig(
        vocab_size=20,
        hidden_size=12,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
    )
    return nn.ModuleDict({"unet": unet, "text_encoder": CLIPTextModel(config)}).eval()


def pipeline() -> nn.ModuleDict:
    return copy.deepcopy(made())


@torch.no_grad()
def images(parts: nn.ModuleDict) -> Tensor:
    hidden = parts["text_encoder"](TOKENS).last_hidden_state
    noise = torch.linspace(-1, 1, 512).view(2, 4, 8, 8)
    result: Tensor = parts["unet"](noise, torch.tensor([3, 9]), hidden).sample
    return result


def trained(alpha: float) -> tuple[nn.ModuleDict, dict[str, Any]]:
    """Adapt both parts as diffusers does; return what it takes to save them."""
    parts, saved = pipeline(), {}
    for part, model in parts.items():
        config = LoraConfig(r=4, lora_alpha=alpha, target_modules=TARGETS[part])
        inject_adapter_in_model(config, model)  # as its add_adapter does, with any release of PEFT
        for name, each in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(each, std=0.1)
        saved[f"{part}_lora_layers"] = get_peft_model_state_dict(model, adapter_name="default")
        saved[f"{part}_lora_adapter_metadata"] = config.to_dict()
    return parts, saved


def close(found: Tensor, expected: Tensor) -> None:
    assert not torch.allclose(expected, images(made()), atol=1e-2)  # the adapter does something
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("with_config", [True, False])
def test_what_diffusers_writes_loads(with_config: bool, tmp_path: Path) -> None:
    # Without its config a file has no alpha, which then means the rank.
    theirs, saved = trained(alpha=6 if with_config else 4)
    kept = {name: each for name, each in saved.items() if with_config or "metadata" not in name}
    StableDiffusionPipeline.save_lora_weights(tmp_path, **kept)
    ours = pipeline()
    names = load_lora(ours, tmp_path / "pytorch_lora_weights.safetensors")
    assert {name.partition(".")[0] for name in names} == set(PARTS)
    close(images(ours), images(theirs))


def test_what_diffusers_writes_loads_into_one_part(tmp_path: Path) -> None:
    theirs, saved = trained(alpha=6)
    StableDiffusionPipeline.save_lora_weights(tmp_path, **saved)
    ours = pipeline()
    for part, model in ours.items():
        load_lora(model, tmp_path / "pytorch_lora_weights.safetensors", prefix=f"{part}.")
    close(images(ours), images(theirs))


def test_what_we_write_loads_in_diffusers(tmp_path: Path) -> None:
    ours, theirs, file = pipeline(), pipeline(), tmp_path / "lora.safetensors"
    register_lora(
        ours, rank=3, alpha=5.0, target=[name for part in TARGETS.values() for name in part]
    )
    shake(ours)
    save_lora(ours, file, format="kohya")
    tensors, alphas = StableDiffusionPipeline.lora_state_dict(
        file, unet_config=theirs["unet"].config
    )
    loading = {"state_dict": tensors, "network_alphas": alphas}
    StableDiffusionPipeline.load_lora_into_unet(**loading, unet=theirs["unet"])
    StableDiffusionPipeline.load_lora_into_text_encoder(
        **loading, text_encoder=theirs["text_encoder"], prefix="text_encoder"
    )
    close(images(theirs), images(ours))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.pointwise = nn.Conv2d(6, 6, 1)
        self.block = nn.ModuleDict({"q_proj": nn.Linear(6, 8), "out": nn.Linear(8, 5)})
        self.last = nn.Conv1d(5, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pointwise(self.conv(x)).flatten(2).mT
        result: Tensor = self.last(self.block["out"](self.block["q_proj"](x).tanh()).mT)
        return result


def nets() -> tuple[Net, Net]:
    torch.manual_seed(0)
    net = Net().eval()
    return net, copy.deepcopy(net)


def test_what_lycoris_writes_loads(tmp_path: Path) -> None:
    (theirs, ours), x, file = nets(), torch.randn(2, 3, 4, 4), tmp_path / "lora.safetensors"
    ranks = {"linear_dim": 3, "linear_alpha": 2.0, "conv_dim": 2, "conv_alpha": 1.5}
    network = create_lycoris(theirs, 1.0, **ranks, algo="lora")
    network.apply_to()
    for factor in (each for lora in network.loras for each in lora.parameters()):
        nn.init.normal_(factor, std=0.3)
    network.save_weights(str(file), None, {})
    base = ours(x)
    assert len(load_lora(ours, file)) == len(network.loras) == 5
    assert not torch.allclose(base, ours(x), atol=1e-2)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_what_we_write_loads_in_lycoris(tmp_path: Path) -> None:
    (theirs, ours), x, file = nets(), torch.randn(2, 3, 4, 4), tmp_path / "lora.safetensors"
    base = ours(x)
    register_lora(ours, rank=2, alpha=3.0)
    shake(ours)
    save_lora(ours, file, format="kohya")
    network, _ = create_lycoris_from_weights(1.0, str(file), theirs)
    network.apply_to()
    assert not torch.allclose(base, ours(x), atol=1e-2)
    torch.testing.assert_close(theirs(x), ours(x), rtol=1e-4, atol=1e-5)


class Normed(Net):
    """The same between norms, which LyCORIS trains whole."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.GroupNorm(1, 3), nn.LayerNorm(2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.after(super().forward(self.before(x))[..., :2])
        return result


def test_what_lycoris_trains_whole_loads_and_goes_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x, file = Normed().eval(), torch.randn(2, 3, 4, 4), tmp_path / "full.safetensors"
    theirs, ours, again = (copy.deepcopy(base) for _ in range(3))
    network = create_lycoris(theirs, 1.0, linear_dim=2, algo="full", train_norm=True)
    network.apply_to()
    for each in network.parameters():
        each.data += torch.randn_like(each) / 9
    network.save_weights(str(file), None, {})
    names = [name for name, _ in base.named_parameters()]
    assert sorted(load_lora(ours, file)) == sorted(names)
    assert not torch.allclose(base(x), ours(x), atol=1e-2)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    save_lora(ours, file, format="kohya")
    network, _ = create_lycoris_from_weights(1.0, str(file), again)
    network.apply_to()
    torch.testing.assert_close(again(x), ours(x), rtol=1e-4, atol=1e-5)
