"""loralib's state dicts, read."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ...errors import FileError, shortened
from ...layers import CONV1D, Shape
from ...weight import Weight, join
from ..outline import LINEARS, Outline, class_name
from ..tensors import PICKLED, PICKLES, Config, OpenFile, Tensors
from . import factors as shared

KEYS = (r"(?:(?P<name>.+)\.)?lora_(?P<role>[AB])",)


def recognises(file: OpenFile) -> bool:
    """Say whether a file is called as a pickle is, and not as PEFT's."""
    named = file.path.suffix in PICKLES and file.path.name != PICKLED
    return named and bool(file.fault)


def parse(
    tensors: Tensors,
    config: Config,
    weights: Outline,
    *,
    alpha: float | None = None,
    enable_lora: Sequence[bool] | None = None,
) -> list[shared.Named]:
    """Read what `torch.save(loralib.lora_state_dict(model), path)` wrote.

    The model has plain layers in the place of loralib's. Biases and other tensors of the base that
    are in the file have to be the model's own, to the bit. `alpha` is the `lora_alpha` that it was
    trained with, which the file doesn't hold; `enable_lora` says which slices of each
    `MergedLinear` are adapted, and isn't needed if all are: each is a block of rows. The update of
    a `ConvLoRA`, whose own view is `(out * k, in * k)`, has a rank of `r * k * k`.
    """
    factors, rest = shared.group_factors(tensors, *KEYS)
    if not factors:
        raise FileError(f"no adapter's file: it holds {shortened([*tensors])}, and no lora_A")
    if alpha is None:
        raise FileError("the file doesn't hold its lora_alpha; pass it as alpha=")
    # A ConvLoRA has its layer inside.
    places = {name: weights.layer_weight(name, join(name, "conv")) for name in factors}
    base = {_name_in_base(key, places): tensor for key, tensor in rest.items()}
    shared.refuse(shared.tensors_of_another_base(base, weights))
    found = shared.all_found(places, weights)

    def read(name: str) -> Iterator[shared.Named]:
        weight, (A, B) = found[name], shared.both_factors(factors[name])
        rank, kind, shape = float(B.shape[1]), weight.layer.kind, weight.shape
        if shape is None or kind is nn.Embedding:
            blocks = [(weight, A, B)]
        elif kind in (*LINEARS, CONV1D):
            blocks = list(_slices(weight, A, B, enable_lora))
        elif kind is nn.Conv2d:  # the rank over its own view
            blocks, rank = [(weight, *_convolution_factors(shape, A, B))], rank / shape[-1]
        else:
            cls = class_name(weight.module)
            raise ValueError(f"is a {cls}, for which loralib has no layer that works")
        for block, a, b in blocks:
            scaled = alpha * len(a) / rank
            yield block.name, shared.of_layer(block, a, b, scaled, weight.layer.transposed)

    return shared.collect(read, factors)


def _name_in_base(key: str, found: Mapping[str, Weight | None]) -> str:
    """Name a tensor as the plain model does, where a convolution takes a ConvLoRA's place."""
    owner, _, tensor = key.rpartition(".")
    outer = f".{owner}".removesuffix(".conv").removeprefix(".")
    weight = found.get(outer)
    return join(outer, tensor) if weight and weight.path == outer else key


def _convolution_factors(shape: Shape, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors of `(B @ A).view(shape)`: row `o` is rows `s * o` to `s * (o + 1)`."""
    size = torch.Size(shape[1:]).numel()
    if A.shape[0] != B.shape[1] or B.shape[0] * A.shape[1] != shape[0] * size:
        raise ValueError(f"has factors {tuple(A.shape)}, {tuple(B.shape)} for {shape}")
    repeats, remainder = divmod(size, A.shape[1])
    if remainder:  # in groups, rows of the two views overlap
        product = (B.double() @ A.double()).to(A.dtype).view(shape[0], -1)
        eye = torch.eye(min(product.shape), dtype=A.dtype)
        A, B = (product, eye) if len(eye) == len(product) else (eye, product)
        return A.view(-1, *shape[1:]), B
    A = torch.kron(torch.eye(repeats, dtype=A.dtype), A)
    return A.view(-1, *shape[1:]), B.reshape(shape[0], -1)


def _slices(
    weight: Weight, A: Tensor, B: Tensor, enable_lora: Sequence[bool] | None
) -> Iterator[tuple[Weight, Tensor, Tensor]]:
    """Yield the enabled slices of a layer as blocks, with their factors; itself, if it is one."""
    out = (weight.shape or ())[weight.dim]
    enabled, surplus = divmod(A.shape[0], B.shape[1])
    if surplus or not 0 < enabled <= 64 or len(B) % enabled or out % (size := len(B) // enabled):
        raise ValueError(f"has factors {tuple(A.shape)}, {tuple(B.shape)} for {out} outputs")
    slices = out // size
    chosen = [True] * slices if enabled == slices else list(enable_lora or ())
    if len(chosen) != slices or sum(map(bool, chosen)) != enabled:
        raise ValueError(
            f"adapts {enabled} of {slices} slices; say which by enable_lora=, got {enable_lora}"
        )
    index = [place for place, on in enumerate(chosen) if on]
    for place, a, b in zip(index, A.chunk(enabled), B.chunk(enabled), strict=True):
        block = weight.block(slice(place * size, (place + 1) * size)) if slices > 1 else weight
        yield block, a, b
