"""Models, what the real PEFT adapts of them, and folders that it saves."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class Experts(nn.Module):
    """Two stacks in one module, around which PEFT nests its wrappers."""

    is_transposed = False

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 6, 4) / 2)
        self.gate = nn.Parameter(torch.randn(6, 4) / 2)
        self.down = nn.Parameter(torch.randn(3, 4, 6) / 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("eoi,...i->...eo", self.up, x) * (x @ self.gate.T)[..., None, :]
        return torch.einsum("eoi,...ei->...o", self.down, hidden)


class SquareExperts(Experts):
    """Stacks whose shapes don't say which side is which."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 4, 4) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("eoi,...i->...eo", self.up, x)


class TransposedExperts(nn.Module):
    """A stack stored (in, out), as some of transformers' are."""

    is_transposed = True

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 4, 6) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("eio,...i->...eo", self.up, x)


def chain(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*(copy.deepcopy(layer) for layer in layers))


class Attention(nn.Module):
    """Attention between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 3)
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(self.attention(x, x, x, need_weights=False)[0])


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=17, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=17, n_positions=9, n_embd=8, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
        image_size=8, patch_size=4, num_labels=3,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=17, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=9, num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        vocab_size=17, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=4,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


@dataclass(frozen=True)
class Case:
    """A model, what PEFT adapts of it, and what that is called here."""

    id: str
    make: Callable[[], nn.Module]
    make_input: Callable[[], Tensor]
    target: list[str]
    parameters: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)

    def base(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make().eval()

    def config(self, **options: Any) -> LoraConfig:
        shared = {"r": 2, "lora_alpha": 3, "target_modules": self.target}
        return LoraConfig(
            **shared | {"target_parameters": self.parameters or None} | self.options | options
        )


def floats(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape)


def tokens(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, 9, shape)


FUSED = hasattr(transformers.models.mixtral.modeling_mixtral, "MixtralExperts")

CASES = [
    Case("linear", chain(nn.Linear(6, 5), nn.Linear(5, 4)), floats(3, 6), ["0", "1"]),
    Case("rank and alpha patterns", chain(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 6)), floats(3, 6), ["0", "1", "2"], options={"rank_pattern": {"1": 3, r"\d": 1}, "alpha_pattern": {"^2": 0.5}}),
    Case("rslora", chain(nn.Linear(6, 5), nn.Linear(5, 4)), floats(3, 6), ["0", "1"], options={"use_rslora": True, "rank_pattern": {"1": 3}}),
    Case("conv1d", chain(nn.Conv1d(4, 5, 3, stride=2, padding=1)), floats(2, 4, 7), ["0"]),
    Case("conv2d", chain(nn.Conv2d(4, 5, (1, 3), stride=(2, 1))), floats(2, 4, 7, 7), ["0"]),
    Case("conv2d 1x1", chain(nn.Conv2d(4, 5, 1)), floats(2, 4, 3, 3), ["0"]),
    Case("conv3d", chain(nn.Conv3d(3, 4, 2)), floats(2, 3, 4, 4, 4), ["0"]),
    Case("embedding", chain(nn.Embedding(9, 4, padding_idx=2), nn.Linear(4, 3)), tokens(2, 5), ["0", "1"]),
    Case("attention", Attention, floats(5, 2, 8), ["fc1", "attention"]),
    Case("transformers Conv1D", chain(Conv1D(5, 6), Conv1D(4, 5)), floats(3, 6), ["0", "1"]),
    Case("Conv1D and Linear", chain(Conv1D(5, 6), nn.Linear(5, 4)), floats(3, 6), ["0", "1"]),
    Case("experts", chain(nn.Linear(4, 4), Experts()), floats(2, 4), ["0"], ["1.down", "1.up"]),
    Case("three of one module", chain(Experts()), floats(2, 4), [], ["0.up", "0.gate", "0.down"], {"rank_pattern": {"up": 3}}),
    Case("square experts", chain(SquareExperts()), floats(2, 4), [], ["0.up"]),
    Case("transposed experts", chain(TransposedExperts()), floats(2, 4), [], ["0.up"]),
    Case("Llama", llama, tokens(2, 5), ["q_proj", "v_proj", "down_proj", "lm_head"]),
    Case("Llama with embeddings", llama, tokens(2, 5), ["embed_tokens", "q_proj"]),
    Case("GPT-2", gpt2, tokens(2, 5), ["c_attn", "c_proj", "wpe"]),
    Case("ViT", vit, floats(2, 3, 8, 8), ["projection", "classifier"]),
    *([Case("Mixtral", mixtral, tokens(2, 5), ["q_proj"], ["experts.gate_up_proj", "experts.down_proj"])] if FUSED else []),
]  # fmt: skip


@contextmanager
def quiet() -> Iterator[None]:
    """Let PEFT warn; what we warn of is tested where it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad(), quiet():
        result = model(x)
    result = getattr(result, "logits", result)
    return result[0] if isinstance(result, tuple) else result


def trained_in_peft(case: Case, folder: Path, **options: Any) -> tuple[nn.Module, PeftModel]:
    """Return a base, and what PEFT made of a copy of it and saved."""
    base = case.base()
    with quiet():
        model = get_peft_model(copy.deepcopy(base), case.config(**options)).eval()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape).to(parameter) / 3
        model.save_pretrained(folder)
    return base, model


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


LINEAR = CASES[0]
PREFIX = "base_model.model."


def edit_config(folder: Path, **fields: Any) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(config_of(folder) | fields))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
