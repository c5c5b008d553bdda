"""Worker of `test_distributed`, run in two processes by torchrun (this file as a script) and in the test's own."""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from families import tiny
from monitor_parts import monitored, quiet
from monitor_parts import rows as rows_of_environments
from peft import get_peft_model
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from routed_peft import GradientRouting, RoutedConfig, RoutedTrainer, RoutedTrainingArguments, presets
from routed_peft.data import train_tokenizer
from routed_peft.routes import Route
from routed_peft.training import RegionSchedule

STEPS = 20
TRAINER_CASES: dict[str, dict[str, Any]] = {
    "clipped": {"max_grad_norm": 0.1},
    "accumulated and clipped per group": {
        "gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "clip_per_group": True
    },
    "saved": {"save_strategy": "steps", "save_steps": STEPS // 2},
}  # fmt: skip
TRAINER_ROUTES = presets.sgtm("forget") | {"aux": Route(weights={"base": 0.0})}

FSDP_ROUTES = {
    "forget": Route(weights={"base": 0.0}),
    "retain": Route(ablated=("forget",)),
    "unlabeled": Route(),
    "mixed": Route(weights={"forget": 0.25, "base": -0.5}, ablated=("bio",)),
}
UNITS = {
    "layer": lambda m: type(m).__name__ in ("LlamaDecoderLayer", "GPT2Block"),
    "leaf": lambda m: bool(m._parameters),
}
FSDP_CASES = [
    (family, unit, checkpointing, attach)
    for family, unit, checkpointing, attach in itertools.product(
        ("llama", "gpt2"), UNITS, (False, True), ("before", "after")
    )
    if attach == "before" or not checkpointing
]


# torchrun sets these
RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def rows(accumulation: int) -> Dataset:
    """Rows in training order: of every four, two are rank 0's, and all `forget` rows are among these.

    Steps of four kinds take turns: all groups taught, each by one rank only; the same with other rows; nothing for the
    region; nothing for the base.
    """
    kinds = [
        ["forget", "forget", "retain", "retain"],
        ["forget", "forget", "retain", "unlabeled"],
        ["retain", "retain", "retain", "retain"],
        ["forget", "forget", "aux", "aux"],
    ]
    labels = [label for step in range(STEPS) for label in kinds[step % 4] * accumulation]
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 250, (4 + i % 5,), generator=generator).tolist() for i in range(len(labels))]
    return Dataset.from_dict({"input_ids": ids, "route_label": labels})


def two_regions(family: str, tied: bool) -> nn.Module:
    torch.manual_seed(0)
    base = tiny(family, vocab_size=300, tie_word_embeddings=tied)
    model = get_peft_model(base, RoutedConfig(size=5, init="model"), adapter_name="forget")
    model.add_adapter("bio", RoutedConfig(size=3, init="model"))
    return model


def train(
    out: Path, resume: str | None = None, schedule: RegionSchedule | None = None, **options: Any
) -> RoutedTrainer:
    torch.manual_seed(0)
    region = RoutedConfig(size=4, init="model") if schedule is None else RoutedConfig(size=4, r=2, embeddings="full")
    model = get_peft_model(tiny("llama", vocab_size=300), region, adapter_name="forget")
    data = rows(options.get("gradient_accumulation_steps", 1))
    if schedule is not None:  # which knows no `aux`; and unlabeled rows are read with the region on
        names = {"aux": "forget", "unlabeled": "retain"}
        data = data.map(lambda row: {"route_label": names.get(row["route_label"], row["route_label"])})
    # Adam divides by its second moment: with its own epsilon, rounding in gradients near zero would grow to whole steps
    defaults: dict[str, Any] = {
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-4,
    }
    trainer = RoutedTrainer(
        model,
        RoutedTrainingArguments(
            str(out), max_steps=STEPS, per_device_train_batch_size=4 // PROCESSES, train_sampling_strategy="sequential",
            lr_scheduler_type="constant", train_base=True, use_cpu=True, report_to="none", disable_tqdm=True,
            logging_strategy="no", **(defaults | options),
        ),
        routes=schedule or TRAINER_ROUTES,
        train_dataset=data,
        processing_class=train_tokenizer(["a"], vocab_size=258),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def result_of(trainer: RoutedTrainer) -> dict[str, Any]:
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {
        "parameters": {name: p.detach().clone() for name, p in model.named_parameters()},
        "tokens_per_route": dict(trainer.tokens_per_route),
        # in two processes the last row fills up the others' batches, and must count once
        "eval_loss": trainer.evaluate(rows(1).select(range(7)))["eval_loss"],
    }


def fsdp_gradients(family: str, unit: str, checkpointing: bool, attach: str) -> dict[str, torch.Tensor]:
    """Return the gradients of a mixed batch; each process takes its share of the rows. One process shards nothing."""
    model = two_regions(family, tied=unit == "layer").double().train()
    if checkpointing:
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    if attach == "before":
        routing = GradientRouting(model, FSDP_ROUTES, train_base=True)
    else:
        model.requires_grad_(True)
    if PROCESSES > 1:
        mesh = dist.init_device_mesh("cpu", (PROCESSES,))
        for module in list(model.modules()):
            if UNITS[unit](module):
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
    if attach == "after":
        routing = GradientRouting(model, FSDP_ROUTES, train_base=True)
    ids = torch.randint(3, 250, (8, 6), generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1, 0, 2, 0, 3, 0, 1])  # rank 0: forget only
    with sdpa_kernel(SDPBackend.MATH), routing(labels[RANK::PROCESSES]):
        logits = model(input_ids=ids[RANK::PROCESSES]).logits[:, :-1]
        # FSDP divides by the number of processes
        loss = (
            F.cross_entropy(logits.flatten(0, 1), ids[RANK::PROCESSES, 1:].flatten(), reduction="sum") * PROCESSES / 40
        )
        loss.backward()
    held = {id(p) for group in routing.groups for p in routing.parameters(group)}
    assert held == {id(p) for p in model.parameters()}, "the groups must hold the parameters that the model has now"
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in grads.items()}


def monitored_log(out: Path) -> list[dict[str, float]]:
    """Return what a monitored run logs; each environment is on one rank only."""
    data = rows_of_environments(64, environments=("pattern",) * 4 + ("noise",) * 4)
    options = {"per_device_train_batch_size": 8 // PROCESSES, "max_grad_norm": 0.05, "max_steps": 4}
    config = quiet(probe_rows=8 // PROCESSES, reward_every=2)
    trainer, monitor = monitored(out, config, dataset=data, train_sampling_strategy="sequential", **options)
    monitor.reward = lambda model, environment: float(next(model.parameters()).abs().sum()) + len(environment)
    trainer.train()
    return [line for line in trainer.state.log_history if "monitor/status" in line]


def main(out: Path) -> None:
    assert PROCESSES == 2
    torch.set_num_threads(1)
    results: dict[Any, Any] = {}
    for case, options in TRAINER_CASES.items():
        results[case] = result_of(train(out / case, **options))
    trainer = train(out / "saved", resume=str(out / "saved" / f"checkpoint-{STEPS // 2}"))
    results["resumed"] = result_of(trainer)
    trainer.save_model(str(out / f"saved by rank {RANK}"))
    for factor in (0.0, 2.0):
        schedule = RegionSchedule(["forget"], consistency=factor, consistency_every=1, rate=1.0)
        scheduled = train(out / "scheduled", schedule=schedule, gradient_accumulation_steps=2)
        results["scheduled", factor] = result_of(scheduled)
    results["monitored"] = monitored_log(out / "monitored")
    for fsdp_case in FSDP_CASES:
        results[fsdp_case] = fsdp_gradients(*fsdp_case)
    torch.save(results, out / f"results-{RANK}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
