"""What a docstring's example starts from: the public names, an adapter and its base in a folder."""

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
    """Give an example the public names, and `adapter.safetensors`, trained on `base.pt`."""
    if isinstance(request.node, pytest.DoctestItem):
        public = {name: getattr(lora_param, name) for name in lora_param.__all__}
        doctest_namespace.update(public, torch=torch)
        monkeypatch.chdir(tmp_path_factory.mktemp("example"))
        model = torch.nn.Sequential(torch.nn.Linear(3, 2))
        lora_param.register_lora(model, rank=1)
        lora_param.save_lora(model, "adapter.safetensors")
        torch.save(lora_param.base_state_dict(model), "base.pt")
