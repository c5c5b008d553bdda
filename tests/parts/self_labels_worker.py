"""Runs of `test_self_labels_distributed`: in its own process, and in two by torchrun with this file as a script."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from self_label_parts import SELF_LABELING, self_labeled, self_labeled_topics, swapped, topics_model, two_alphabets
from training_parts import train, weights

from routed_peft import presets
from routed_peft.data import train_tokenizer
from routed_peft.training import SelfLabelConfig, SelfLabeledRows

# torchrun sets these
RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
SEPARATOR = 1


def unlabeled_one_short() -> SelfLabeledRows:
    """The rows to score are odd in number, so that processes cannot share them equally."""
    return self_labeled(two_alphabets().select(range(159)), robust_share=0.2)


def overruled_twice() -> SelfLabeledRows:
    rows = swapped(two_alphabets(), range(0, 120, 23))
    return self_labeled(rows, first_forget_share=0.5, overrule=True, score_again_at=0.7, threshold="median")


def documents() -> SelfLabeledRows:
    """Two documents in each row; unlabeled rows have one of either side."""
    rows = two_alphabets().to_list()
    for row in rows:
        row["input_ids"][3] = row["input_ids"][7] = SEPARATOR
        row["side"] = [row["side"]] * 8
    for one, other in zip(rows[120::2], rows[121::2], strict=True):
        for name in ("input_ids", "side"):
            one[name][4:], other[name][4:] = other[name][4:], one[name][4:]
    config = SelfLabelConfig(labeled_first=0.5, forget_share=0.25, first_forget_share=0.25)
    return SelfLabeledRows(two_alphabets().from_list(rows[:-1]), 160, config=config, separator=SEPARATOR)


CASES = {
    "one short": unlabeled_one_short,
    "overruled twice": overruled_twice,
    "documents": documents,
    "topics": self_labeled_topics,
}
OPTIONS = SELF_LABELING | {
    "per_device_train_batch_size": 8 // PROCESSES, "adam_epsilon": 1e-3, "include_num_input_tokens_seen": "all",
    "save_strategy": "steps", "save_steps": 12,
}  # fmt: skip


def run(out: Path, case: str, resume: bool = False) -> dict[str, Any]:
    """Return weights, labels and cost of a run with self-labels, or of its second part."""
    data, tokenizer = CASES[case](), train_tokenizer(["a"], vocab_size=258)
    checkpoint = str(out / "checkpoint-12") if resume else None
    own: dict[str, Any] = (
        {"routes": presets.gram(data.regions, "retain"), "model": topics_model()} if data.regions else {}
    )
    trainer = train(out, tokenizer, dataset=data, resume=checkpoint, **OPTIONS, **own)
    logged = [line for line in trainer.state.log_history if "self_labels_retain" in line]
    return {
        "parameters": weights(trainer.accelerator.unwrap_model(trainer.model)),
        "labels": data.labels.tolist(),
        "scorings": data.scorings,
        "sides": data.in_order("side"),
        "tokens_per_route": dict(trainer.tokens_per_route),
        "logged": [{name: line[name] for name in line if "self_labels" in name} for line in logged],
        "ledger": trainer.run_summary().get("ledger"),
    }


def main(out: Path) -> None:
    torch.set_num_threads(1)
    found = {case: run(out / case, case) for case in CASES}
    found["resumed"] = run(out / "one short", "one short", resume=True)
    torch.save(found, out / f"results-{RANK}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
