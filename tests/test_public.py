"""The public names, the README's code, and what importing costs."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

import lora_param

ROOT = Path(__file__).parents[1]


def test_the_public_names_are_these() -> None:
    assert lora_param.__all__ == [
        "AdapterError",
        "AdapterSummary",
        "FileError",
        "Fit",
        "FrozenError",
        "LoRAError",
        "LoRAParametrization",
        "LoRASummary",
        "StateDictError",
        "TargetError",
        "WeightSummary",
        "assert_frozen",
        "base_frozen",
        "base_state_dict",
        "combine_lora",
        "disable_lora",
        "enable_lora",
        "extract_lora",
        "fingerprint",
        "load_lora",
        "load_lora_state_dict",
        "lora_disabled",
        "lora_merged",
        "lora_parameter_groups",
        "lora_parameters",
        "lora_routed",
        "lora_selected",
        "lora_state_dict",
        "lora_summary",
        "merge_lora",
        "named_lora_parameters",
        "register_lora",
        "remove_lora",
        "resize_lora",
        "save_lora",
        "select_lora",
    ]
    assert all(hasattr(lora_param, name) for name in lora_param.__all__)


def test_every_error_is_a_lora_error_and_a_value_error() -> None:
    errors = [getattr(lora_param, name) for name in lora_param.__all__ if name.endswith("Error")]
    assert all(issubclass(error, (lora_param.LoRAError, ValueError)) for error in errors)


def test_the_core_imports_nothing_but_torch_and_safetensors() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import lora_param; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(new - {'lora_param', 'torch', 'safetensors'} - set(sys.stdlib_module_names)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def examples() -> dict[str, str]:
    """Return the Python in the README and the documentation, by file and place."""
    found = {}
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        blocks = re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL)
        found |= {f"{path.stem} {place}": code for place, code in enumerate(blocks, 1)}
    return found


@pytest.mark.parametrize("place", examples())
def test_the_examples_of_readme_and_docs_run_as_they_stand(
    place: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(examples()[place], place, "exec"), {"__name__": "__main__"})


def test_who_comes_from_peft_finds_each_of_its_fields_and_calls() -> None:
    peft = pytest.importorskip("peft")
    page = (ROOT / "docs" / "coming_from_peft.md").read_text()
    if f"as of PEFT {peft.__version__};" not in page:
        pytest.skip(f"the page isn't about PEFT {peft.__version__}")
    words = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    calls = {*dir(peft.PeftModel), *dir(peft.LoraModel)} - set(dir(nn.Module))
    words |= {name for name in calls if not name.startswith("_")}
    assert len(words) > 70
    assert sorted(word for word in words if not re.search(rf"`{word}\b", page)) == []
