"""Models made from others: a region ablated, units silenced, or knowledge unlearned by outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from experiments.common.coherence import MAX_ROWS, restore_coherence, trained_rows
from experiments.removal.cells import MethodCell
from experiments.removal.methods import (
    ALLOWED_RISE,
    COHERENCE_RATES,
    COHERENCE_STEPS,
    EXTENSIONS,
    METHODS,
    UNLEARNING_STEPS,
)
from routed_peft.checkpoint.export import export
from routed_peft.data import FORGET, RETAIN
from routed_peft.demo.material import SIDES, Material
from routed_peft.demo.measuring import open_model
from routed_peft.demo.training import bf16_helps
from routed_peft.evaluation.placebo import silence_random_units
from routed_peft.losses import DivergedError
from routed_peft.runs.cost import TrainingCost, matmul_parameters
from routed_peft.unlearning import UndoArguments, UnlearningArguments, undo, unlearn
from routed_peft.unlearning.token_trainer import mean_loss

UNDO_LOOKS = 40
"""Evaluations of retain loss, by which UNDO's stop rule decides."""


def change(cell: MethodCell, parent: Path, *, out: Path, material: Material) -> dict[str, Any]:
    """Write the changed model of ``parent`` to ``out``, and return a record of the change."""
    kind = cell.method.change
    if kind == "ablate":
        export(parent / "run", out, keep=[])
        return {}
    assert cell.method.parent is not None
    model = open_model(parent / METHODS[cell.method.parent].plain)
    assert isinstance(model, PreTrainedModel)
    about: dict[str, Any] = {}
    if kind == "random":
        silence_random_units(model, cell.settings.region_size, cell.settings.seed)
    elif kind == "cohere":
        about = coherent(model, material)
    elif kind == "undo":
        model, about = undone(model, cell, material=material, folder=out.with_name("distillation"))
    else:
        assert kind is not None
        model, about = unlearned(model, cell, material=material, folder=out.with_name("unlearning"))
    model.save_pretrained(out)
    material.tokenizer.save_pretrained(out)
    return about


def coherent(model: PreTrainedModel, material: Material) -> dict[str, Any]:
    """Give an ablated model its coherence back, in place, by rows that are labeled retain; return what that took."""
    known = np.flatnonzero(np.array(material.rows["route_label"][:]) == RETAIN)
    rows = torch.tensor(material.rows.select(known[:MAX_ROWS])["input_ids"][:], dtype=torch.long)
    found = restore_coherence(model, rows, steps=COHERENCE_STEPS, learning_rates=COHERENCE_RATES)
    tokens = COHERENCE_STEPS * trained_rows(len(rows)) * rows.shape[1]
    ledger = TrainingCost.from_counts(matmul_parameters(model), tokens=tokens, steps=COHERENCE_STEPS)
    return {"coherence": asdict(found), "ledger": ledger.to_dict()}


def undone(
    model: PreTrainedModel, cell: MethodCell, *, material: Material, folder: Path
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
        student, record = undo(model, material.rows, args=arguments, retain_rows=material.validation[RETAIN])
    about = {key: value for key, value in asdict(record).items() if key not in ("seed", "ledger")}
    return student, {"undo": about, "ledger": record.ledger.to_dict()}


def unlearned(
    model: PreTrainedModel, cell: MethodCell, *, material: Material, folder: Path
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Unlearn by outputs, with the rows that are labeled, at the rate that does most within the limit on retain loss.

    Rates are compared by validation losses; where none keeps the limit, the one that harms retain text least is taken. While
    the best lies at an edge, rates beyond it are tried. What is said of it: the ``learning_rate``, all ``rates_tried``, whether
    the best is one of those in between (``rate_interior``) and keeps the limit (``within_limit``), and the ledger.

    Raises:
        ValueError: where all rates diverge.
    """
    method = cell.method
    labels = np.array(material.rows["route_label"][:])
    rows = {side: material.rows.select(np.flatnonzero(labels == side)) for side in SIDES}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    allowed = (1 + ALLOWED_RISE) * mean_loss(model, material.validation[RETAIN])
    tried, wanted = [], list(method.rates)
    best: tuple[tuple[bool, float], float, dict[str, Tensor], TrainingCost] | None = None
    while wanted:
        for rate in wanted:
            model.load_state_dict(before)
            tried.append(rate)
            try:
                with redirect_stdout(StringIO()):  # the trainer's log
                    model, ledger = unlearn(
                        model, rows[FORGET], retain_rows=rows[RETAIN], args=unlearning_arguments(cell, rate, folder)
                    )
            except DivergedError:
                continue  # a rate too high
            forget, retain = (mean_loss(model, material.validation[side]) for side in SIDES)
            if not math.isfinite(forget + retain):
                continue
            score = (retain <= allowed, forget if retain <= allowed else -retain)
            if best is None or score > best[0]:
                best = score, rate, {name: tensor.clone() for name, tensor in model.state_dict().items()}, ledger
        wanted = beyond(tried, None if best is None else best[1], len(method.rates) + EXTENSIONS)
    if best is None:
        raise ValueError(f"{cell.name} diverged at every learning rate of {tried}: lower `rates`")
    (within, _), rate, weights, ledger = best
    model.load_state_dict(weights)
    about = {"learning_rate": rate, "rates_tried": sorted(tried), "within_limit": within}
    return model, about | {"rate_interior": min(tried) < rate < max(tried), "ledger": ledger.to_dict()}


def beyond(tried: Sequence[float], best: float | None, most: int) -> list[float]:
    """Return the rate to be tried next: a third or thrice that at the edge where the best one lies.

    >>> beyond([1e-3, 3e-3], 3e-3, most=9), beyond([1e-3, 3e-3], None, most=9), beyond([1e-3, 3e-3, 1e-2], 3e-3, most=9)
    ([0.009], [0.000333], [])
    >>> beyond([1e-3, 3e-3], 3e-3, most=2)
    []
    """
    low, high = min(tried), max(tried)
    if len(tried) >= most or (best is not None and low < best < high):
        return []
    return [float(f"{high * 3 if best == high else low / 3:.3g}")]


def unlearning_arguments(cell: MethodCell, rate: float, folder: Path) -> UnlearningArguments:
    """Return the arguments of unlearning at a learning rate."""
    return UnlearningArguments(
        str(folder),
        method=cell.name,
        **cell.method.unlearning,
        max_steps=UNLEARNING_STEPS,
        learning_rate=rate,
        warmup_steps=UNLEARNING_STEPS // 10,
        per_device_train_batch_size=8,
        max_grad_norm=1.0,
        bf16=bf16_helps(),
        use_cpu=not torch.cuda.is_available(),
        seed=cell.settings.seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
