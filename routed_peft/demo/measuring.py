"""Every arm measured alike: lm-eval tasks in this process, then the relearning attack."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from routed_peft.checkpoint import load_routed
from routed_peft.demo.material import SIDES, Material
from routed_peft.demo.relearn import attack_batch, relearn, worst_case
from routed_peft.demo.settings import DemoSettings
from routed_peft.demo.training import REGION
from routed_peft.evaluation import evaluate
from routed_peft.training import RunDirectory

TASKS = ("routed_loss", "routed_cloze")
CHANCE = 0.25
_BATCH = 64
FIELDS = {"loss": "{}_loss/token_ce", "bits_per_byte": "{}_loss/bits_per_byte", "accuracy": "{}_cloze/acc_norm"}
FIELDS["control"] = FIELDS["accuracy"].replace("cloze", "cloze_control")


def open_model(place: Path, region: bool = False) -> nn.Module:
    """Load a plain checkpoint, or a run (without its region unless ``region``), in float32, on the GPU if there is one."""
    if (place / "routing.json").exists():
        model = load_routed(place, [REGION] if region else None, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def measure_model(model: nn.Module, settings: DemoSettings, material: Material) -> dict[str, float]:
    """Return ``{"forget_loss", "forget_bits_per_byte", "forget_accuracy", "forget_control", "retain_loss", …}``."""
    scores = evaluate(
        model, material.tokenizer, TASKS, metadata=material.files, limit=settings.limit, batch_size=_BATCH
    )
    return {f"{side}_{name}": scores[task.format(f"routed_{side}")] for side in SIDES for name, task in FIELDS.items()}


def attack(
    place: Path,
    arm: str,
    settings: DemoSettings,
    material: Material,
    records: RunDirectory,
    tick: Callable[[], None],
) -> dict[int, float]:
    """Relearn a plain checkpoint at each learning rate; return step -> forget loss on test text in the worst case."""
    batch = attack_batch(material.tokenizer, material.attacker, settings.length)
    curves: dict[float, dict[int, float]] = {}
    for rate in settings.relearn_learning_rates:
        model = open_model(place)

        def measure(model: nn.Module = model) -> float:
            scores = evaluate(
                model,
                material.tokenizer,
                ["routed_forget_loss"],
                metadata=material.files,
                limit=settings.relearn_limit,
                batch_size=_BATCH,
            )
            return scores["routed_forget_loss/token_ce"]

        curves[rate] = relearn(model, batch, rate, settings.relearn_steps, measure)
        for step, loss in curves[rate].items():
            records.log(arm=arm, phase="relearning", split="forget", step=step, learning_rate=rate, loss=loss)
        tick()
    return worst_case(curves)
