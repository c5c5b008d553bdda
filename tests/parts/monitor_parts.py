"""Tiny runs with two environments, one of which can be learned, for the tests of monitoring."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from families import tiny
from peft import LoraConfig, get_peft_model
from torch import nn

from routed_peft import Route, RoutedConfig, RoutedTrainer, RoutedTrainingArguments, presets
from routed_peft.data import train_tokenizer
from routed_peft.monitoring import MonitorConfig, RegionMonitor

KINDS: dict[str, Any] = {
    "lora": LoraConfig(r=3, target_modules=["q_proj", "up_proj"]),
    "own lora": RoutedConfig(kind="lora", r=3, target_modules=["v_proj", "down_proj"], task_type="CAUSAL_LM"),
    "mlp": RoutedConfig(size=4, init="zero", task_type="CAUSAL_LM"),
}
ROUTES = {
    "all": Route(),
    "less": Route(weights={"forget": -0.5}),
    "base only": Route(weights={"forget": 0.0}),
    "without": Route(ablated=("forget",)),
}


@cache
def tokenizer():
    return train_tokenizer(["a"], vocab_size=258)


def model_of(kind: str = "lora", dtype: torch.dtype = torch.float32, **overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(tiny("llama", dtype, vocab_size=300, **overrides), KINDS[kind], adapter_name="forget").to(
        dtype
    )


def rows(count: int = 64, seed: int = 0, environments: tuple[str, ...] = ("noise", "pattern")) -> Dataset:
    """Rows of "pattern" are always the same four tokens, which is quickly learned; other rows are random."""
    generator = torch.Generator().manual_seed(seed)
    names = [environments[i % len(environments)] for i in range(count)]
    random = torch.randint(3, 250, (count, 8), generator=generator).tolist()
    ids = [[40, 80, 120, 160] * 2 if name == "pattern" else random[i] for i, name in enumerate(names)]
    return Dataset.from_dict({"input_ids": ids, "route_label": ["unlabeled"] * count, "route_environment": names})


def trainer_of(
    out: Path, model: nn.Module | None = None, dataset: Dataset | None = None, routes: Any = None, **options: Any
) -> RoutedTrainer:
    defaults: dict[str, Any] = dict(
        max_steps=6, per_device_train_batch_size=8, learning_rate=1e-2, report_to="none", use_cpu=True, save_strategy="no",
        logging_steps=1, disable_tqdm=True, max_grad_norm=0.0, self_check=False, weight_decay=0.1,
        lr_scheduler_type="constant",
    )  # fmt: skip
    return RoutedTrainer(
        model_of() if model is None else model,
        RoutedTrainingArguments(str(out), **(defaults | options)),
        routes=routes or presets.control(),
        train_dataset=rows() if dataset is None else dataset,
        processing_class=tokenizer(),
    )


def quiet(**fields: Any) -> MonitorConfig:
    """Return a configuration that observes every step and raises no alarm by default."""
    limits = dict.fromkeys(("max_kl", "max_functional_size", "max_reward_gap", "max_weight_drift"))
    return MonitorConfig(**{"every": 1, "watch": [], **limits, **fields})


def monitored(out: Path, config: MonitorConfig | None = None, **options: Any) -> tuple[RoutedTrainer, RegionMonitor]:
    trainer = trainer_of(out, **options)
    return trainer, RegionMonitor(trainer, config or quiet())


def randomize(model: nn.Module) -> None:
    for p in model.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype)
