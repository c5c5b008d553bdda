"""Make, measure and attack the model of one cell."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from torch import nn
from transformers import AutoTokenizer

from experiments.common.cells import NUMBERS, Site
from experiments.common.progress import Ticker
from experiments.removal.cells import Experiment, MethodCell
from experiments.removal.derive_cell import change
from experiments.removal.material import make_rows, run_of, share_of, tokens_by_side
from experiments.removal.settings import MethodArm, Settings
from experiments.removal.training import regions_of, train
from routed_peft.corpora import PAIRS, load_pair
from routed_peft.corpora.arithmetic import EQUIVALENT
from routed_peft.data import FORGET, RETAIN, UNLABELED, first_of, labeled_tokens
from routed_peft.demo.material import SIDES, Material
from routed_peft.demo.measuring import measure_model, open_model
from routed_peft.demo.training import REGION
from routed_peft.evaluation.measures import bootstrap, region_activity
from routed_peft.evaluation.relearning import Attack, AttackData, RelearnOptions, relearn
from routed_peft.evaluation.relearning.curves import check_settings
from routed_peft.evaluation.text_loss import TextLoss
from routed_peft.runs.cost import TrainingCost, matmul_parameters
from routed_peft.training import RunDirectory, SelfLabeledRows

UNRELATED = {pair: "biology" if pair == "spanish" else "spanish" for pair in PAIRS}
"""Pair -> the pair whose retain text is unrelated to both of its sides: English verses, or WordNet."""


def make(cell: MethodCell, site: Site) -> dict[str, Any]:
    """Train a cell's model, or change that of its parent, measure it, and return its numbers."""
    settings, arm, folder = cell.settings, cell.method.arm, site.folder
    material = Material.prepare(settings, folder / "data", partial(make_rows, relabel=cell.method.relabel))
    if cell.method.change:
        about = change(cell, site.parent, out=folder / cell.method.plain, material=material)
        return with_former(about, cell, site.parent) | measured(
            open_model(folder / cell.method.plain), settings, material
        )
    if cell.method.equal_retain:
        settings = replace(settings, steps=round(settings.steps * stretch(material, arm, settings)))
    run, records = run_of(material, arm, settings), RunDirectory(folder)
    records.start(asdict(settings) | {"method": cell.name}, seeds={"seed": settings.seed})
    labels = train(arm, settings, material=material, run=run, folder=folder, records=records, watcher=Ticker(site.tick))
    numbers: dict[str, Any] = {"tokens_by_side": tokens_by_side(run, settings.length), "targets_by_label": labels}
    if cell.method.labels:
        numbers["unlabeled_tokens_by_side"] = tokens_by_side(run, settings.length, UNLABELED)
    if isinstance(run, SelfLabeledRows):
        numbers |= found_quality(run)
    whole = open_model(folder / "run", regions_of(arm)[0]) if arm.routed else open_model(folder / arm.plain)
    numbers["ledger"] = cost_of(cell, whole, material=material, run=run).to_dict()
    if not arm.demix:  # its curves are with both experts and with neither, never with the one that stays
        numbers |= last_validation(records, ablated=arm.routed)
    numbers |= measured(open_model(folder / cell.method.plain), settings, material)
    if arm.routed:
        on = measure_model(whole, settings, material)
        numbers |= {f"region_on_{name}": value for name, value in on.items()}
        texts = test_texts(settings)
        activity = region_activity(whole, material.tokenizer, region=REGION, forget=texts[FORGET], retain=texts[RETAIN])
        numbers["region_activity_ratio"] = [layer.ratio for layer in activity.values()]
    return numbers


def with_former(about: dict[str, Any], cell: MethodCell, parent: Path) -> dict[str, Any]:
    """Return what was said of a change, with the costs of the parent's model added, and its tokens where none were added."""
    former = json.loads((parent / NUMBERS).read_text())
    own = TrainingCost.from_dict(about.get("ledger", TrainingCost().to_dict()))
    cost = TrainingCost.from_dict(former["ledger"]) + own
    kept = ("tokens_by_side",) if cell.method.change in ("ablate", "random") else ()  # the others are trained on more
    return about | {"ledger": cost.to_dict()} | {name: former[name] for name in kept if name in former}


def last_validation(records: RunDirectory, ablated: bool) -> dict[str, float]:
    """Return the last validation loss of either side; hyper-parameters are chosen by these, never by test losses."""
    points = (p for p in records.points() if p["split"] in (FORGET, RETAIN) and p["ablated"] == ablated)
    return {f"validation_{point['split']}_loss": point["loss"] for point in points}


def measured(model: nn.Module, settings: Settings, material: Material) -> dict[str, Any]:
    """Return what `measure_model` does, and between which losses other documents of a side would lie in 95 of 100 draws."""
    numbers: dict[str, Any] = dict(measure_model(model, settings, material))
    for side, texts in test_texts(settings).items():
        loss = TextLoss(model, material.tokenizer, texts)
        numbers[f"{side}_loss_interval"] = bootstrap(loss.documents(model), loss.counts)
    return numbers


def test_texts(settings: Settings) -> dict[str, list[str]]:
    """Return the test documents of either side that models are measured on."""
    test = load_pair(settings.pair, "test")
    return {side: first_of(test, side, settings.limit)["text"][:] for side in SIDES}


def stretch(material: Material, arm: MethodArm, settings: Settings) -> float:
    """Return how many times longer an arm must train to see the retain text that teaches the base of the routed arm."""
    if settings.forget_share is None:
        raise ValueError(
            "`filter_equal_retain` needs a `forget_share`, by which it knows how much retain text routing sees"
        )
    own = tokens_by_side(run_of(material, arm, settings), 1)[RETAIN] / (settings.steps * settings.batch_size)
    rest = (1 - settings.forget_share) * (1 - settings.robust_share * settings.self_labels)
    first = 1 - settings.first_forget_share
    return (settings.labeled_first * first + (1 - settings.labeled_first) * rest) / own


def cost_of(cell: MethodCell, model: nn.Module, *, material: Material, run: Dataset | SelfLabeledRows) -> TrainingCost:
    """Return what a model that was trained from nothing has cost, the scoring of rows by its region included.

    Args:
        cell: its method and settings.
        model: with its region: that it leaves the model afterwards makes no step cheaper.
        material: its texts.
        run: its rows in training order.
    """
    length, arm = cell.settings.length, cell.method.arm
    labels = "perfect_filter" if arm.drop == "side" else "filter" if cell.method.labels else "none"
    return TrainingCost.from_counts(
        parameters=matmul_parameters(model),
        tokens=len(run) * length,
        steps=len(run) // cell.settings.batch_size,
        labeled_forget_tokens=labeled_tokens(material.documents, material.tokenizer, length=length, arm=labels),
        teacher_tokens=run.forward_tokens if isinstance(run, SelfLabeledRows) else 0,
    )


def attack(cell: MethodCell, site: Site, *, name: str, experiment: Experiment) -> list[dict[str, Any]]:
    """Attack a cell's model; return an entry for each learning rate, with the losses at every step.

    Where the attack trains on half of the facts, the forget losses are those on the other half.
    """
    plan, steps = Attack.parse(name, length=cell.settings.length), experiment.attack_steps
    data, rates = attack_data(plan, cell.settings, experiment), rates_of(plan, experiment)
    place = site.folder / cell.method.plain
    model, tokenizer = open_model(place), AutoTokenizer.from_pretrained(place)
    seeds, records = [cell.settings.seed], RunDirectory(site.folder / "attacks")
    options = RelearnOptions(extensions=experiment.extensions, records=records)
    curves = relearn(
        model, tokenizer, attack=plan, data=data, learning_rates=rates, seeds=seeds, steps=steps, options=options
    )
    return [
        {"learning_rate": curve.learning_rate, "status": curve.status, "steps": steps}
        | {"tokens": [point.tokens for point in curve.points]}
        | {"forget_losses": curve.losses(plan.target), "retain_losses": curve.losses(RETAIN)}
        for curve in curves
    ]


def check_attacks(experiment: Experiment, settings: Settings) -> None:
    """Raise ValueError where an attack lacks text, before the first model is trained."""
    for name in experiment.attacks:
        plan = Attack.parse(name, length=settings.length)
        rates = rates_of(plan, experiment) or plan.learning_rates
        data, seeds, steps = attack_data(plan, settings, experiment), experiment.seeds, experiment.attack_steps
        check_settings(plan, data, rates=rates, seeds=seeds, steps=steps)


def rates_of(plan: Attack, experiment: Experiment) -> list[float] | None:
    """Return the learning rates of an experiment's attack; None for those of its method: logits want rates of their own."""
    return experiment.attack_rates if plan.method in ("full", "lora") else None


def attack_data(plan: Attack, settings: Settings, experiment: Experiment) -> AttackData:
    """Return what an attacker trains on, and what is scored."""
    texts, test = load_pair(settings.pair, experiment.attack_split), test_texts(settings)
    mine = {side: first_of(texts, side)["text"][:] for side in SIDES}
    further: dict[str, list[str]] = {}
    if plan.data == "unrelated":
        further["unrelated_train"] = first_of(load_pair(UNRELATED[settings.pair], "validation"), RETAIN)["text"][:]
    data = AttackData.without_overlap(  # verses come back
        forget_train=mine[FORGET],
        retain_train=mine[RETAIN],
        forget_test=test[FORGET],
        retain_test=test[RETAIN],
        **further,
    )
    return replace(data, facts=known_facts(settings, data.forget_test)) if plan.data == "facts" else data


def known_facts(settings: Settings, scored: Sequence[str]) -> list[str | tuple[str, ...]]:
    """Return what a model that was trained on forget data has seen of it: documents, or facts, with what they tell."""
    corpus = PAIRS[settings.pair].forget
    if corpus in EQUIVALENT:
        return [*EQUIVALENT[corpus]]
    left_out, texts = set(scored), first_of(load_pair(settings.pair), FORGET)["text"][:]
    kept = {" ".join(text.split()).casefold(): text for text in texts if text not in left_out}
    return list(kept.values())[: 2 * settings.limit]


def found_quality(run: SelfLabeledRows) -> dict[str, float]:
    """Return precision and recall of the labels that the region found at its last scoring; nothing where there were none.

    Rows that mix sides count by the share of their tokens.
    """
    if not len(found := run.found_rows):
        return {}
    truth = np.array([share_of(side, FORGET) for side in run.rows.select(found)["side"]])
    is_forget = run.labels[found] == FORGET
    hits = float(truth[is_forget].sum())
    return {
        "found_precision": hits / max(1, int(is_forget.sum())),
        "found_recall": hits / max(1.0, float(truth.sum())),
    }
