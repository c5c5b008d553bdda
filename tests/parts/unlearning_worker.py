"""Runs of `test_unlearning_distributed`: in its own process, and in two by torchrun with this file as a script."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from families import tiny
from unlearning_parts import arguments, ragged

from routed_peft.unlearning import UndoArguments, undo, unlearn

PROCESSES = int(os.environ.get("WORLD_SIZE", 1))
OPTIMIZER: dict[str, Any] = {"optim": "sgd", "learning_rate": 1e-2, "max_grad_norm": 0.0, "max_steps": 4}
METHODS: dict[str, dict[str, Any]] = {
    "graddiff": {},
    "npo": {"retain_loss": "kl", "gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
    "rmu": {"steering": 1.0},
}


def run(out: Path) -> dict[str, Any]:
    """Return parameters and ledger of every case; rows and processes have unequal numbers of tokens."""
    found: dict[str, Any] = {}
    batch = {"per_device_train_batch_size": 4 // PROCESSES}
    forget, retain = ragged(9, 0), ragged(11, 1)
    for method, options in METHODS.items():
        model = tiny("llama", torch.float64, num_hidden_layers=3, vocab_size=300)
        _, ledger = unlearn(
            model, forget, retain_rows=retain, args=arguments(out / method, method, **{**OPTIMIZER, **batch, **options})
        )
        found[method] = {"parameters": dict(model.named_parameters()), "ledger": ledger.to_dict()}
    for name, topk in (("undo", None), ("undo from stored outputs", 5)):
        args = UndoArguments(
            str(out / name), **{**OPTIMIZER, "max_steps": 6}, **batch, eval_strategy="steps", eval_steps=2, use_cpu=True,
            tolerance=0.4, topk=topk, report_to="none", save_strategy="no", disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        teacher = tiny("llama", vocab_size=300)
        student, record = undo(teacher, forget + retain, args=args, retain_rows=retain)
        found[name] = {"parameters": dict(student.named_parameters()), "ledger": record.ledger.to_dict()}
        found[name]["record"] = {"steps": record.steps, "stopped": record.stopped}
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.save(run(folder), folder / f"results-{os.environ['RANK']}.pt")
