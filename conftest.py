"""A docstring's example writes its files into a folder of its own."""

import pytest


@pytest.fixture(autouse=True)
def folder_of_example(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Run a docstring's example in an empty folder."""
    if isinstance(request.node, pytest.DoctestItem):
        monkeypatch.chdir(tmp_path_factory.mktemp("example"))
