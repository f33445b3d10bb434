"""Models as image generators have them, and files for them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn


class UNet(nn.Module):
    """Names as a Stable Diffusion's UNet has them, with an underscore inside."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, 6, 3, padding=1)
        self.mid = nn.ModuleDict({"attn1": Projections(6), "conv_out": nn.Conv2d(6, 4, 1)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        x = self.mid["attn1"](x.movedim(1, -1)).movedim(-1, 1)
        return self.mid["conv_out"](x)


class Projections(nn.Module):
    """The layers of an attention, in a row."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(width, width), nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)])

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out[0](self.to_k(self.to_q(x)))


class CLIPText(nn.Module):
    """Names as a text encoder has them."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict({"q_proj": nn.Linear(6, 6), "out_proj": nn.Linear(6, 6)})

    def forward(self, x: Tensor) -> Tensor:
        return self.self_attn["out_proj"](self.self_attn["q_proj"](x))


def pipeline() -> nn.ModuleDict:
    return nn.ModuleDict({"unet": UNet(), "text_encoder": CLIPText()})


def linear(name: str, rank: int = 2, alpha: float | None = None) -> dict[str, Tensor]:
    tensors = {
        f"{name}.lora_down.weight": torch.randn(rank, 6),
        f"{name}.lora_up.weight": torch.randn(6, rank),
    }
    return tensors if alpha is None else tensors | {f"{name}.alpha": torch.tensor(alpha)}


def saved(folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file(tensors, folder / "lora.safetensors", metadata)
    return folder / "lora.safetensors"


def update(model: nn.Module, path: str, name: str = "weight") -> Tensor:
    """Return what an adapter adds to a weight."""
    module = model.get_submodule(path)
    return getattr(module, name) - module.parametrizations[name].original
