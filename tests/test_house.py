"""The house: who imports whom, how long a file is, and how many calls a verb and a forward make."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_param
from lora_param import disable_lora, lora_summary, register_lora, remove_lora, select_lora
from lora_param.walk import Walk

ROOT = Path(__file__).parent.parent
PACKAGE = Path(lora_param.__file__).parent
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imported(name: str) -> Iterator[str]:
    """Yield which of the package's files one imports, also inside functions."""
    path = FILES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    package = [] if name == "__init__" else package
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            target = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                inner = f"{target}.{alias.name}".strip(".")
                yield inner if inner in FILES else target or "__init__"


def test_no_file_is_longer_than_350_lines() -> None:
    files = [
        path
        for folder in (PACKAGE, ROOT / "experiments", ROOT / "tests")
        for path in folder.rglob("*.py")
    ]
    assert len(files) > 60
    assert [path.name for path in files if len(path.read_text().splitlines()) > 350] == []


def test_the_library_grows_no_longer_than_it_is() -> None:
    lengths = {name: len(path.read_text().splitlines()) for name, path in FILES.items()}
    core = sum(length for name, length in lengths.items() if not name.startswith("io"))
    assert core <= 6908
    assert sum(lengths.values()) <= 10647


def test_imports_run_in_no_circle() -> None:
    left = {name: set(imported(name)) - {name, "__init__"} for name in FILES if name != "__init__"}
    assert sum(map(len, left.values())) > 60
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    assert left == {}


def test_the_core_imports_nothing_of_io() -> None:
    core = [name for name in FILES if not name.startswith(("io", "__"))]
    assert len(core) > 15
    assert [name for name in core if any(each.startswith("io") for each in imported(name))] == []


def test_the_library_imports_nothing_of_the_experiments() -> None:
    assert [path.name for path in FILES.values() if "import experiments" in path.read_text()] == []
    assert [path.name for path in FILES.values() if "from experiments" in path.read_text()] == []


def calls(action: Callable[[], object]) -> int:
    """Count the Python functions that an action enters."""
    count = 0

    def profile(frame: Any, event: str, argument: object) -> None:
        nonlocal count
        count += event == "call" and "_dynamo" not in frame.f_code.co_filename  # it tags modules

    sys.setprofile(profile)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count


def test_registering_walks_the_model_once_and_calls_little(monkeypatch: pytest.MonkeyPatch) -> None:
    first, model = (nn.Sequential(*[nn.Linear(8, 8) for _ in range(100)]) for _ in range(2))
    other = nn.Linear(8, 8)
    register_lora(other, rank=2)  # makes the class that all share, and keeps it
    assert calls(lambda: register_lora(first, rank=2)) <= 12_000

    walks = []
    for name in ("named_modules", "modules", "named_parameters", "parameters", "named_children"):
        walk = getattr(nn.Module, name)
        seen = lambda self, *a, _walk=walk, **k: walks.append(self) or _walk(self, *a, **k)  # noqa: E731
        monkeypatch.setattr(nn.Module, name, seen)
    visit = Walk._visit
    monkeypatch.setattr(Walk, "_visit", lambda self, *a: walks.append(a[1]) or visit(self, *a))
    register_lora(model, rank=2)
    assert list(map(id, walks)) == list(map(id, [model, *model]))


@pytest.mark.parametrize("on", [0, 1])
@pytest.mark.parametrize("adapters", [1, 64])
def test_a_forward_calls_little_whatever_is_registered_and_off(adapters: int, on: int) -> None:
    layer, x = nn.Linear(8, 8), torch.randn(3, 8)
    for index in range(adapters):
        register_lora(layer, rank=2, adapter=f"a{index}")
        layer.parametrizations.weight[index].enabled = index < on
    layer(x)
    assert calls(lambda: layer(x)) <= 20


@pytest.mark.parametrize("make", [nn.LSTM, nn.Bilinear], ids=["reads once", "reads each time"])
def test_a_weight_is_formed_by_as_few_calls_whatever_is_registered_and_off(make: Any) -> None:
    counted = []
    for adapters in (1, 64):
        layer = make(*[8] * (3 if make is nn.Bilinear else 2))
        for index in range(adapters):
            register_lora(layer, rank=2, adapter=f"a{index}")
        select_lora(layer, "a0")
        inputs = [torch.randn(3, 8)] * (2 if make is nn.Bilinear else 1)
        layer(*inputs)
        counted.append(calls(lambda layer=layer, inputs=inputs: layer(*inputs)))
    assert counted[1] <= counted[0]


@pytest.mark.parametrize(
    "verb",
    [lora_summary, lambda layer: select_lora(layer, "a0"), disable_lora, remove_lora],
    ids=["summary", "select", "disable", "remove"],
)
def test_a_verb_grows_no_faster_than_the_adapters_it_is_for(verb: Any) -> None:
    counted = []
    for adapters in (10, 40):
        layer = nn.Linear(8, 8)
        for index in range(adapters):
            register_lora(layer, rank=2, adapter=f"a{index}")
        counted.append(calls(lambda layer=layer: verb(layer)))
    assert counted[1] <= 4 * counted[0]
