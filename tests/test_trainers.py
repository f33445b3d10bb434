"""Trainers of others: an adapter is trained, resumed to the bit, and saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_param import (
    assert_frozen,
    fingerprint,
    load_lora,
    lora_parameters,
    lora_state_dict,
    register_lora,
    save_lora,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # of the trainers, about machines


def small_llama(**options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 16,
        **options,
    }
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, **tokens))


def llama() -> nn.Module:
    model: nn.Module = small_llama()
    register_lora(model, rank=2)
    return model


def examples(count: int = 8) -> list[dict[str, Tensor]]:
    ids = torch.randint(3, 32, (count, 6), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


def assert_trained_alike(model: nn.Module, other: nn.Module, base: dict[str, str]) -> None:
    """Check that two runs end at the same adapter, which has moved, on a base that has not."""
    states = lora_state_dict(model), lora_state_dict(other)
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
        assert "lora_B" not in name or tensor.any()
    for each in (model, other):
        assert_frozen(each, base)


def assert_saved(model: nn.Module, plain: nn.Module, path: Path) -> None:
    save_lora(model, path)
    load_lora(plain, path, base="require")
    for name, tensor in lora_state_dict(model).items():
        assert torch.equal(lora_state_dict(plain)[name], tensor)


def arguments(folder: Path) -> dict[str, Any]:
    steps = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1}
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "steps"}
    return {"output_dir": str(folder), "learning_rate": 0.1, **steps, **quiet}


def test_transformers_trainer_trains_resumes_and_saves(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, path = llama(), tmp_path / "adapter.safetensors"
    base = fingerprint(model)

    def train(model: nn.Module, resumed: bool = False) -> None:
        given = transformers.TrainingArguments(**arguments(tmp_path))
        trainer = transformers.Trainer(model, given, train_dataset=examples())
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resumed else None)

    train(model)
    train(other := llama(), resumed=True)
    assert_trained_alike(model, other, base)
    assert_saved(model, llama(), path)


def vocabulary() -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    words = {str(index): index for index in range(32)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="0"))
    tokens = {"pad_token": "0", "bos_token": "1", "eos_token": "2"}
    return pytest.importorskip("transformers").PreTrainedTokenizerFast(
        tokenizer_object=model, **tokens
    )


def test_trl_trains_resumes_and_saves(tmp_path: Path) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    rows = [{"input_ids": each["input_ids"].tolist()} for each in examples()]
    model, base = llama(), fingerprint(llama())

    def train(model: nn.Module, resumed: bool = False) -> None:
        given = trl.SFTConfig(**arguments(tmp_path), dataset_kwargs={"skip_prepare_dataset": True})
        data = datasets.Dataset.from_list(rows)
        trainer = trl.SFTTrainer(model, given, train_dataset=data, processing_class=vocabulary())
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resumed else None)

    train(model)
    train(other := llama(), resumed=True)
    assert_trained_alike(model, other, base)
    assert_saved(model, llama(), tmp_path / "adapter.safetensors")


def test_lightning_trains_resumes_and_saves(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = llama()

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            loss: Tensor = self.model(**batch).loss
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(lora_parameters(self.model), lr=0.1)

        def on_save_checkpoint(self, checkpoint: Any) -> None:
            save_lora(self.model, tmp_path / "beside.safetensors")

    loader = torch.utils.data.DataLoader(examples(), batch_size=2)  # type: ignore[arg-type]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}

    def trainer(epochs: int) -> Any:
        return lightning.Trainer(
            accelerator="cpu", max_epochs=epochs, enable_checkpointing=False, **quiet
        )

    whole, half = Module(), Module()
    base = fingerprint(whole.model)
    trainer(2).fit(whole, loader)
    (first := trainer(1)).fit(half, loader)
    first.save_checkpoint(tmp_path / "half.ckpt")
    load_lora(beside := llama(), tmp_path / "beside.safetensors", base="require")
    assert_trained_alike(half.model, beside, base)
    other = Module()
    trainer(2).fit(other, loader, ckpt_path=tmp_path / "half.ckpt", weights_only=False)
    assert_trained_alike(whole.model, other.model, base)
    assert_saved(whole.model, llama(), tmp_path / "adapter.safetensors")


def test_accelerate_trains_resumes_and_saves(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    batches = [
        {
            name: torch.stack([each[name] for each in examples()[i : i + 2]])
            for name in examples()[0]
        }
        for i in range(0, 8, 2)
    ]

    def prepared(model: nn.Module) -> tuple[Any, nn.Module, Any]:
        accelerator = accelerate.Accelerator(cpu=True)
        optimizer = torch.optim.AdamW(lora_parameters(model), lr=0.1)
        return accelerator, *accelerator.prepare(model, optimizer)

    def train(accelerator: Any, model: nn.Module, optimizer: Any, some: list[Any]) -> None:
        for batch in some:
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()

    whole, half, other = llama(), llama(), llama()
    base = fingerprint(whole)
    train(*prepared(whole), batches)
    train(*(kept := prepared(half)), batches[:2])
    kept[0].save_state(str(tmp_path / "half"))
    resumed = prepared(other)
    resumed[0].load_state(str(tmp_path / "half"))
    train(*resumed, batches[2:])
    assert_trained_alike(whole, other, base)
    assert_saved(resumed[0].unwrap_model(resumed[1]), llama(), tmp_path / "adapter.safetensors")
