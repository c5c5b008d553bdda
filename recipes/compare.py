"""Way and tax over seeds: the four arms of the demo, trained at the same number of tokens, for one pair of corpora.

    python recipes/compare.py --config recipes/configs/compare_biology.yaml

Every arm of every seed leaves a file under `output_dir`; a run that was killed continues with the next one, and an arm is
never trained twice. The means and the spread over seeds go to `summary_file`, which the README's table is made from.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from trl import TrlParser

from routed_peft.demo.display import Display, Watcher, quiet
from routed_peft.demo.material import Material
from routed_peft.demo.measuring import measure_model, open_model
from routed_peft.demo.settings import ARMS, Arm, DemoSettings
from routed_peft.demo.training import train_arm
from routed_peft.evaluation.measures import tax, way
from routed_peft.training import RunDirectory


@dataclass
class CompareArguments:
    """What is compared; the rest is `DemoSettings`."""

    output_dir: str = field(metadata={"help": "Where each arm of each seed leaves its numbers."})
    summary_file: str = field(metadata={"help": "JSON with means and spread over seeds."})
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of labels, order and weights."}
    )
    arms: list[str] = field(
        default_factory=lambda: [arm.key for arm in ARMS], metadata={"help": "Arms to train, by key."}
    )


def train_and_measure(arm: Arm, settings: DemoSettings, console: Console) -> dict[str, Any]:
    """Train one arm in a scratch directory; return its losses with what is removable removed, and as trained."""
    with tempfile.TemporaryDirectory() as scratch, quiet(), Display(console, settings) as display:
        folder = Path(scratch)
        material = Material.prepare(settings, folder / "data")
        records = RunDirectory(folder / "records")
        records.start(asdict(settings), seeds={"seed": settings.seed})
        display.start(arm)
        run = material.run_of(arm, settings)
        tokens = train_arm(arm, settings, material, run, folder / arm.key, records, Watcher(display, arm))
        display.status(arm, "measuring")
        result = {"tokens_per_route": tokens} | measure_model(
            open_model(folder / arm.key / arm.plain), settings, material
        )
        if arm.routed:
            on = measure_model(open_model(folder / arm.key / "run", region=True), settings, material)
            result |= {f"region_on_{name}": value for name, value in on.items()}
        return result


def summarise(results: dict[int, dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Return mean, least and greatest of every number over the seeds that have all arms, and of way and tax."""
    complete = [arms for arms in results.values() if {arm.key for arm in ARMS} <= arms.keys()]
    numbers: dict[str, list[float]] = {}
    for arms in complete:
        for key, result in arms.items():
            for name, value in result.items():
                if isinstance(value, float):
                    numbers.setdefault(f"{key}/{name}", []).append(value)
        forget = {key: result["forget_loss"] for key, result in arms.items()}
        retain = {key: result["retain_loss"] for key, result in arms.items()}
        numbers.setdefault("way", []).append(way(forget["routed"], forget["no_routing"], forget["perfect_filter"]))
        numbers.setdefault("tax", []).append(tax(retain["routed"], retain["filter"]))
    return {
        name: {"mean": statistics.mean(values), "min": min(values), "max": max(values), "n": len(values)}
        for name, values in numbers.items()
    }


def main(arguments: CompareArguments, settings: DemoSettings) -> None:
    console = Console()
    out = Path(arguments.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    results: dict[int, dict[str, dict[str, Any]]] = {}
    for seed in arguments.seeds:
        seeded = DemoSettings(**(asdict(settings) | {"seed": seed}))
        for arm in (arm for arm in ARMS if arm.key in arguments.arms):
            file = out / f"{settings.pair}-{arm.key}-{seed}.json"
            if file.exists():
                stored = json.loads(file.read_text())
                if stored["settings"] != json.loads(json.dumps(asdict(seeded))):
                    raise ValueError(f"{file} was made with other settings: name another `--output_dir`, or remove it")
                result = stored["result"]
            else:
                result = train_and_measure(arm, seeded, console)
                aside = file.with_suffix(".tmp")
                aside.write_text(json.dumps({"settings": asdict(seeded), "result": result}, indent=1))
                aside.rename(file)
            results.setdefault(seed, {})[arm.key] = result
    summary = summarise(results)
    target = Path(arguments.summary_file)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(
        json.dumps({"settings": asdict(settings), "seeds": arguments.seeds, "numbers": summary}, indent=1)
    )
    table = Table("", "mean", "least", "greatest", title=f"{settings.pair}, {len(arguments.seeds)} seeds")
    for name, row in summary.items():
        if name in ("way", "tax") or name.endswith(("forget_loss", "retain_loss")):
            table.add_row(name, *(f"{row[key]:.3f}" for key in ("mean", "min", "max")))
    console.print(table)


if __name__ == "__main__":
    parsed = TrlParser((CompareArguments, DemoSettings)).parse_args_and_config()
    main(*parsed)
