"""The demo from end to end: prepare the data, train and measure four arms, write the report."""

from __future__ import annotations

import importlib.util
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from routed_peft import presets
from routed_peft.demo.display import Display, Watcher
from routed_peft.demo.material import Material, tokens_by_side
from routed_peft.demo.measuring import attack, measure_model, open_model
from routed_peft.demo.report import derive, terminal_table, verdict, write_report
from routed_peft.demo.settings import ARMS, Arm, DemoSettings
from routed_peft.demo.training import REGION, arguments, bf16_helps, build_model, train_arm
from routed_peft.files import in_use
from routed_peft.runs.records import SUMMARY
from routed_peft.runs.silence import silenced_libraries
from routed_peft.training import RunDirectory

REPORT = "report.html"


def run_demo(
    out: str | Path = "demo-out",
    quick: bool = False,
    *,
    settings: DemoSettings | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train four arms on real text, ablate the routed one, measure and attack all, write a report, and return the summary.

    An illustration: one seed, one small model, one pair of corpora. Under ``out``: ``report.html``, written last,
    ``curves.png``, ``summary.json``, ``metrics.jsonl``, ``run.json``, ``data/`` and one directory per arm, with its run and its
    plain checkpoint.

    Args:
        out: directory that does not exist or is empty; a ValueError otherwise.
        quick: fewer steps and measurements, for a look in three minutes; ignored where ``settings`` are given.
        settings: what to train; by default `DemoSettings`.
        console: where progress and results are shown; by default the terminal.

    Raises:
        ImportError: lm-eval is not installed.
    """
    out = Path(out).expanduser().resolve()
    _check(out)
    settings = settings or (DemoSettings.quick() if quick else DemoSettings())
    console = console or Console()
    tokens = settings.tokens / 1e6
    console.print(f"Four arms, {tokens:.2f} million tokens each, one seed: an illustration, not a result.")
    began = time.monotonic()
    records = RunDirectory(out)
    records.start(asdict(settings) | {"bf16": bf16_helps()}, seeds={"seed": settings.seed})
    with silenced_libraries(), Display(console, settings) as display:
        display.overall_status("preparing the data")
        material = Material.prepare(settings, out / "data")
        arms: dict[str, Any] = {}
        models: dict[str, dict[str, Any]] = {}
        shared: dict[str, Any] = {"material": material, "records": records, "display": display}
        for arm in ARMS:
            arms[arm.key], measured = _run_arm(arm, settings, folder=out / arm.key, **shared)
            models |= measured
        display.overall_status("writing the report")
        derived = derive(models)
        summary = {"verdict": verdict(derived), **derived, "models": models, "arms": arms}
        summary |= {"seconds": round(time.monotonic() - began, 1)}
        summary |= {"illustration": "one seed, one small model, one pair of corpora"}
        records.finish(summary)
        summary = json.loads((out / SUMMARY).read_text(encoding="utf-8"))
        write_report(records, summary, settings=settings, file=out / REPORT)
        display.overall_status("done")
    console.print(terminal_table(models), verdict(derived), "An illustration: one seed.", sep="\n")
    console.print(f"Report: {out / REPORT}", soft_wrap=True)
    return summary


def _check(out: Path) -> None:
    """Raise where the demo could not write or measure."""
    if in_use(out):
        raise ValueError(f"`out` {out} must be absent or an empty directory: name another with `--out`, or remove it "
                         "(an interrupted demo leaves its files)")  # fmt: skip
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError('the demo measures with lm-eval, which is not installed: pip install "routed_peft[eval]"')


def _run_arm(
    arm: Arm, settings: DemoSettings, *, material: Material, folder: Path, records: RunDirectory, display: Display
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return facts about the arm's training, and its measured models by their keys."""
    display.begin(arm)
    run = material.run_of(arm, settings)
    began, watcher = time.monotonic(), Watcher(display, arm)
    seen = train_arm(
        arm,
        build_model(settings, material),
        args=arguments(arm, settings, folder / "run"),
        routes=presets.sgtm(REGION) if arm.routed else presets.control(),
        material=material,
        run=run,
        records=records,
        watcher=watcher,
    )
    facts: dict[str, Any] = {"name": arm.name, "about": arm.about, "tokens": settings.tokens}
    facts |= {"tokens_by_side": tokens_by_side(run, settings.length), "targets_by_label": seen}
    facts |= {"seconds_training": round(time.monotonic() - began, 1)}
    display.status(arm, "measuring")
    measure = lambda place, *regions: dict(measure_model(open_model(folder / place, regions), settings, material))
    models: dict[str, dict[str, Any]] = {arm.key: measure(arm.plain)}
    if arm.routed:
        models["routed_on"] = measure("run", REGION)
    elif arm.drop is None:
        models["placebo"] = measure("run")
    display.status(arm, "relearning", advance=display.measuring)
    tick = lambda: display.status(arm, "relearning", advance=display.attacking)
    models[arm.key]["relearned"] = attack(
        folder / arm.plain, arm.key, settings=settings, material=material, records=records, tick=tick
    )
    result = models[arm.key]
    display.finish(arm, f"biology {result['forget_loss']:.2f}, other text {result['retain_loss']:.2f}")
    return facts, models
