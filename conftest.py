"""A docstring's example runs in a folder of its own, where there are an adapter and its base."""

import pytest
import torch

from lora_param import base_state_dict, register_lora, save_lora


@pytest.fixture(autouse=True)
def folder_of_example(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Run a docstring's example where `adapter.safetensors` was trained on `base.pt`."""
    if isinstance(request.node, pytest.DoctestItem):
        monkeypatch.chdir(tmp_path_factory.mktemp("example"))
        model = torch.nn.Sequential(torch.nn.Linear(3, 2))
        register_lora(model, rank=1)
        save_lora(model, "adapter.safetensors")
        torch.save(base_state_dict(model), "base.pt")
