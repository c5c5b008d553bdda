"""Small routed trainers on random models and rows, for the tests of `routed_peft.training`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from families import tiny
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from routed_peft import RoutedConfig, RoutedTrainer, RoutedTrainingArguments, presets

LABELS = ["forget", "retain", "unlabeled"]


def model_of(family: str = "llama", adapters: dict[str, PeftConfig] | None = None, **overrides) -> nn.Module:
    torch.manual_seed(0)
    base: PreTrainedModel = tiny(family, vocab_size=300, **overrides)
    adapters = adapters or {"forget": RoutedConfig(size=4, init="model", task_type="CAUSAL_LM")}
    (name, config), *others = adapters.items()
    model = get_peft_model(base, config, adapter_name=name)
    for name, config in others:
        model.add_adapter(name, config)
    return model


def rows(count: int = 24, labels: list[str] = LABELS, length: int | None = None, seed: int = 0) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    lengths = [length or 4 + i % 5 for i in range(count)]
    return Dataset.from_dict(
        {
            "input_ids": [torch.randint(3, 250, (n,), generator=generator).tolist() for n in lengths],
            "route_label": [labels[i % len(labels)] for i in range(count)],
        }
    )


def arguments(out: Path, **options) -> RoutedTrainingArguments:
    defaults: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
    }
    defaults |= {
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "train_base": True,
        "max_grad_norm": 0.0,
    }
    return RoutedTrainingArguments(str(out), **(defaults | options))


def trainer_of(
    out: Path, tokenizer, model=None, routes=None, dataset=None, eval_dataset=None, callbacks=None, **options
) -> RoutedTrainer:
    return RoutedTrainer(
        model or model_of(),
        arguments(out, **options),
        routes=routes or presets.sgtm("forget"),
        train_dataset=dataset or rows(),
        eval_dataset=eval_dataset,
        callbacks=callbacks,
        processing_class=tokenizer,
    )


def train(out: Path, tokenizer, model=None, *, resume: str | bool | None = None, **options) -> RoutedTrainer:
    trainer = trainer_of(out, tokenizer, model, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=0, atol=atol), f"{name}: {(a[name] - b[name]).abs().max()}"
