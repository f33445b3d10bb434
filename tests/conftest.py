"""What every test starts from."""

from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)  # the tests' tensors are tiny, and threads would only wait for each other


@pytest.fixture
def process_group() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
