"""Training of a cell's model: the demo's, and as published for ERA and DEMix."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from datasets import Dataset
from peft import PeftMixedModel, PeftModel, get_peft_model
from transformers import TrainerCallback

from experiments.removal.settings import MethodArm, Settings
from routed_peft import presets
from routed_peft.demo import training as demo
from routed_peft.demo.material import Material
from routed_peft.demo.training import REGION
from routed_peft.regions import RoutedConfig
from routed_peft.routes import Route
from routed_peft.training import RoutedTrainingArguments, RunDirectory, SelfLabeledRows

OTHER_EXPERT = "retain"
SHARED = 12
"""Where either side has an expert, one in so many of the MLP's hidden units stays with the base."""


def regions_of(arm: MethodArm) -> tuple[list[str], list[str]]:
    """Return the regions of an arm's model, and those of them that its plain checkpoint keeps.

    >>> from experiments.removal.settings import DEMO_ARMS
    >>> {name: regions_of(DEMO_ARMS[name]) for name in ("filter", "routed")}
    {'filter': (['forget'], ['forget']), 'routed': (['forget'], [])}
    """
    if arm.demix:
        return [REGION, OTHER_EXPERT], [OTHER_EXPERT]
    return [REGION], [] if arm.routed else [REGION]


def build_model(arm: MethodArm, settings: Settings, material: Material) -> PeftModel | PeftMixedModel:
    """Return a fresh model with its region; or one with two experts.

    Of those, either is as large as region and MLP are elsewhere, less the units that stay with the base.
    """
    if not arm.demix:
        return demo.build_model(settings, material)
    shared = settings.intermediate_size // SHARED
    size = settings.intermediate_size + settings.region_size - shared
    region = RoutedConfig(kind="mlp", size=size, init="model", task_type="CAUSAL_LM")
    bare = demo.bare_model(replace(settings, intermediate_size=shared), material)
    model = get_peft_model(bare, region, adapter_name=REGION)
    model.add_adapter(OTHER_EXPERT, region)
    return model


def arguments(arm: MethodArm, settings: Settings, folder: Path) -> RoutedTrainingArguments:
    """Return the training arguments of an arm."""
    args = demo.arguments(arm, settings, folder)
    args.kept_regions = regions_of(arm)[1]
    args.region_learning_rate = settings.region_learning_rate if arm.routed else None
    if arm.era:
        args.edges, args.activation_l1 = "activations", 1e-4
        args.route_layers = list(range(settings.layers - 1))  # as in the paper, not the last ones
    return args


def routes_of(arm: MethodArm, settings: Settings) -> dict[str, Route]:
    """Return the routes of an arm."""
    if arm.demix:
        return presets.demix(REGION, OTHER_EXPERT)
    if arm.era:
        return presets.era(REGION)
    if not arm.routed:
        return presets.control()
    # where tokens have weights of their own for the base, these multiply the route's
    return presets.sgtm(REGION, 1.0 if settings.frequency_weights else settings.base_weight)


def train(
    arm: MethodArm,
    settings: Settings,
    *,
    material: Material,
    run: Dataset | SelfLabeledRows,
    folder: Path,
    records: RunDirectory,
    watcher: TrainerCallback,
) -> dict[str, int]:
    """Train an arm, save it to ``folder/run``, export its plain checkpoint beside that, and return tokens seen per label."""
    return demo.train_arm(
        arm,
        build_model(arm, settings, material),
        args=arguments(arm, settings, folder / "run"),
        routes=routes_of(arm, settings),
        material=material,
        run=run,
        records=records,
        watcher=watcher,
    )
