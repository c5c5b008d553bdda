"""A model that is made from another: its region ablated, units silenced, or unlearnt by what it puts out."""

from __future__ import annotations

from contextlib import redirect_stdout
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel

from routed_peft.ablation import export
from routed_peft.architectures import find_mlps, mlp_layout
from routed_peft.data import FORGET, RETAIN
from routed_peft.demo.material import SIDES, Material
from routed_peft.demo.measuring import open_model
from routed_peft.demo.training import bf16_helps
from routed_peft.experiment.cells import Cell
from routed_peft.experiment.methods import METHODS
from routed_peft.unlearning import Ledger, UndoArguments, UnlearningArguments, undo, unlearn

UNDO_LOOKS = 40
"""How often UNDO's stop rule looks at retain loss."""
UNLEARNING_STEPS = 100
ALLOWED_RISE = 0.05
"""Share by which unlearning may raise the validation loss on retain text; its learning rate is chosen under that limit."""


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
        model, about = unlearned(model, cell, material, out.with_name("unlearning"))
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


def remove_random_units(model: nn.Module, count: int, seed: int) -> None:
    """Silence ``count`` hidden units of every MLP, drawn at random, by zeroing their column of the out-projection."""
    generator = torch.Generator().manual_seed(seed)
    for mlp in find_mlps(model).values():
        down = getattr(mlp, mlp_layout(mlp).down)
        units = torch.randperm(down.weight.shape[1], generator=generator)[:count]
        with torch.no_grad():
            down.weight[:, units.to(down.weight.device)] = 0.0


def unlearned(
    model: PreTrainedModel, cell: Cell, material: Material, folder: Path
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Unlearn by outputs, with the rows that are labelled, at the rate that does most within the limit on retain loss.

    Rates are compared by validation losses; where none keeps the limit, the one that harms retain text least is taken.
    What is said of it: the ``learning_rate``, whether it lies within the grid of rates (``rate_interior``) and keeps the limit
    (``within_limit``), and the ledger.
    """
    method, settings = cell.method, cell.settings
    labels = np.array(material.rows["route_label"][:])
    rows = {side: material.rows.select(np.flatnonzero(labels == side)) for side in SIDES}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    allowed = (1 + ALLOWED_RISE) * packed_loss(model, material.validation[RETAIN])
    found: list[tuple[tuple[bool, float], float, dict[str, Tensor], Ledger]] = []
    for rate in method.rates:
        model.load_state_dict(before)
        arguments = UnlearningArguments(
            str(folder),
            method=cell.name,
            **method.unlearning,
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
            try:
                model, ledger = unlearn(model, rows[FORGET], rows[RETAIN], arguments)
            except ValueError as error:  # the loss is not finite any more: a rate too high, which the limit excludes
                if "loss" not in str(error):
                    raise
                continue
        forget, retain = (packed_loss(model, material.validation[side]) for side in SIDES)
        within = retain <= allowed
        after = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        found.append(((within, forget if within else -retain), rate, after, ledger))
    if not found:
        raise ValueError(f"{cell.name} diverged at every learning rate of {method.rates}")
    (within, _), rate, weights, ledger = max(found, key=lambda entry: entry[0])
    model.load_state_dict(weights)
    interior = min(method.rates) < rate < max(method.rates)
    about = {"learning_rate": rate, "rate_interior": interior, "within_limit": within}
    return model, about | {"ledger": ledger.to_dict()}


@torch.no_grad()
def packed_loss(model: nn.Module, rows: Dataset) -> float:
    """Return the loss of ``model`` on packed rows, in nats per token."""
    model.eval()
    device = next(model.parameters()).device
    ids = torch.tensor(rows["input_ids"][:], device=device)
    return float(torch.stack([model(input_ids=part, labels=part).loss for part in ids.split(16)]).mean())
