"""The ways of training a cell that are compared: the floor, the library, and the others."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 as everybody calls it
from torch.nn.utils.parametrize import register_parametrization

import lora_param as lp

from .cells import Called, Cell

KINDS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "lora": ({}, {}),
    "rslora": ({"scaling": "rslora"}, {"use_rslora": True}),
    "pissa": ({"init": "pissa"}, {"init_lora_weights": "pissa_niter_2"}),
    "dora": ({"kind": "dora"}, {"use_dora": True}),
    "dense": ({"kind": "dense"}, None),
}
"""How each kind is asked for, here and in PEFT, where it has it."""


def routed(model: nn.Module, cell: Cell) -> nn.Module:
    """Give each row its adapter, by lora_param."""

    def call(module: nn.Module, x: Tensor) -> Tensor:
        with lp.lora_routed(module, cell.rows, dim=0):
            y: Tensor = module(x)
        return y

    return Called(model, call)


def routed_peft(model: nn.Module, cell: Cell) -> nn.Module:
    """Give each row its adapter, by PEFT."""

    def call(module: nn.Module, x: Tensor) -> Tensor:
        if module.training:
            raise NotImplementedError("PEFT has no rows of their own in training")
        y: Tensor = module(x, adapter_names=cell.rows)
        return y

    return Called(model, call)


def floor(model: nn.Module, cell: Cell) -> nn.Module:
    """Freeze everything."""
    return model.requires_grad_(False)


def lora_param(model: nn.Module, cell: Cell) -> nn.Module:
    """Register adapters with lora_param."""
    target = cell.adapted(model)
    target += [f"{name}.out_proj" for name in target if _is_attention(model, name)]
    for adapter in cell.names:
        options = KINDS[cell.kind][0]
        if options.get("kind") != "dense":
            options = {**options, "rank": cell.rank}
        lp.register_lora(model, target=target, adapter=adapter, **options)
    lp.select_lora(model, cell.names if cell.routed else cell.names[0])
    return routed(model, cell) if cell.routed else model


def parametrize(model: nn.Module, cell: Cell) -> nn.Module:
    """Register the formula by hand, with torch's own parametrize: weight space everywhere."""
    _only_lora(cell, "the formula by hand")
    model.requires_grad_(False)
    for name in cell.adapted(model):
        layer: Any = model.get_submodule(name)
        places = [(layer, "weight")]
        if _is_attention(model, name):
            places = [(layer, "in_proj_weight"), (layer.out_proj, "weight")]
        for module, tensor in places:
            weight = getattr(module, tensor)
            sizes = weight.shape[0], weight[0].numel()
            options: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
            lora = lp.LoRAParametrization(*sizes, cell.rank, **options)
            register_parametrization(module, tensor, lora)
    return model


class BareLinear(nn.Module):
    """The three products of an adapted linear layer, and nothing else: no checks, no switches."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.A = nn.Parameter(torch.randn(rank, layer.in_features) / layer.in_features)
        self.B = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """Compute `[tokens, out]` from `[tokens, in]`."""
        y = F.linear(x, self.weight, self.bias)
        return y.addmm_(F.linear(x, self.A), self.B.t())


def bare(model: nn.Module, cell: Cell) -> nn.Module:
    """Replace linear layers by the products alone: the least that eager torch could take."""
    _only_lora(cell, "the bare layer")
    model.requires_grad_(False)
    for name in cell.adapted(model):
        layer: Any = model.get_submodule(name)
        if len(cell.shape) != 2 or not isinstance(layer, nn.Linear):
            raise NotImplementedError("the bare layer is linear, of tokens")
        _put(model, name, BareLinear(layer, cell.rank).to(layer.weight))
    return model


def full(model: nn.Module, cell: Cell) -> nn.Module:
    """Train everything."""
    return model


def peft(model: nn.Module, cell: Cell) -> nn.Module:
    """Wrap the same layers with PEFT."""
    from peft import LoraConfig, get_peft_model

    if (options := KINDS[cell.kind][1]) is None:
        raise NotImplementedError(f"PEFT has no such kind as {cell.kind}")
    sizes: dict[str, Any] = {"r": cell.rank, "lora_alpha": cell.rank}
    config = LoraConfig(target_modules=cell.adapted(model), **sizes, **options)
    # Else its factors would be float32 on a bfloat16 model, and ours not.
    same: dict[str, Any] = {"autocast_adapter_dtype": False}
    wrapped: Any = get_peft_model(model, config, cell.names[0], **same)
    for name in cell.names[1:]:
        wrapped.add_adapter(name, config, **same)
    return routed_peft(wrapped, cell) if cell.routed else wrapped


def loralib(model: nn.Module, cell: Cell) -> nn.Module:
    """Replace the same layers by loralib's, on the same weights; it has none for attention."""
    import loralib  # type: ignore[import-untyped]

    _only_lora(cell, "loralib")
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
        own = new.conv if isinstance(layer, nn.Conv2d) else new
        own.load_state_dict(layer.state_dict(), strict=False, assign=True)
        _put(model, name, new.to(layer.weight))
    loralib.mark_only_lora_as_trainable(model)
    return model


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def _is_attention(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name), nn.MultiheadAttention)


def _only_lora(cell: Cell, way: str) -> None:
    if cell.kind != "lora" or cell.adapters > 1:
        raise NotImplementedError(f"{way} has no other kinds, nor switches")


def prepared(plain: nn.Module, cell: Cell) -> dict[str, nn.Module]:
    """Prepare a copy of a model in each way that has layers for it.

    All copies have the base's weights in the same memory, because how fast a few tokens meet a
    matrix depends on where it lies. What starts at zero is drawn at random, as it would be after
    some training: an adapter acts, and no product is with zeros.
    """
    models = {}
    for way, prepare in WAYS.items():
        own: dict[int, Any] = {id(each): nn.Parameter(each.detach()) for each in plain.parameters()}
        try:
            model = prepare(copy.deepcopy(plain, own), cell)
        except NotImplementedError:
            continue
        for each in model.parameters():
            if way != "full" and each.requires_grad and not each.any():
                nn.init.normal_(each, std=0.02)
        models[way] = model
    return models


WAYS: dict[str, Callable[[nn.Module, Cell], nn.Module]] = {
    each.__name__: each for each in (floor, lora_param, bare, parametrize, full)
}
WAYS |= {each.__name__: each for each in (peft, loralib) if importlib.util.find_spec(each.__name__)}
"""The ways that can be compared here; every ratio is to the first."""

OTHERS = ("peft", "parametrize", "loralib")
"""The other ways to have an adapter."""
