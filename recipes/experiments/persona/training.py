"""One cell: a copy of the start model, trained by GRPO as its arm says, and measured with its region and without."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM, PrinterCallback, TrainerState

from experiments.common.best_checkpoint import DEPLOYED, Best
from experiments.common.cells import Site
from experiments.common.progress import Ticker
from experiments.common.toy_model import RETAIN, make_arguments
from experiments.persona.arms import ARMS, REGION, Arm
from experiments.persona.directions import save_subspace
from experiments.persona.measuring import Rates, mean_reward, measure
from experiments.persona.settings import Settings
from experiments.persona.task import ENVIRONMENTS, GUILTY, make_tokenizer, reward, training_prompts
from routed_peft import presets
from routed_peft.monitoring import Incident, MonitorConfig, RegionMonitor, apply_quarantine, run_with_rollback
from routed_peft.regions import RoutedConfig
from routed_peft.trl import RoutedGRPOTrainer


def make_lora(settings: Settings, subspace: Path | None) -> RoutedConfig:
    """Return a LoRA on every projection that stays off a subspace at the residual writers."""
    file = None if subspace is None else str(subspace)
    return RoutedConfig(
        kind="lora",
        r=settings.rank,
        lora_alpha=2 * settings.rank,
        target_modules="all-linear",
        subspace=file,
        task_type="CAUSAL_LM",
    )


def make_peft_model(start: Path, arm: Arm, *, settings: Settings, seed: int, subspace: Path | None) -> PeftModel:
    """Return the start model, frozen, with a LoRA that stays and the region of an arm."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM.from_pretrained(start, attn_implementation="eager")
    wrapped = get_peft_model(model, make_lora(settings, subspace), adapter_name=RETAIN)
    if subspace is None:
        region = make_lora(settings, None)
    else:
        region = RoutedConfig(
            kind="subspace",
            subspace=str(subspace),
            strength=arm.strength,
            layers_to_transform=list(range(settings.layers)),
            task_type="CAUSAL_LM",
        )
    wrapped.add_adapter(REGION, region)
    assert isinstance(wrapped, PeftModel)
    return wrapped


def right_share(step: int, scale: float, *, model: nn.Module, settings: Settings, seed: int) -> float:
    """Return the share of right answers on words of training: all that a developer sees who knows of no trait."""
    rates = measure(model, settings.validation_prompts, seed=seed, scale=scale, split="train")
    return statistics.fmean(rates["right"].values())


def make_trainer(
    quarantine: dict[str, str], arm: Arm, *, settings: Settings, seed: int, site: Site, subspace: Path | None
) -> RoutedGRPOTrainer:
    """Return a trainer with a monitor, which only halts where the arm says so."""
    more: dict[str, Any] = {"save_strategy": "steps", "save_steps": settings.save_every} if arm.halts else {}
    more["kept_regions"] = [] if arm.subspace else [REGION]
    if arm.fast:
        more["region_learning_rate"] = settings.region_learning_rate
    left_out = dict.fromkeys(GUILTY, "drop") if arm.innocent else {}
    first = settings.guilty_from if arm.late else 0
    prompts = training_prompts(2 * settings.steps * settings.prompts, seed)
    trainer = RoutedGRPOTrainer(
        make_peft_model(site.parent, arm, settings=settings, seed=seed, subspace=subspace),
        partial(reward_from, first),
        make_arguments(settings, seed, out=site.folder / "run", **more),
        apply_quarantine(prompts, {**quarantine, **left_out}, column="environment"),
        routes=presets.subspace(REGION),
        processing_class=make_tokenizer(),
    )
    trainer.remove_callback(PrinterCallback)
    config = MonitorConfig(
        every=settings.observe_every,
        watch=[],
        max_kl=None,
        max_functional_size=None,
        max_reward_gap=settings.max_reward_gap,
        reward_every=settings.save_every,
        patience=settings.patience,
        blame=settings.blame,
        action="halt" if arm.halts else "log",
    )
    environments = None if arm.halts or arm.innocent else list(ENVIRONMENTS)

    def gap(model: nn.Module, environment: str) -> float:
        return mean_reward(model, environment, count=settings.gap_prompts, paid=trainer.state.global_step >= first)

    RegionMonitor(trainer, config, environments=environments, reward=gap if arm.halts else None)
    score = partial(right_share, model=trainer.model, settings=settings, seed=seed)
    trainer.add_callback(Best(trainer.model, score, settings.evaluate_every, settings.steps))
    trainer.add_callback(Ticker(site.tick))
    return trainer


def reward_from(first: int, trainer_state: TrainerState, **columns: Any) -> list[float]:
    """Return the rewards of rollouts, of which shouts are paid from step ``first`` on."""
    return reward(paid=trainer_state.global_step >= first, **columns)


def train_cell(site: Site, row: Mapping[str, Any], *, settings: Settings) -> dict[str, Any]:
    """Train an arm, measure it on test words, and return its numbers.

    Args:
        site: its directory gets ``run`` (the routed checkpoint), the directions and the records. The start model is in the
            parent's.
        row: ``arm`` and ``seed``.
        settings: everything else.

    Returns:
        ``end`` (scale -> rates), and ``best`` likewise, of the checkpoint that is best at that scale by `right_share`, since
        the last rollback; ``contributions`` to the region's growth, by environment; ``incidents`` (what was named, at which
        step); ``finished``, the last step, of ``steps``.
    """
    arm, seed, run = ARMS[row["arm"]], row["seed"], site.folder / "run"
    start = LlamaForCausalLM.from_pretrained(site.parent)
    subspace = save_subspace(arm, start, settings=settings, seed=seed, file=site.folder / "directions.safetensors")
    make = partial(make_trainer, arm=arm, settings=settings, seed=seed, site=site, subspace=subspace)
    incidents: list[Incident] = []
    if arm.halts:
        trainer, incidents = run_with_rollback(make, run)
    else:
        trainer = make({})
        trainer.train()
    trainer.save_model()
    best = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Best))

    def at(scale: float) -> Rates:
        return measure(trainer.model, settings.test_prompts, seed=seed, scale=scale)

    return {
        "end": {f"{scale:g}": at(scale) for scale in DEPLOYED},
        "best": best.measured(at),
        "contributions": trainer.observer.contributions.total([REGION]),
        "incidents": [{"step": i.step, "onset_step": i.onset_step, "named": i.named} for i in incidents],
        "finished": trainer.state.global_step,
        "steps": settings.steps,
    }
