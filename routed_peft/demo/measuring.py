"""Measurements of an arm: lm-eval tasks in this process, then a relearning attack."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from routed_peft.checkpoint import load_routed
from routed_peft.data import FORGET, RETAIN
from routed_peft.demo.material import SIDES, Material
from routed_peft.demo.settings import DemoSettings
from routed_peft.evaluation import evaluate
from routed_peft.evaluation.measures import worst_case
from routed_peft.evaluation.relearning import Attack, AttackData, Curve, RelearnOptions, read_texts, relearn
from routed_peft.evaluation.text_loss import TextLoss
from routed_peft.training import RunDirectory

TASKS = ("routed_loss", "routed_cloze")
QUESTIONED = ("biology",)
"""The pairs whose subjects the packaged questions are about."""
CHANCE = 0.25
_BATCH = 64
FIELDS = {"loss": "{}_loss/token_ce", "bits_per_byte": "{}_loss/bits_per_byte", "accuracy": "{}_cloze/acc_norm"}
FIELDS["control"] = FIELDS["accuracy"].replace("cloze", "cloze_control")


def open_model(place: Path, regions: Sequence[str] = ()) -> nn.Module:
    """Load a plain checkpoint, or a run with some of its regions, in float32, on the GPU if there is one."""
    if (place / "routing.json").exists():
        model = load_routed(place, regions, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def measure_model(model: nn.Module, settings: DemoSettings, material: Material) -> dict[str, float]:
    """Return ``{"forget_loss", "forget_bits_per_byte", "forget_accuracy", "forget_control", "retain_loss", …}``.

    Accuracies are left out where there are no questions about the pair.
    """
    tasks = TASKS if settings.pair in QUESTIONED else TASKS[:1]
    scores = evaluate(
        model, material.tokenizer, tasks=tasks, metadata=material.files, limit=settings.limit, batch_size=_BATCH
    )
    found = {f"{side}_{name}": task.format(f"routed_{side}") for side in SIDES for name, task in FIELDS.items()}
    return {name: scores[task] for name, task in found.items() if task in scores}


def attack(
    place: Path, arm: str, *, settings: DemoSettings, material: Material, records: RunDirectory, tick: Callable[[], Any]
) -> dict[int, float]:
    """Relearn a plain checkpoint at each learning rate; return step -> forget loss on test text in the worst case."""
    scored = {side: read_texts(material.files[f"{side}_file"], side, limit=settings.relearn_limit) for side in SIDES}
    data = AttackData(material.attacker, forget_test=scored[FORGET], retain_test=scored[RETAIN])
    model, steps = open_model(place), settings.relearn_steps
    loss = TextLoss(model, material.tokenizer, data.forget_test)

    def note(curve: Curve) -> None:
        for point in curve.points:
            about = {"step": point.step, "learning_rate": curve.learning_rate, "loss": point.scores[FORGET]}
            records.log(arm=arm, phase="relearning", split=FORGET, **about)
        tick()

    of = Attack("forget", batch_size=settings.relearn_documents, length=settings.length)
    options = RelearnOptions(extensions=0, measure=lambda attacked: {FORGET: loss(attacked)}, on_curve=note)
    grid: dict[str, Any] = {"learning_rates": settings.relearn_learning_rates, "seeds": [settings.seed], "steps": steps}
    curves = relearn(model, material.tokenizer, attack=of, data=data, **grid, options=options)
    worst = worst_case(steps, {curve.learning_rate: [curve.losses(FORGET)] for curve in curves})
    return {entry.step: entry.mean for entry in worst}
