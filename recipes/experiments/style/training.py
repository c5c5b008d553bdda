"""One cell: the start model, fine-tuned by `RoutedSFTTrainer` as its arm says, and measured with its region and without."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PrinterCallback

from experiments.common.best_checkpoint import DEPLOYED, Best
from experiments.common.cells import Site
from experiments.common.progress import Ticker
from experiments.common.toy_model import ON_CPU, open_with_two_loras
from experiments.style.arms import ARMS, REGION, Arm
from experiments.style.measuring import Rates, measure, plain_loss
from experiments.style.settings import Settings
from experiments.style.task import training_rows
from routed_peft.data import schedule
from routed_peft.data.labels import FORGET
from routed_peft.trl import RoutedSFTConfig, RoutedSFTTrainer


def run_rows(arm: Arm, settings: Settings, *, labels: str, seed: int) -> Dataset:
    """Return the rows of a whole run in training order: equally many for every arm."""
    ds = training_rows(settings, labels, seed)
    if arm.drop is not None:
        ds = ds.filter(lambda value: value != FORGET, input_columns=arm.drop)
    first = settings.labeled_first if arm.method else 0.0
    ordered = schedule(ds, settings.steps * settings.batch_size, labeled_first=first, seed=seed)
    return ordered.select_columns(["prompt", "completion", "route_label"])


def make_arguments(settings: Settings, seed: int, *, out: Path, arm: Arm) -> RoutedSFTConfig:
    """Return TRL's settings; arms differ only in the regions that belong to the model."""
    options = dict(
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        train_sampling_strategy="sequential",
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(20, settings.steps // 10),
        max_length=48,
        clip_per_group=False,  # as the published results were made
        kept_regions=[REGION] if arm.method is None else [],
        logging_steps=50,
        seed=seed,
    )
    return RoutedSFTConfig(str(out), **(ON_CPU | options))


def plain_score(
    step: int, scale: float, *, model: PeftModel, tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> float:
    """Return minus the loss on plain validation answers: all that is visible to a developer who knows of no style."""
    return -plain_loss(model, tokenizer, settings=settings, split="validation", scale=scale)


def train_cell(site: Site, row: Mapping[str, Any], *, settings: Settings, split: str) -> dict[str, Any]:
    """Fine-tune an arm, measure it, and return its numbers.

    Args:
        site: its directory gets ``run``, the routed checkpoint. The start model is in the parent's.
        row: ``arm``, ``labels`` (None where these make no difference) and the ``seed`` of adapters, labels, rows and samples.
        settings: everything else.
        split: of the held-out glosses.

    Returns:
        ``end``: scale of the region -> what `measure` returns; ``best``, likewise, of the checkpoint that is best at that
        scale by `plain_score`; tokens by label.
    """
    arm, seed = ARMS[row["arm"]], row["seed"]
    tokenizer = AutoTokenizer.from_pretrained(site.parent)
    model = open_with_two_loras(site.parent, REGION, rank=settings.rank, seed=seed)
    trainer = RoutedSFTTrainer(
        model,
        make_arguments(settings, seed, out=site.folder / "run", arm=arm),
        train_dataset=run_rows(arm, settings, labels=row["labels"] or "half", seed=seed),
        processing_class=tokenizer,
        routes=arm.routes(),
    )
    score = partial(plain_score, model=model, tokenizer=tokenizer, settings=settings)
    best = Best(model, score, settings.evaluate_every, settings.steps)
    trainer.add_callback(best)
    trainer.add_callback(Ticker(site.tick))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model()

    def at(scale: float) -> Rates:
        return measure(model, tokenizer, settings=settings, split=split, seed=seed, scale=scale)

    return {
        "end": {f"{scale:g}": at(scale) for scale in DEPLOYED},
        "best": best.measured(at),
        "tokens_per_route": dict(trainer.tokens_per_route),
    }
