"""A tiny model that knows two sides, and arguments for unlearning one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from families import tiny
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from routed_peft.unlearning import UnlearningArguments

LENGTH = 12


def rows(low: int, high: int, count: int = 16, seed: int = 0) -> list[dict[str, list[int]]]:
    """Rows that count upwards through a range of tokens: easy to learn, and disjoint for disjoint ranges."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(high - low, (count,), generator=generator).tolist()
    return [{"input_ids": [low + (start + i) % (high - low) for i in range(LENGTH)]} for start in starts]


FORGET, RETAIN = rows(4, 20), rows(24, 60)


def arguments(out: Path, method: str = "graddiff", **options: Any) -> UnlearningArguments:
    defaults: dict[str, Any] = {
        "max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "lr_scheduler_type": "constant",
        "report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no",
    }  # fmt: skip
    return UnlearningArguments(str(out), method=method, **{**defaults, **options})


@torch.no_grad()
def loss(model: nn.Module, data: list[dict[str, list[int]]]) -> float:
    ids = torch.tensor([row["input_ids"] for row in data])
    logits = model.eval()(ids).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


def learned_model() -> PreTrainedModel:
    """A small model that knows both sides."""
    model = tiny("llama", num_hidden_layers=3, hidden_size=32, intermediate_size=48)
    ids = torch.tensor([row["input_ids"] for row in FORGET + RETAIN])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    assert loss(model, FORGET) < 0.3 and loss(model, RETAIN) < 0.3
    return model


def ragged(count: int, seed: int) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = [3 + (i * 5) % 7 for i in range(count)]
    return [{"input_ids": torch.randint(3, 300, (n,), generator=generator).tolist()} for n in lengths]
