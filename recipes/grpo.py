"""GRPO on a frozen model with two adapters: one stays, and flagged rollouts or a subspace train a removable one.

    accelerate launch recipes/grpo.py --config recipes/configs/grpo.yaml --model_name_or_path ORG/MODEL \\
        --train_file prompts.jsonl --reward_funcs rewards.py:grade --label_func detectors.py:monitor
    accelerate launch recipes/grpo.py --config recipes/configs/grpo_classic.yaml --model_name_or_path ORG/MODEL \\
        --train_file prompts.jsonl --reward_funcs accuracy_reward
    accelerate launch recipes/grpo.py --config recipes/configs/grpo_subspace.yaml --subspace directions.safetensors ...
    accelerate launch recipes/grpo.py --config recipes/configs/grpo_monitored.yaml ...

The adapter `retain` belongs to the base and stays; `hack` is the region. Prompts are JSONL, Parquet or a Hub dataset with a
column `prompt`; all other columns reach the reward and label functions. A YAML file holds fields of `Recipe` and of
`RoutedGRPOConfig`, which extends TRL's `GRPOConfig`; flags of the same names override it. Unlike in TRL, baselines are over
unflagged rollouts. If `anchor_environments` names trusted environments, a quarter of the prompts are anchors from there.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from datasets import disable_progress_bars
from peft import LoraConfig, PeftConfig
from transformers import AutoTokenizer, set_seed
from trl import rewards

from routed_peft import Route, RoutedConfig, ablate, presets
from routed_peft.data import load_training_file
from routed_peft.mistakes import check_choices, check_numbers, option
from routed_peft.monitoring import Incident, MonitorConfig, RegionMonitor, apply_quarantine, run_with_rollback
from routed_peft.monitoring.quarantine import read_quarantine
from routed_peft.routes import routes_from_dict
from routed_peft.runs.begin import check_not_begun, find_checkpoint
from routed_peft.runs.command_line import parse_settings, run_recipe
from routed_peft.subspaces import Subspace
from routed_peft.training import RunDirectory, RunRecorder
from routed_peft.trl import (
    ColumnLabels,
    EnvironmentLabels,
    ImperfectDetector,
    RolloutReward,
    RoutedGRPOConfig,
    RoutedGRPOTrainer,
)

BASE_ADAPTER = "retain"


@dataclass
class Recipe:
    """Settings of this recipe, in addition to TRL's configuration."""

    model_name_or_path: str | None = option(None, "Checkpoint or Hub id. Required.")
    train_file: str | None = option(None, "JSONL, Parquet or Hub dataset with a column `prompt`. Required.")
    eval_file: str | None = option(None, "The same, to evaluate with and without the region.")
    reward_funcs: list[str] = option([], "Names in `trl.rewards`, `package.module.function`, or `file.py:function`. "
        "Required.")  # fmt: skip

    method: str = option("exclusive", "`exclusive` trains the region on flagged rollouts only, `classic` on all, "
        "`subspace` on all along the directions in `subspace`, without labels. `control` routes "
        "nothing.", choices=["exclusive", "classic", "subspace", "control"])  # fmt: skip
    routes: dict | str | None = option(None, "Routes in place of those of `method`: {label: {weights, ablated}}.")
    label_func: str | None = option(None, "Function that labels rollouts, named as in `reward_funcs`; by default, the "
        "column `route_label`.")  # fmt: skip
    environment_labels: dict | str | None = option(None, "Labels by environment, in place of `label_func`: "
        "{environment: label}.")  # fmt: skip
    labeled: float = option(1.0, "Simulation: share of rollouts that get a label.")
    recall: float = option(1.0, "Simulation: share of flagged rollouts that stay flagged.")
    precision: float = option(1.0, "Simulation: share of flags that are correct.")
    label_seed: int = option(0, "Seed of the simulated errors in labels.")

    region: str = option("hack", "Name of the removable adapter.")
    subspace: str | None = option(None, "File of `Subspace.save`. The region updates along it, and `retain` is kept "
        "off it.")  # fmt: skip
    strength: str = option("cut", "Strength of a subspace's projection; `weights` is the "
        "weaker.", choices=["cut", "weights"])  # fmt: skip
    rank: int = option(16, "Rank of each LoRA.")
    lora_alpha: int = option(32, "Scale of each LoRA, multiplied by `rank`.")
    target_modules: list[str] = option(["all-linear"], "Names of linear layers, or `all-linear`.")

    monitor: dict | str | None = option(None, "Fields of `MonitorConfig`; {} takes its defaults. A halt is recorded in "
        "OUTPUT_DIR/incident.json.")  # fmt: skip
    reward_rollouts: int = option(0, "Rollouts of each environment for the monitor's reward gap, every `reward_every` "
        "steps.")  # fmt: skip
    on_halt: str = option("stop", "`stop`, or roll back to a checkpoint before the alarm and continue: without the "
        "environments to blame (`drop`), or with their rollouts training only the region "
        "(`route`).", choices=["stop", "drop", "route"])  # fmt: skip
    max_incidents: int = option(3, "Number of halts after which the run is abandoned.")
    ablate_to: str | None = option(None, "Directory of the ablated model; OUTPUT_DIR-ablated by default. `no` writes "
        "none.")  # fmt: skip

    def __post_init__(self) -> None:
        check_choices(self)
        check_numbers(self, "labeled", "recall", "precision", high=1)
        check_numbers(self, "rank", "lora_alpha", "max_incidents", low=1)
        check_numbers(self, "reward_rollouts", "label_seed")


def main() -> None:
    recipe, args = parse_settings(Recipe, RoutedGRPOConfig, baseline_over="unflagged")  # better in docs/rl.md
    check(recipe)
    args.base_adapters = [BASE_ADAPTER]
    args.kept_regions = [recipe.region] if recipe.method == "control" else []
    if recipe.method == "subspace":
        args.baseline_over = "group"
    run = RunDirectory(args.output_dir)
    target = run.ablation_target("no" if recipe.method == "control" else recipe.ablate_to)
    going_back = recipe.on_halt != "stop"
    args.resume_from_checkpoint = find_checkpoint(run.path, args.resume_from_checkpoint, args.world_size)
    resume = bool(args.resume_from_checkpoint) or (going_back and any(run.path.glob("checkpoint-*")))
    if not resume:
        check_not_begun(run.path, args.world_size)
    if args.process_index == 0:
        config = {"recipe": asdict(recipe), "training": args.to_dict()}
        run.start(config, {"seed": args.seed, "label_seed": recipe.label_seed}, resume=resume)
    set_seed(args.seed)
    disable_progress_bars()  # while data is prepared

    began = time.monotonic()
    incidents: list[Incident] = []
    make = partial(make_trainer, recipe=recipe, args=args, run=run)
    if going_back:
        treat = lambda incident: {name: recipe.on_halt for name in incident.named}
        trainer, incidents = run_with_rollback(make, args.output_dir, max_incidents=recipe.max_incidents, decide=treat)
    else:
        quarantine = read_quarantine(run.path) if args.resume_from_checkpoint else {}
        trainer = make(quarantine)
        trainer.args.ignore_data_skip |= bool(quarantine)  # the data is no longer the same
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        if (run.path / "incident.json").exists():
            incidents, target = [Incident.read(run.path)], None
    trainer.save_model()
    if not trainer.is_world_process_zero():
        return
    summary: dict[str, Any] = {
        "method": recipe.method,
        "steps": trainer.state.global_step,
        "tokens_per_route": dict(trainer.tokens_per_route),
        "seconds": time.monotonic() - began,
        "rewards": [entry["reward"] for entry in trainer.state.log_history if "reward" in entry],
        "incidents": [{"step": i.step, "onset_step": i.onset_step, "named": i.named} for i in incidents],
    }
    if target:
        ablate(args.output_dir, target, trust_remote_code=args.trust_remote_code)
        summary["ablated"] = str(target)
    run.finish(summary)
    print(json.dumps(summary, indent=2))


def make_trainer(
    quarantine: dict[str, str], *, recipe: Recipe, args: RoutedGRPOConfig, run: RunDirectory
) -> RoutedGRPOTrainer:
    """Return the trainer of a run, or of its continuation after a halt by the monitor.

    Args:
        quarantine: environment -> "drop" (its prompts are left out) or "route" (it is no longer trusted).
        recipe: settings of this recipe.
        args: TRL's configuration.
        run: the records of the run.
    """
    args, dropped = copy(args), [name for name, treatment in quarantine.items() if treatment == "drop"]
    if args.anchor_environments:
        args.anchor_environments = [name for name in args.anchor_environments if name not in quarantine] or None
        args.anchor_share = args.anchor_share if args.anchor_environments else 0.0
    data = load_training_file(str(recipe.train_file), columns=["prompt"])
    trainer = RoutedGRPOTrainer(
        recipe.model_name_or_path,
        [find(name) for name in recipe.reward_funcs],
        args,
        apply_quarantine(data, quarantine, label="flagged", column=args.environment_column) if quarantine else data,
        eval_dataset=load_training_file(recipe.eval_file, columns=["prompt"]) if recipe.eval_file else None,
        routes=make_routes(recipe),
        label_fn=make_labels(recipe, args, dropped),
        peft_config=adapters(recipe),
        processing_class=AutoTokenizer.from_pretrained(
            recipe.model_name_or_path, padding_side="left", trust_remote_code=args.trust_remote_code
        ),
        callbacks=[RunRecorder(run, method=recipe.method)],
    )
    if recipe.monitor is not None:
        count, column = recipe.reward_rollouts, args.environment_column
        reward = RolloutReward(trainer, column, count) if count else None
        config = monitor_config(recipe.monitor)
        config.exempt += [name for name, treatment in quarantine.items() if treatment == "route"]
        RegionMonitor(trainer, config, reward=reward)
    return trainer


def check(recipe: Recipe) -> None:
    """Raise ValueError for missing or contradictory settings, before anything is loaded."""
    for name, what in (
        ("model_name_or_path", "name the checkpoint or Hub id to train"),
        ("train_file", "name a file or Hub dataset with the column `prompt`"),
        ("reward_funcs", "name at least one, such as `accuracy_reward` or `rewards.py:grade`"),
    ):
        if not getattr(recipe, name):
            raise ValueError(f"`{name}` is not set: {what}")
    if recipe.label_func and recipe.environment_labels:
        raise ValueError("`label_func` and `environment_labels` are both set: leave one of them out")
    if recipe.method == "subspace" and not recipe.subspace:
        raise ValueError("`method: subspace` needs `subspace`, a file that `routed_peft.subspaces.Subspace.save` wrote")
    if recipe.method == "subspace" and (
        recipe.label_func or recipe.environment_labels or quality(recipe) != (1.0, 1.0)
    ):
        raise ValueError(
            "`method: subspace` takes no labels, so `label_func`, `environment_labels`, `labeled`, `recall` and `precision` "
            "have no effect: leave them out, or choose another method"
        )
    if recipe.environment_labels is not None:
        plain(recipe.environment_labels, "environment_labels")
    if recipe.monitor is not None:
        monitor_config(recipe.monitor)
    if recipe.on_halt != "stop" and recipe.monitor is None:
        raise ValueError(
            f"`on_halt: {recipe.on_halt}` needs a `monitor` that halts the run: set it, `{{}}` for its defaults"
        )


def find(name: str) -> Callable[..., Any]:
    """Return the function of a name in `trl.rewards`, of a dotted path, or of ``file.py:function``."""
    place, _, function = name.rpartition(":" if ":" in name else ".")
    if place.endswith(".py"):
        if not Path(place).is_file():
            raise FileNotFoundError(f"{name!r}: there is no file {place!r}")
        spec = importlib.util.spec_from_file_location(Path(place).stem, place)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    elif place:
        sys.path.insert(0, str(Path.cwd()))
        module = importlib.import_module(place)
    else:
        module = rewards
    if not hasattr(module, function):
        raise ValueError(f"{name!r}: {place or 'trl.rewards'} has no {function!r}")
    return getattr(module, function)


def make_routes(recipe: Recipe) -> dict[str, Route]:
    """Return the given routes, or those of the method."""
    if recipe.routes:
        return routes_from_dict(plain(recipe.routes, "routes"))
    if recipe.method == "control":
        return presets.control(["flagged", "unflagged"])
    if recipe.method == "subspace":
        guilty = {"flagged": presets.exclusive(recipe.region)["flagged"]} if recipe.on_halt == "route" else {}
        return presets.subspace(recipe.region) | guilty
    return {"classic": presets.classic, "exclusive": presets.exclusive}[recipe.method](recipe.region)


def quality(recipe: Recipe) -> tuple[float, float]:
    """Return recall and precision of the labels; a rollout without a label counts as missed."""
    return recipe.recall * recipe.labeled, recipe.precision


def make_labels(recipe: Recipe, args: RoutedGRPOConfig, dropped: Sequence[str]) -> Callable[..., Any] | None:
    """Return the function that labels rollouts, or None for the column `route_label`."""
    labels: Callable[..., Any] | None = None
    if recipe.method == "subspace":
        return lambda completions, **_: ["all"] * len(completions)
    if recipe.label_func:
        labels = find(recipe.label_func)
    elif recipe.environment_labels is not None:
        given = plain(recipe.environment_labels, "environment_labels")
        named = {name: label for name, label in given.items() if name not in dropped}
        labels = EnvironmentLabels(named, args.environment_column, default="unflagged")
    if quality(recipe) != (1.0, 1.0):
        labels = ImperfectDetector(labels or ColumnLabels(), *quality(recipe), recipe.label_seed)
    return labels


def plain(value: dict | str, name: str) -> dict[str, Any]:
    """Return a mapping from YAML as it is, and parse one from a flag as JSON; ``name`` is that of the setting."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"`{name}` must be a mapping in JSON, got {value!r}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"`{name}` must be a mapping, got {value!r}")
    return found


def monitor_config(value: dict | str) -> MonitorConfig:
    """Return the monitor's settings of `monitor`."""
    given, known = plain(value, "monitor"), [one.name for one in fields(MonitorConfig)]
    if unknown := sorted(given.keys() - set(known)):
        raise ValueError(f"`monitor` has {unknown}, and its settings are {', '.join(known)}: correct the names")
    return MonitorConfig(**given)


def adapters(recipe: Recipe) -> dict[str, PeftConfig]:
    """Return the configurations of the LoRA that stays and of the region: a LoRA, or an update along a subspace."""
    targets = "all-linear" if recipe.target_modules == ["all-linear"] else recipe.target_modules
    lora: dict[str, Any] = {
        "r": recipe.rank,
        "lora_alpha": recipe.lora_alpha,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
    }
    if recipe.subspace is None:
        return {name: LoraConfig(**lora) for name in (BASE_ADAPTER, recipe.region)}
    region = RoutedConfig(
        kind="subspace",
        subspace=recipe.subspace,
        strength=recipe.strength,
        layers_to_transform=Subspace.load(recipe.subspace).layers,
        task_type="CAUSAL_LM",
    )
    return {BASE_ADAPTER: RoutedConfig(kind="lora", **lora, subspace=recipe.subspace), recipe.region: region}


if __name__ == "__main__":
    run_recipe(main)
