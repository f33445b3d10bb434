"""The page on large bases: the tests that it names, and the table that a script prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from experiments.memory_per_gpu import counts, llama, rows

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "large_bases.md").read_text()


def test_every_test_that_the_page_names_is_there() -> None:
    named = {*re.findall(r"test_\w+\.py", PAGE)}
    assert len(named) > 8
    assert named <= {path.name for path in (ROOT / "tests").iterdir()}


def test_the_table_is_what_the_script_prints() -> None:
    pytest.importorskip("transformers")
    for line in rows("70B", counts(llama("70B"), 16), 4096):
        assert line in PAGE
