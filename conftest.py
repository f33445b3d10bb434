"""What a docstring's example may take for granted: names, and an adapter's file with its base."""

import pytest
import torch

import lora_param
from lora_param import base_state_dict, register_lora, save_lora


@pytest.fixture(autouse=True)
def folder_of_example(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    doctest_namespace: dict[str, object],
) -> None:
    """Run a docstring's example where `adapter.safetensors` was trained on `base.pt`.

    It knows `torch`, all of `lora_param` and `lora_param.io`, and an adapted `model`.
    """
    if isinstance(request.node, pytest.DoctestItem):
        for package in (lora_param, lora_param.io):
            doctest_namespace |= {name: getattr(package, name) for name in package.__all__}
        layer = torch.nn.Linear(3, 2)
        register_lora(layer, rank=1)
        doctest_namespace |= {"torch": torch, "model": layer}
        monkeypatch.chdir(tmp_path_factory.mktemp("example"))
        model = torch.nn.Sequential(torch.nn.Linear(3, 2))
        register_lora(model, rank=1)
        save_lora(model, "adapter.safetensors")
        torch.save(base_state_dict(model), "base.pt")
