"""What a docstring's example starts from: torch, the public names, and a folder of its own."""

from typing import Any

import pytest
import torch

import lora_param


@pytest.fixture(autouse=True)
def surroundings_of_example(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    doctest_namespace: dict[str, Any],
) -> None:
    """Give a docstring's example the names that a reader knows, and an empty folder."""
    if isinstance(request.node, pytest.DoctestItem):
        public = {name: getattr(lora_param, name) for name in lora_param.__all__}
        doctest_namespace.update(public, torch=torch)
        monkeypatch.chdir(tmp_path_factory.mktemp("example"))
