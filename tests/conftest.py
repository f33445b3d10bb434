"""What every test starts from."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_param import LoRAParametrization, base_state_dict, save_lora

from .cli_cases import adapted
from .file_cases import net
from .ranks import Ranks

torch.set_num_threads(1)  # the tests' tensors are tiny, and threads would only wait for each other


@pytest.fixture
def process_group() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "adapter.safetensors"


@pytest.fixture
def saved(path: Path) -> Path:
    save_lora(net(), path)
    return path


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    """An adapter, its base, and a path for what is made of them."""
    adapter, base = tmp_path / "adapter.safetensors", tmp_path / "base.safetensors"
    model = adapted()
    save_lora(model, adapter)
    save_file(base_state_dict(model), base, {"format": "pt"})
    return adapter, base, tmp_path / "out.safetensors"


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    ranks = Ranks(tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """List the weights whose sum with a delta is formed from now on."""
    seen: list[Tensor] = []
    for name in ("sum", "formula"):
        own = getattr(LoRAParametrization, name)
        form = lambda self, weight, own=own: seen.append(weight) or own(self, weight)  # noqa: E731
        monkeypatch.setattr(LoRAParametrization, name, form)
    return seen
