"""What the benchmark compares: models with inputs, and ways of training them."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

import lora_param as lp


@dataclass(frozen=True)
class Cell:
    """One model, what it is fed, and what gets an adapter.

    Attributes:
        name: What the table calls it.
        make: Builds the model.
        shape: Of the input, which is random and requires a gradient.
        rank: The adapters' rank.
        layers: Names of the adapted modules, by their ends.
        quick: Whether `--quick` keeps it.
        kind: Of adapter; ways that have no other than `"lora"` are left out.
    """

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    rank: int
    layers: tuple[str, ...]
    quick: bool = False
    kind: str = "lora"

    def adapted(self, model: nn.Module) -> list[str]:
        """List the adapted modules' names, `["0", "2"]`."""
        ends = tuple(f".{layer}" for layer in self.layers)
        return [name for name, _ in model.named_modules() if f".{name}".endswith(ends)]


class Lookup(nn.Module):
    """A large vocabulary in front of a head; the input, `[tokens]`, is rounded to indices."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.words, self.embedding = words, nn.Embedding(words, width)
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Return `[tokens, width]`; the gradient reaches at least the embedding's output."""
        y: Tensor = self.embedding((x.detach().abs() * 1e4).long() % self.words)
        y = y if y.requires_grad or not torch.is_grad_enabled() else y.requires_grad_()
        result: Tensor = self.head(y)
        return result


class Decoder(nn.Module):
    """A Llama of transformers with random weights, fed with embeddings `[batch, length, 256]`."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaModel

        sizes: dict[str, Any] = {
            "hidden_size": 256,
            "intermediate_size": 688,
            "num_hidden_layers": 4,
        }
        self.llama = LlamaModel(LlamaConfig(**sizes, vocab_size=100, num_attention_heads=4))

    def forward(self, x: Tensor) -> Tensor:
        """Return the last hidden state, of the input's shape."""
        state: Tensor = self.llama(inputs_embeds=x, use_cache=False).last_hidden_state
        return state


def linears(width: int) -> nn.Module:
    """Stack four square layers, each with a GELU."""
    return nn.Sequential(*[each for _ in range(4) for each in (nn.Linear(width, width), nn.GELU())])


def convolutions() -> nn.Module:
    """Stack four convolutions, two of which halve the image."""
    sizes = ((3, 32, 1), (32, 64, 2), (64, 128, 2), (128, 128, 1))
    layers = [(nn.Conv2d(a, b, 3, stride, 1), nn.ReLU()) for a, b, stride in sizes]
    return nn.Sequential(*[each for pair in layers for each in pair])


def blocks() -> nn.Module:
    """Stack two of torch's own transformer layers."""
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
    return nn.Sequential(layer, copy.deepcopy(layer))


GRID = {
    64: ((1, 16, 128, 1024, 4096), (4, 16, 64)),
    256: ((1, 16, 128, 1024, 4096), (4, 16, 64)),
    1024: ((1, 16, 128, 1024), (4, 16, 64)),
    2048: ((1, 16, 128, 512), (4, 16, 64)),
}
"""Width: tokens, ranks."""

EVEN, TABLE, BLOCK = ("0", "2", "4", "6"), ("embedding",), ("self_attn", "linear1", "linear2")
LLAMA = tuple(f"{each}_proj" for each in ("q", "k", "v", "o", "gate", "up", "down"))

QUICK = ((64, 16, 4), (256, 128, 16), (1024, 1, 16), (1024, 128, 16))


def cells() -> list[Cell]:
    """List all cells, that of transformers only where it is installed."""
    found = [
        Cell(
            f"Linear {width}, {tokens} tokens, rank {rank}",
            lambda width=width: linears(width),  # type: ignore[misc]
            (tokens, width),
            rank,
            EVEN,
            (width, tokens, rank) in QUICK,
        )
        for width, (counts, ranks) in GRID.items()
        for tokens in counts
        for rank in ranks
    ]
    found += [
        Cell("convolutions, 8 images", convolutions, (8, 3, 64, 64), 8, EVEN, True),
        Cell("embedding 50,000 x 256", lambda: Lookup(50_000, 256), (512,), 8, TABLE, True),
        Cell("transformer, 4 x 64", blocks, (4, 64, 256), 8, BLOCK, True),
    ]
    found += [
        Cell(name, lambda: linears(1024), (tokens, 1024), 16, EVEN, tokens == 1024, "dora")
        for tokens in (1, 128, 1024)
        for name in [f"DoRA, Linear 1024, {tokens} tokens, rank 16"]
    ]
    found += [
        Cell("DoRA, convolutions, 8 images", convolutions, (8, 3, 64, 64), 8, EVEN, False, "dora"),
        Cell("DoRA, embedding", lambda: Lookup(50_000, 256), (512,), 8, TABLE, False, "dora"),
    ]
    if importlib.util.find_spec("transformers"):
        found.append(Cell("Llama, 2 x 64", Decoder, (2, 64, 256), 8, LLAMA, True))
    return found


def frozen(model: nn.Module, cell: Cell) -> nn.Module:
    """Freeze everything: the floor."""
    return model.requires_grad_(False)


def ours(model: nn.Module, cell: Cell) -> nn.Module:
    """Register adapters with lora_param."""
    names = cell.adapted(model)
    attention = [f"{name}.out_proj" for name in names if name.endswith("self_attn")]
    lp.register_lora(model, rank=cell.rank, target=names + attention, kind=cell.kind)
    return model


def parametrized(model: nn.Module, cell: Cell) -> nn.Module:
    """Register the formula by hand, with torch's own parametrize: weight space everywhere."""
    if cell.kind != "lora":
        raise NotImplementedError(f"the formula by hand is no {cell.kind}'s")
    model.requires_grad_(False)
    for name in cell.adapted(model):
        for path, tensor in (("", "weight"), ("", "in_proj_weight"), ("out_proj", "weight")):
            layer = model.get_submodule(name)
            if path and not hasattr(layer, path):
                continue
            owner = layer.get_submodule(path)
            if isinstance(getattr(owner, tensor, None), nn.Parameter):
                weight = getattr(owner, tensor)
                sizes = weight.shape[0], weight[0].numel()
                options: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
                lora = lp.LoRAParametrization(*sizes, cell.rank, **options)
                register_parametrization(owner, tensor, lora)
    return model


def full(model: nn.Module, cell: Cell) -> nn.Module:
    """Train everything."""
    return model


def peft(model: nn.Module, cell: Cell) -> nn.Module:
    """Wrap the same layers with PEFT."""
    from peft import LoraConfig, get_peft_model

    names = cell.adapted(model)
    options: dict[str, Any] = {"use_dora": True} if cell.kind == "dora" else {}
    config = LoraConfig(r=cell.rank, lora_alpha=cell.rank, target_modules=names, **options)
    # Else its factors would be float32 on a bfloat16 model, and ours not.
    wrapped: nn.Module = get_peft_model(model, config, autocast_adapter_dtype=False)
    return wrapped


def loralib(model: nn.Module, cell: Cell) -> nn.Module:
    """Replace the same layers by loralib's; it has none for attention."""
    import loralib  # type: ignore[import-untyped]

    if cell.kind != "lora":
        raise NotImplementedError(f"loralib has no {cell.kind}")
    for name in cell.adapted(model):
        layer: Any = model.get_submodule(name)
        options: dict[str, Any] = {"r": cell.rank, "lora_alpha": cell.rank, "merge_weights": False}
        if isinstance(layer, nn.Linear):
            options["bias"] = layer.bias is not None
            new = loralib.Linear(layer.in_features, layer.out_features, **options)
        elif isinstance(layer, nn.Embedding):
            new = loralib.Embedding(layer.num_embeddings, layer.embedding_dim, **options)
        elif isinstance(layer, nn.Conv2d):
            sizes = layer.in_channels, layer.out_channels, layer.kernel_size[0]
            new = loralib.Conv2d(*sizes, stride=layer.stride, padding=layer.padding, **options)
        else:
            raise NotImplementedError(f"loralib has no {type(layer).__name__}")
        device = next(layer.parameters())
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, new.to(device))
    loralib.mark_only_lora_as_trainable(model)
    return model


WAYS: dict[str, Callable[[nn.Module, Cell], nn.Module]] = {
    "floor": frozen,
    "lora_param": ours,
    "parametrize": parametrized,
    "full": full,
}
WAYS |= {each.__name__: each for each in (peft, loralib) if importlib.util.find_spec(each.__name__)}
"""The ways that can be compared here; every ratio is to the first."""
