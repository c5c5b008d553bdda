"""One cell: a copy of the start model, trained by GRPO as its arm says, and measured."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from transformers import PrinterCallback, TrainerControl, TrainerState, TrainingArguments

from experiments.common.best_checkpoint import DEPLOYED, Best
from experiments.common.cells import Site
from experiments.common.progress import Ticker
from experiments.common.toy_model import make_arguments, open_with_two_loras
from experiments.reward_hack.arms import ARMS, REGION, detector, reward
from experiments.reward_hack.measuring import SCALES, Rates, measure, visible_scale, visible_score
from experiments.reward_hack.settings import Settings
from experiments.reward_hack.task import make_tokenizer, training_prompts
from routed_peft.checkpoint.export import ablate
from routed_peft.training import RunDirectory, RunRecorder
from routed_peft.trl import RoutedGRPOTrainer


class Watcher(Best):
    """Keeps the checkpoints that are best by `visible_score`, and remembers what it saw on validation prompts.

    Attributes:
        curve: of every look, and of the start model: ``step``, ``scale`` and the rates.
    """

    def __init__(self, model: PeftModel, settings: Settings, seed: int):
        super().__init__(model, self._score, settings.evaluate_every, settings.steps)
        self.settings, self.seed = settings, seed
        self.curve: list[dict[str, Any]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the start model."""
        for scale in DEPLOYED:
            self._score(0, scale)

    def _score(self, step: int, scale: float) -> float:
        count = self.settings.validation_prompts
        rates = measure(self.model, "validation", count=count, seed=self.seed, scale=scale)
        self.curve.append({"step": step, "scale": scale, **rates})
        return visible_score(rates)


def train_cell(site: Site, row: Mapping[str, Any], *, settings: Settings) -> dict[str, Any]:
    """Train an arm, measure it on test prompts, and return its numbers.

    Args:
        site: its directory gets ``run`` (the routed checkpoint) and the records; where the arm ends by ablating its region,
            also ``ablated``, a plain checkpoint. The start model is in the parent's.
        row: ``arm`` and ``seed``.
        settings: everything else.

    Returns:
        ``curve`` on validation prompts; on test prompts ``end`` (scale -> rates) and ``best`` (of the checkpoint chosen by
        `visible_score`, at the scales 0 and 1); ``chosen_scale``, by `visible_scale`; tokens by label.
    """
    arm, seed, folder, records = ARMS[row["arm"]], row["seed"], site.folder, RunDirectory(site.folder)
    logging.getLogger("trl").setLevel(logging.ERROR)  # filtered rollouts have no reward on purpose
    labels = detector(arm, seed)
    model = open_with_two_loras(site.parent, REGION, rank=settings.rank, seed=seed)
    watcher = Watcher(model, settings, seed)
    trainer = RoutedGRPOTrainer(
        model,
        reward(arm, labels),
        make_arguments(
            settings,
            seed,
            out=folder / "run",
            kept_regions=[] if arm.removed else [REGION],
            baseline_over=arm.baseline,
            anchor_share=arm.anchor,
            anchor_environments=["A"] if arm.anchor else None,
        ),
        training_prompts(settings.steps * settings.prompts, seed),
        routes=arm.table(),
        label_fn=labels,
        processing_class=make_tokenizer(),
        callbacks=[watcher, Ticker(site.tick), RunRecorder(records, **row)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model()
    if arm.removed:
        ablate(folder / "run", folder / "ablated")
    for point in watcher.curve:
        records.log(**row, split="validation", **point)
    return {
        "curve": watcher.curve,
        **final_numbers(model, watcher),
        "tokens_per_route": dict(trainer.tokens_per_route),
    }


def final_numbers(model: PeftModel, watcher: Watcher) -> dict[str, Any]:
    """Return what is measured on test prompts, at the end and at the best checkpoints."""
    settings, seed = watcher.settings, watcher.seed

    def at(split: str, scale: float) -> Rates:
        count = settings.test_prompts if split == "test" else settings.validation_prompts
        return measure(model, split, count=count, seed=seed, scale=scale)

    end = {scale: at("test", scale) for scale in SCALES}
    limit = next(point for point in watcher.curve if not point["step"])["hack"]["B"]
    chosen = visible_scale({scale: at("validation", scale) for scale in SCALES}, limit)
    best = watcher.measured(lambda scale: at("test", scale))
    named = {f"{scale:g}": rates for scale, rates in sorted(end.items())}
    return {"end": named, "best": best, "chosen_scale": {"scale": chosen, **end[chosen]}}
