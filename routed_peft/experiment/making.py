"""One cell: its model made, measured and attacked."""

from __future__ import annotations

import json
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, TrainerCallback

from routed_peft.ablation import export
from routed_peft.architectures import find_mlps, mlp_layout
from routed_peft.corpora import load_pair
from routed_peft.data import FORGET, RETAIN
from routed_peft.demo.material import SIDES, Material, tokens_by_side
from routed_peft.demo.measuring import measure_model, open_model
from routed_peft.demo.settings import Arm, DemoSettings
from routed_peft.demo.training import bf16_helps, train_arm
from routed_peft.evaluation.relearning import Attack, AttackData, relearn
from routed_peft.experiment.cells import NUMBERS, Cell, Experiment
from routed_peft.experiment.methods import METHODS
from routed_peft.training import RunDirectory, SelfLabeledRows
from routed_peft.unlearning import Ledger, UndoArguments, UnlearningArguments, matmul_parameters, undo, unlearn

UNDO_LOOKS = 40
"""How often UNDO's stop rule looks at retain loss."""
UNLEARNING_STEPS = 100
UNLEARNING_RATES = (1e-4, 3e-4, 1e-3)
ALLOWED_RISE = 0.05
"""Share by which unlearning may raise the validation loss on retain text; its learning rate is chosen under that limit."""


def make(cell: Cell, folder: Path, parent: Path, watcher: TrainerCallback) -> dict[str, Any]:
    """Train a cell's model in ``folder``, or change that of its ``parent``, measure it, and return its numbers."""
    settings, arm = cell.settings, cell.method.arm
    material = Material.prepare(settings, folder / "data", cell.method.relabel)
    if cell.method.change:
        about = change(cell, parent, folder / cell.method.plain, material)
        own = Ledger.from_dict(about.get("ledger", Ledger().to_dict()))
        before = Ledger.from_dict(json.loads((parent / NUMBERS).read_text())["ledger"])
        about["ledger"] = (before + own).to_dict()
        return about | measure_model(open_model(folder / cell.method.plain), settings, material)
    if cell.method.equal_retain:
        settings = replace(settings, steps=round(settings.steps * stretch(material, arm, settings)))
    run, records = material.run_of(arm, settings), RunDirectory(folder)
    records.start(asdict(settings) | {"method": cell.name}, seeds={"seed": settings.seed})
    labels = train_arm(arm, settings, material, run, folder, records, watcher)
    numbers: dict[str, Any] = {"tokens_by_side": tokens_by_side(run, settings.length), "targets_by_label": labels}
    if isinstance(run, SelfLabeledRows):
        numbers |= found_quality(run)
    numbers["ledger"] = ledger_of(cell, open_model(folder / cell.method.plain), material, run).to_dict()
    last = [
        point for point in records.points() if point["split"] in (FORGET, RETAIN) and point["step"] == settings.steps
    ]
    for point in last:  # hyper-parameters are chosen by these, never by test losses
        if point["ablated"] == arm.routed:
            numbers[f"validation_{point['split']}_loss"] = point["loss"]
    numbers |= measure_model(open_model(folder / cell.method.plain), settings, material)
    if arm.routed:
        on = measure_model(open_model(folder / "run", region=True), settings, material)
        numbers |= {f"region_on_{name}": value for name, value in on.items()}
    return numbers


def stretch(material: Material, arm: Arm, settings: DemoSettings) -> float:
    """Return how many times longer an arm must train to see the retain text that teaches the base of the routed arm."""
    own = tokens_by_side(material.run_of(arm, settings), 1)[RETAIN] / (settings.steps * settings.batch_size)
    assert settings.forget_share is not None
    rest = (1 - settings.forget_share) * (1 - settings.robust_share)
    return (settings.labeled_first / 2 + (1 - settings.labeled_first) * rest) / own


def change(cell: Cell, parent: Path, out: Path, material: Material) -> dict[str, Any]:
    """Write the changed model of ``parent`` to ``out``, and return what is to be said of the change."""
    kind = cell.method.change
    if kind == "ablate":
        export(parent / "run", out, keep=[])
        return {}
    assert cell.method.parent is not None
    model = open_model(parent / METHODS[cell.method.parent].plain)
    assert isinstance(model, PreTrainedModel)
    about: dict[str, Any] = {}
    if kind == "random":
        remove_random_units(model, cell.settings.region_size, cell.settings.seed)
    elif kind == "undo":
        model, about = undone(model, cell, material, out.with_name("distillation"))
    else:
        assert kind is not None
        model, about = unlearned(model, kind, cell.settings, material, out.with_name("unlearning"))
    model.save_pretrained(out)
    material.tokenizer.save_pretrained(out)
    return about


def undone(
    model: PreTrainedModel, cell: Cell, material: Material, folder: Path
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Add noise to the model and distil it into itself, on rows without labels, for as many steps as it was trained at most."""
    settings, (alpha, beta) = cell.settings, cell.method.noise
    arguments = UndoArguments(
        str(folder),
        alpha=alpha,
        beta=beta,
        max_steps=settings.steps,
        eval_strategy="steps",
        eval_steps=max(1, settings.steps // UNDO_LOOKS),
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup_steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=64,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        bf16=bf16_helps(),
        use_cpu=not torch.cuda.is_available(),
        seed=settings.seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    with redirect_stdout(StringIO()):  # the trainer's log
        student, record = undo(model, material.rows, arguments, material.validation[RETAIN])
    about = {key: value for key, value in asdict(record).items() if key not in ("seed", "ledger")}
    return student, {"undo": about, "ledger": record.ledger.to_dict()}


def ledger_of(cell: Cell, model: nn.Module, material: Material, run: Dataset | SelfLabeledRows) -> Ledger:
    """Return what a model that was trained from nothing has cost, the scoring of rows by its region included."""
    length, labels = cell.settings.length, material.rows["route_label"][:]
    scored = len(run.found.get("rows", ())) if isinstance(run, SelfLabeledRows) else 0
    return Ledger.of_training(
        matmul_parameters(model),
        tokens=len(run) * length,
        steps=len(run) // cell.settings.batch_size,
        labeled_forget_tokens=labels.count(FORGET) * length if cell.method.labels else 0,
        teacher_tokens=2 * scored * length,
    )


def remove_random_units(model: nn.Module, count: int, seed: int) -> None:
    """Silence ``count`` hidden units of every MLP, drawn at random, by zeroing their column of the out-projection."""
    generator = torch.Generator().manual_seed(seed)
    for mlp in find_mlps(model).values():
        down = getattr(mlp, mlp_layout(mlp).down)
        units = torch.randperm(down.weight.shape[1], generator=generator)[:count]
        with torch.no_grad():
            down.weight[:, units.to(down.weight.device)] = 0.0


def unlearned(
    model: PreTrainedModel, method: str, settings: DemoSettings, material: Material, folder: Path
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Unlearn by outputs, with the rows that are labelled, at the rate that does most within the limit on retain loss.

    Rates are compared by validation losses; where none keeps the limit, the one that harms retain text least is taken.
    """
    labels = np.array(material.rows["route_label"][:])
    rows = {side: material.rows.select(np.flatnonzero(labels == side)) for side in SIDES}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    allowed = (1 + ALLOWED_RISE) * packed_loss(model, material.validation[RETAIN])
    found: list[tuple[tuple[bool, float], float, dict[str, Tensor], Ledger]] = []
    for rate in UNLEARNING_RATES:
        model.load_state_dict(before)
        arguments = UnlearningArguments(
            str(folder),
            method=method,
            max_steps=UNLEARNING_STEPS,
            learning_rate=rate,
            warmup_steps=UNLEARNING_STEPS // 10,
            per_device_train_batch_size=8,
            max_grad_norm=1.0,
            bf16=bf16_helps(),
            use_cpu=not torch.cuda.is_available(),
            seed=settings.seed,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        with redirect_stdout(StringIO()):  # the trainer's log
            model, ledger = unlearn(model, rows[FORGET], rows[RETAIN], arguments)
        forget, retain = (packed_loss(model, material.validation[side]) for side in SIDES)
        within = retain <= allowed
        after = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        found.append(((within, forget if within else -retain), rate, after, ledger))
    _, rate, weights, ledger = max(found, key=lambda entry: entry[0])
    model.load_state_dict(weights)
    return model, {"learning_rate": rate, "ledger": ledger.to_dict()}


@torch.no_grad()
def packed_loss(model: nn.Module, rows: Dataset) -> float:
    """Return the loss of ``model`` on packed rows, in nats per token."""
    model.eval()
    device = next(model.parameters()).device
    ids = torch.tensor(rows["input_ids"][:], device=device)
    return float(torch.stack([model(input_ids=part, labels=part).loss for part in ids.split(16)]).mean())


def attack(cell: Cell, folder: Path, name: str, experiment: Experiment) -> list[dict[str, Any]]:
    """Attack a cell's model; return an entry for each learning rate, with the losses at every step."""
    held_out, test = (load_pair(cell.settings.pair, split) for split in ("validation", "test"))

    def texts(ds: Dataset, side: str, count: int | None = None) -> list[str]:
        return ds.filter(lambda value: value == side, input_columns="side")["text"][:][:count]

    data = AttackData.apart(  # verses come back
        forget_train=texts(held_out, FORGET),
        retain_train=texts(held_out, RETAIN),
        forget_test=texts(test, FORGET, cell.settings.limit),
        retain_test=texts(test, RETAIN, cell.settings.limit),
    )
    place = folder / cell.method.plain
    model, tokenizer = open_model(place), AutoTokenizer.from_pretrained(place)
    rates, steps = experiment.attack_rates, experiment.attack_steps
    plan = Attack.parse(name, length=cell.settings.length)
    seeds, records = [cell.settings.seed], RunDirectory(folder / "attacks")
    curves = relearn(
        model, tokenizer, plan, data, rates, seeds, steps, extensions=experiment.extensions, records=records
    )
    return [
        {"learning_rate": curve.learning_rate, "status": curve.status, "steps": steps}
        | {f"{side}_losses": curve.losses(side) for side in (FORGET, RETAIN)}
        for curve in curves
    ]


def found_quality(run: SelfLabeledRows) -> dict[str, float]:
    """Return precision and recall of the labels that the region found for unlabelled rows."""
    found = np.array(run.found["is_forget"], dtype=bool)
    truth = np.array(run.rows["side"][:])[np.array(run.found["rows"], dtype=int)] == FORGET
    hits = int((truth & found).sum())
    return {"found_precision": hits / max(1, int(found.sum())), "found_recall": hits / max(1, int(truth.sum()))}
