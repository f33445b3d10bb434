"""Where a routed batch's rows are: what is known, what is said, and what is refused as a guess."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 as everybody calls it
from torch.utils.checkpoint import checkpoint

from lora_param import LoRAError, lora_disabled, lora_routed, lora_selected, register_lora

from .cases import shake
from .test_route import NAMES, close, gradients, linear

ROWS: list[Any] = ["a", "b", None]


class Tokens(nn.Module):
    """Adds to tokens what a function makes of layers that see no batch."""

    def __init__(self, extra: Callable[[Any, int], Tensor]) -> None:
        super().__init__()
        self.extra = extra
        self.embedding, self.positions = nn.Embedding(11, 8), nn.Embedding(12, 8)
        self.queries = nn.Parameter(torch.randn(12, 8))
        self.register_buffer("order", torch.arange(12), persistent=False)
        self.mix, self.head = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        output: Tensor = self.head(self.embedding(tokens) + self.extra(self, tokens.shape[1]))
        return output


def distances(model: Any, n: int) -> Tensor:
    found: Tensor = model.positions((model.order[:n, None] - model.order[:n]).abs())
    return found.sum(-2)


BATCHLESS: dict[str, tuple[str, Callable[[Any, int], Tensor]]] = {
    "positions": ("positions", lambda m, n: m.positions(torch.arange(n))),
    "positions, a batch of one": ("positions", lambda m, n: m.positions(torch.arange(n)[None])),
    "relative distances": ("positions", distances),
    "queries": ("mix", lambda m, n: m.mix(m.queries)[..., :n, :]),
    "a part of the queries": ("mix", lambda m, n: m.mix(m.queries[:n])),
    "queries, a batch of one": ("mix", lambda m, n: m.mix(m.queries[None, :n])),
    "computed queries": ("mix", lambda m, n: m.mix(m.queries.tanh())[..., :n, :]),
}
TARGET: dict[str, Any] = {"target": ["embedding", "positions", "mix", "head.weight"]}


def adapted(model: nn.Module, **options: Any) -> nn.Module:
    model = model.double()
    for name in NAMES:
        register_lora(model, adapter=name, **({} if "kind" in options else {"rank": 2}), **options)
    shake(model)
    return model


@pytest.mark.parametrize("kind", ["lora", "dense"])
@pytest.mark.parametrize("length", [3, 6, 7])
@pytest.mark.parametrize("case", BATCHLESS)
def test_a_layer_without_a_batch_is_refused_until_that_is_said_and_then_right(
    case: str, length: int, kind: str
) -> None:
    torch.manual_seed(0)
    path, extra = BATCHLESS[case]
    options = TARGET if kind == "lora" else {"target": f"{path}.weight", "kind": kind}
    model, tokens = adapted(Tokens(extra), **options), torch.randint(11, (3, length))
    others = {"embedding": 0, "head": 0}  # as many tokens as rows may be either
    with (
        lora_routed(model, ROWS, dims=others),
        pytest.raises(LoRAError, match=rf"^{path}: .*None if"),
    ):
        model(tokens)
    alone = []
    for row, name in enumerate(ROWS):
        with lora_selected(model, name):
            alone.append(model(tokens[row : row + 1]))
    want = torch.cat(alone)
    want_gradients = gradients(model, [want])
    with lora_routed(model, ROWS, dims={**others, path: None}):
        got = model(tokens)
        got_gradients = gradients(model, [got])
    close(got, want)
    assert got_gradients.keys() == want_gradients.keys()
    for name, gradient in want_gradients.items():
        assert (gradient is None) == (got_gradients[name] is None)
        if gradient is not None:
            close(got_gradients[name], gradient)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", ["positions", "a part of the queries"])
def test_a_dimension_for_all_is_not_taken_to_mean_what_has_no_rows(case: str) -> None:
    path, extra = BATCHLESS[case]
    model = adapted(Tokens(extra), **TARGET)
    with (
        lora_routed(model, ROWS, dim=0),
        pytest.raises(LoRAError, match=rf"^{path}: .*need not be"),
    ):
        model(torch.randint(11, (3, 6)))


def test_queries_that_are_spread_over_the_batch_have_rows() -> None:
    model = adapted(Tokens(lambda m, n: m.mix(m.queries[:n].expand(3, -1, -1))), **TARGET)
    tokens = torch.randint(11, (3, 4))
    with lora_routed(model, ROWS):
        got = model(tokens)
    with lora_selected(model, "b"):
        close(got[1:2], model(tokens)[1:2])


INPUTS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "tokens laid out": (lambda: nn.Linear(6, 5), (12, 6)),
    "windows": (lambda: nn.Linear(6, 5), (6, 7, 6)),
    "windows of two sides": (lambda: nn.Linear(6, 5), (6, 2, 4, 6)),
    "frames": (lambda: nn.Conv1d(4, 5, 3), (6, 4, 5)),
    "windows in weight space": (lambda: nn.Conv1d(4, 4, 3, groups=2), (6, 4, 5)),
}


@pytest.mark.parametrize("case", INPUTS)
def test_neighbours_are_of_one_row_behind_an_input_with_rows(case: str) -> None:
    torch.manual_seed(0)
    make, shape = INPUTS[case]
    layer = adapted(nn.ModuleList([nn.Linear(6, 5), make()]))
    x, plain = torch.randn(shape).double(), torch.randn(3, 4, 6).double()
    alone = []
    for name, part in zip(ROWS, x.chunk(3), strict=True):
        with lora_selected(layer, name):
            alone.append(layer[1](part))
    with (
        lora_routed(layer, ROWS),
        pytest.raises(LoRAError, match=r"1: .*no input of 3 rows has come"),
    ):
        layer[1](x)
    with lora_routed(layer, ROWS, dim=0):
        close(layer[1](x), torch.cat(alone))
    with lora_routed(layer, ROWS):
        layer[0](plain)
        close(layer[1](x), torch.cat(alone))


@pytest.mark.parametrize("tokens", [3, 6, 9, 24])
def test_other_numbers_of_tokens_are_refused(tokens: int) -> None:
    layer = adapted(
        nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(6, 5)]), "1": nn.Linear(6, 5)})
    )
    x = torch.randn(tokens, 6).double()
    with lora_routed(layer, ROWS):
        layer["1"](torch.randn(3, 4, 6).double())
        if tokens > 3:
            with pytest.raises(LoRAError, match=r"1: .*no input of 3 rows has come before"):
                layer["1"](x)
        with pytest.raises(LoRAError, match=r"experts.0: .* or tokens in an expert's order"):
            layer["experts"][0](x)
    with lora_routed(layer, ROWS, dims={"experts.*": 0}):
        layer["experts"][0](x)


class Scaled(nn.Module):
    """Computes by its own parameter, which takes it to weight space, and by a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(6, 6))
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor, mask: Tensor | None = None, inside: bool = False) -> Tensor:
        work = lambda x: self.inner(F.linear(x, self.gain)).tanh()  # noqa: E731
        y: Tensor = checkpoint(work, x, use_reentrant=False) if inside else work(x)
        return y if mask is None else y * mask


@pytest.mark.parametrize("shape", [(1, 5, 1), (3, 5, 1), ()])
def test_an_argument_has_the_rows_or_is_shared(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x = adapted(Scaled(), target="*gain"), torch.randn(3, 5, 6).double()
    mask = torch.rand(shape).double()
    with lora_routed(model, ROWS):
        got = model(x, mask)
    for row, name in enumerate(ROWS):
        with lora_selected(model, name):
            close(got[row], model(x, mask)[row])


@pytest.mark.parametrize(
    ("shape", "doubt"), [((6, 1, 1), "with no 3 rows"), ((3, 3, 1), "more than one")]
)
def test_an_argument_whose_rows_are_a_guess_is_refused(shape: Any, doubt: str) -> None:
    model, x = adapted(Scaled(), target="*gain"), torch.randn(3, 2, 6).double()
    with lora_routed(model, ROWS), pytest.raises(LoRAError, match=rf"mask is .*{doubt}"):
        model(x, torch.rand(shape))


def test_what_gives_no_rows_is_refused() -> None:
    class Mean(Scaled):
        def forward(self, x: Tensor) -> Any:  # type: ignore[override]
            return super().forward(x).mean()

    model = adapted(Mean(), target="*gain")
    with lora_routed(model, ["a", "b", "a"]), pytest.raises(LoRAError, match="can't be told apart"):
        model(torch.randn(3, 4, 6).double())


def test_checkpointing_a_part_of_what_runs_by_groups_is_refused_and_the_whole_works() -> None:
    torch.manual_seed(0)
    model, x = adapted(Scaled(), target=["gain", "inner"]), torch.randn(2, 4, 6).double()
    x = x.repeat_interleave(2, 0).requires_grad_()  # so that a group's rows look like the batch's
    with lora_routed(model, ["a", "b"], dim=0):
        want = gradients(model, [model(x)])
        got = gradients(model, [checkpoint(model, x, use_reentrant=False)])
        for name, gradient in want.items():
            assert gradient is None or torch.equal(gradient, got[name])  # type: ignore[arg-type]
        y = model(x, inside=True)
        with pytest.raises(LoRAError, match=r"runs by groups .* checkpoint the module as a whole"):
            y.sum().backward()


@pytest.mark.parametrize("kind", ["lora", "dense"])
def test_one_adapter_is_off_on_all_rows_in_weight_space_too(kind: str) -> None:
    layer, x = linear(), torch.randn(3, 6).double()
    register_lora(layer, adapter="d", kind=kind)
    shake(layer, "d")
    with lora_routed(layer, [None, "b", {"d": 0.5}]):
        want = layer(x)
    with lora_routed(layer, ["a", "b", {"a": 2, "d": 0.5}]), lora_disabled(layer, "a"):
        close(layer(x), want)
