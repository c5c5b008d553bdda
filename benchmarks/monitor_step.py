"""Time of a training step that a monitor observes, relative to the same step without a monitor.

    python benchmarks/monitor_step.py --sizes small medium --repeats 15 --out results/monitor_step.json

Pairs of steps side by side, taking turns at being first, medians over the pairs. By default every 20th step is observed, so
over a run it adds a twentieth of that.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpo_step
import torch
from datasets import Dataset
from grpo_step import everything, half, loras, make_model, subspace_adapters
from rich.console import Console
from rich.table import Table
from step_time import hardware
from steps import ROUTES, ROWS, SIZES, Step, compare, row_labels

from routed_peft import RoutedTrainer, RoutedTrainingArguments, presets
from routed_peft.data import train_tokenizer
from routed_peft.monitoring import MonitorConfig, RegionMonitor
from routed_peft.runs.provenance import versions

KINDS = ("GRPO, LoRA", "GRPO, subspace", "fine-tuning, hidden units")
LIMIT = 1.05
EVERY = MonitorConfig().every


def trainer_of(name: str, kind: str, device: str, folder: Path) -> tuple[Any, Any]:
    """Return a trainer that has made one step already, and the inputs of its next step."""
    size = grpo_step.SIZES[name]
    if kind == "GRPO, LoRA":
        routed = {"routes": presets.classic("hack"), "label_fn": half}
        return grpo_step.trainer_of(size, make_model(size, loras("all-linear")), folder, device, routed)
    if kind == "GRPO, subspace":
        routed = {"routes": presets.subspace("hack"), "label_fn": everything}
        return grpo_step.trainer_of(size, make_model(size, subspace_adapters(size, folder)), folder, device, routed)
    ids = SIZES[name].batch("cpu")["input_ids"].tolist()
    labels = [list(ROUTES)[index] for index in row_labels(0.5).tolist()]
    data = Dataset.from_dict({"input_ids": ids, "route_label": labels, "route_environment": ["A", "B"] * (ROWS // 2)})
    args = RoutedTrainingArguments(
        str(folder), max_steps=1, per_device_train_batch_size=ROWS, train_base=True, report_to="none", save_strategy="no",
        disable_tqdm=True, use_cpu=device == "cpu", learning_rate=1e-6, logging_strategy="no",
    )  # fmt: skip
    trainer = RoutedTrainer(
        SIZES[name].model(device),
        args,
        routes=ROUTES,
        train_dataset=data,
        processing_class=train_tokenizer(["a"], vocab_size=258),
    )
    trainer.train()
    return trainer, next(iter(trainer.get_train_dataloader()))


def step_of(trainer: Any, batch: Any) -> Step:
    """Return a whole optimizer step, with all that callbacks do around it."""
    handler, told = trainer.callback_handler, (trainer.args, trainer.state, trainer.control)

    def step() -> None:
        torch.manual_seed(0)
        handler.on_step_begin(*told)
        trainer.training_step(trainer.model_wrapped, list(batch) if isinstance(batch, list) else dict(batch), None)
        trainer._clip_grad_norm(trainer.model_wrapped)
        handler.on_pre_optimizer_step(*told)
        trainer.optimizer.step()
        handler.on_optimizer_step(*told)
        trainer.optimizer.zero_grad()
        handler.on_step_end(*told)

    return step


def measure(name: str, device: str, repeats: int, folder: Path) -> dict[str, dict[str, float]]:
    """Return, by kind of run, the ratio of an observed step to one without a monitor."""
    found: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        plain = step_of(*trainer_of(name, kind, device, folder))
        trainer, batch = trainer_of(name, kind, device, folder)
        RegionMonitor(trainer, MonitorConfig(every=1, action="log"))
        found |= compare(plain, {kind: step_of(trainer, batch)}, repeats, device)
    return found


def show(report: dict[str, Any]) -> None:
    table = Table(
        "size", "run", "observed (quartiles)", "all steps", "limit", "", title=f"Steps, one in {EVERY} observed"
    )
    for target in report["targets"]:
        row = report["sizes"][target["size"]][target["kind"]]
        ratio = f"{row['ratio']:.3f} ({row['lower_quartile']:.2f}–{row['upper_quartile']:.2f})"
        met = "met" if target["met"] else "missed"
        table.add_row(target["size"], target["kind"], ratio, f"{target['value']:.3f}", f"{target['limit']:.2f}", met)
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=grpo_step.SIZES, default=["small", "medium"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("results/monitor_step.json"), help="JSON file to write")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="on the CPU; one thread is timed by its own clock")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    report: dict[str, Any] = {
        "hardware": hardware(args.device),
        "versions": {**versions(), "python": platform.python_version()},
        "threads": args.threads,
        "repeats": args.repeats,
        "every": EVERY,
    }
    with tempfile.TemporaryDirectory() as folder:
        report["sizes"] = {name: measure(name, args.device, args.repeats, Path(folder)) for name in args.sizes}
    report["targets"] = []
    for size, result in report["sizes"].items():
        for kind, row in result.items():
            value = 1 + (row["ratio"] - 1) / EVERY
            report["targets"].append(
                {"size": size, "kind": kind, "limit": LIMIT, "value": value, "met": value <= LIMIT}
            )
    show(report)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    main()
