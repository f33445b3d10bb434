"""Saving with transformers: `save_pretrained`, and a Trainer's checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils.data import Dataset

from lora_param import (
    base_frozen,
    base_state_dict,
    fingerprint,
    load_lora,
    lora_state_dict,
    register_lora,
    save_lora,
)

from .cases import shake
from .peft_cases import bert, output, tokens


def adapted() -> tuple[Any, Any]:
    torch.manual_seed(0)
    base = bert().eval()
    model = copy.deepcopy(base)
    register_lora(model, rank=2, target=["query", "value"], train="classifier")
    return base, model


def test_save_pretrained_saves_the_base_by_its_state_dict(tmp_path: Path) -> None:
    base, model = adapted()
    shake(model)
    model.save_pretrained(tmp_path, state_dict=base_state_dict(model))
    save_lora(model, tmp_path / "adapter.safetensors")
    again = type(base).from_pretrained(tmp_path).eval()
    assert fingerprint(again) == fingerprint(base)
    load_lora(again, tmp_path / "adapter.safetensors", base="require")
    x = tokens(2, 5)()
    assert torch.equal(output(again, x), output(model, x))


class Sentences(Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": torch.arange(5) + index, "labels": torch.tensor(index % 3)}


class SaveAdapter(transformers.TrainerCallback):
    def on_save(
        self, args: Any, state: Any, control: Any, model: Any = None, **others: Any
    ) -> None:
        save_lora(model, f"{args.output_dir}/checkpoint-{state.global_step}/adapter.safetensors")


def trainer(model: Any, folder: Path, **options: Any) -> transformers.Trainer:
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=4, save_steps=2, per_device_train_batch_size=2, learning_rate=0.1,
        report_to=[], disable_tqdm=True, use_cpu=True, **options,
    )  # fmt: skip
    callbacks = [SaveAdapter()]
    return transformers.Trainer(model, arguments, train_dataset=Sentences(), callbacks=callbacks)


def test_a_trainer_keeps_each_checkpoints_adapter_and_resumes(tmp_path: Path) -> None:
    base, model = adapted()
    fresh = copy.deepcopy(model)
    with base_frozen(model):
        trainer(model, tmp_path / "run").train()
    states = {}
    for step in (2, 4):
        load_lora(again := copy.deepcopy(base), tmp_path / f"run/checkpoint-{step}/adapter.safetensors", base="require")  # fmt: skip
        states[step] = lora_state_dict(again)
    trained = lora_state_dict(model)
    assert all(torch.equal(states[4][name], trained[name]) for name in trained)
    assert not torch.equal(states[2]["classifier.weight.default.D"], trained["classifier.weight.default.D"])  # fmt: skip
    trainer(fresh, tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))  # fmt: skip
    resumed = lora_state_dict(fresh)
    assert all(torch.allclose(resumed[name], trained[name]) for name in trained)
