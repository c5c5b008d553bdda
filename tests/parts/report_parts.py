"""Summaries of experiments and attacked checkpoints with numbers that can be checked by hand, for the tests of reports."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from experiments.report.aggregate import Result, aggregate
from routed_peft.evaluation.relearning import Attack, Curve, Point, summarize

STEPS = [0, 1, 3]
SETTINGS = {"pair": "biology", "steps": 800, "batch_size": 16, "length": 128, "layers": 4, "self_labels": True}


def curve(
    rate: float, forget: list[float], retain: list[float] | None = None, status: str = "attack"
) -> dict[str, Any]:
    losses = {"forget_losses": forget, "retain_losses": retain or [3.5] * len(forget)}
    return {"learning_rate": rate, "status": status, "steps": STEPS, **losses}


def cell(
    method: str, forget: float, retain: float, labeled: float | None = None, seed: int = 0, **more: Any
) -> dict[str, Any]:
    quality = None if labeled is None else 1.0
    labels = {"labeled": labeled, "recall": quality, "precision": quality}
    return {"method": method, "seed": seed, **labels, "forget_loss": forget, "retain_loss": retain, **more}


def cells(seed: int = 0, labeled: float = 0.5) -> list[dict[str, Any]]:
    """Return five methods under one attack."""
    nan = math.nan
    attacked = [
        curve(3e-4, [5.0, 4.9, 4.8]),
        curve(1e-3, [5.0, 4.0, 3.5], [3.5, 3.6, 4.0]),
        curve(1e-2, [5.0, 3.8, 6.9], [3.5, 3.65, 4.5], "diverged"),
        curve(3e-2, [5.0, nan, None], [3.5, None, nan], "diverged"),
    ]
    on = {"region_on_forget_loss": 3.05, "region_on_retain_loss": 3.55, "found_precision": 0.99, "found_recall": 0.9}
    tokens = {"tokens_by_side": {"forget": 500_000, "retain": 1_000_000}, "targets_by_label": {"forget": 250_000}}
    return [
        cell("no_routing", 3.0, 3.5, seed=seed, attacks={"forget": [curve(1e-3, [3.0, 2.9, 2.8])]}, **tokens),
        cell("perfect_filter", 6.0, 3.3, seed=seed, attacks={"forget": [curve(1e-3, [6.0, 5.0, 4.0])]}),
        cell("control", 3.25, 3.6, seed=seed, attacks={"forget": [curve(1e-3, [3.25, 3.25, 3.3], status="no attack")]}),
        cell("filter", 3.5, 3.4, labeled, seed, attacks={"forget": [curve(1e-3, [3.5, 3.2, 2.9])]}),
        cell("routed", 5.0, 3.5, labeled, seed, attacks={"forget": attacked}, **on, **tokens),
    ]


def summary(rows: list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
    experiment = {"attack_rates": [3e-4, 1e-3, 1e-2], "extensions": 1}
    return {"format": 1, "experiment": experiment, "settings": {**SETTINGS, **settings}, "cells": rows}


def write(file: Path, content: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def attacked_checkpoint(
    folder: Path, name: str, reference: float | None = 3.0, oracle: list[float] | None = None
) -> Path:
    """Write the summary of an attack that goes from 5.0 to 4.0 and 2.5, and return its file."""
    points = [Point(step, 100 * step, {"forget": loss, "retain": 4.0}) for step, loss in ((0, 5.0), (1, 4.0), (3, 2.5))]
    curves = [Curve("forget", "forget", 1e-3, seed, {"forget": 5.0, "retain": 4.0}, tuple(points)) for seed in (0, 1)]
    result = summarize(Attack("forget"), curves, reference=reference, oracle=oracle)
    about = {"format": 1, "kind": "relearning", "source": "org/model", "start": {"forget": 5.0, "retain": 4.0}}
    about |= {"seeds": [0, 1], "steps": [0, 1, 3], "attacks": {"forget": result}, "versions": {"torch": "2.0"}}
    write(folder / name / "run.json", {"command": "routed-peft relearn org/model"})
    return write(folder / name / "summary.json", about)


def routed_result(rows: list[dict[str, Any]], labeled: float = 0.5) -> Result:
    """Return the routed model of an experiment at right labels."""
    result = aggregate(rows).get("routed", labeled, (1.0, 1.0))
    assert result is not None
    return result


def attacked_cell(
    seed: int, *forget: list[float], status: str = "attack", steps: list[int] | None = None
) -> dict[str, Any]:
    """Return a routed model under one attack, whose learning rates have these forget losses."""
    curves = [curve(10.0**-i, list(losses), status=status) for i, losses in enumerate(forget, 2)]
    for one in curves:
        one["steps"] = steps or one["steps"]
    return cell("routed", forget[0][0], 3.5, 0.5, seed, attacks={"forget": curves})
