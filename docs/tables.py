"""Write the tables of README.md from the files in results/: `python docs/tables.py`, or `--check` to see that they agree."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
MARK = re.compile(r"<!-- (?P<name>\w+) -->\n.*?<!-- /(?P=name) -->", re.DOTALL)
ARMS = {
    "no_routing": "no routing",
    "filter": "filter, same labels",
    "routed": "**routed, ablated**",
    "perfect_filter": "perfect filter",
}


def spread(row: dict[str, Any]) -> str:
    """A mean with its range over the seeds."""
    return f"{row['mean']:.2f} ({row['min']:.2f}–{row['max']:.2f})"


def compare(pair: str) -> str:
    """Losses of the four arms, way and tax, over seeds."""
    file = ROOT / "results" / f"compare_{pair}.json"
    if not file.exists():
        return f"Not run yet: `python recipes/compare.py --config recipes/configs/compare_{pair}.yaml`."
    report = json.loads(file.read_text())
    numbers, settings = report["numbers"], report["settings"]
    lines = ["| arm | forget loss | retain loss |", "|---|---|---|"]
    for key, name in ARMS.items():
        lines.append(f"| {name} | {spread(numbers[f'{key}/forget_loss'])} | {spread(numbers[f'{key}/retain_loss'])} |")
    tokens = settings["steps"] * settings["batch_size"] * settings["length"] / 1e6
    lines.append(
        f"\nMean (range) over {numbers['way']['n']} seeds, {tokens:.2f} million training tokens an arm, nats per token on "
        f"test text. Way {spread(numbers['way'])}, tax {spread(numbers['tax'])}. "
        f"From `python recipes/compare.py --config recipes/configs/compare_{pair}.yaml`."
    )
    return "\n".join(lines)


def step_time() -> str:
    """Ratios of a routed step to an unrouted one."""
    file = ROOT / "results" / "step_time.json"
    if not file.exists():
        return "Not run yet: `./run bench --out results/step_time.json`."
    report = json.loads(file.read_text())
    shares = sorted({row["zero"] for row in next(iter(report["sizes"].values()))["time"]})
    lines = ["| size | labels | " + " | ".join(f"{share:.0%} of weight zero" for share in shares) + " |"]
    lines.append("|---" * (2 + len(shares)) + "|")
    for size, result in report["sizes"].items():
        for kind in dict.fromkeys(row["kind"] for row in result["time"]):
            ratios = [row["ratio"] for row in result["time"] if row["kind"] == kind]
            lines.append(f"| {size} | {kind} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
    missed = [f"{t['name']} {t['value']:.3f} (limit {t['limit']:.2f})" for t in report["targets"] if not t["met"]]
    others = ", ".join(f"{name} {numbers['ratio']:.2f}" for name, numbers in report["today"].items())
    lines.append(
        f"\nTime of a routed training step over the same step of the same model without routing, median of interleaved pairs "
        f"({report['hardware']['device']}, {report['threads']} thread). At the middle size, half of the rows of weight zero: "
        f"{others}. Targets missed: {'; '.join(missed) or 'none'}. From `./run bench --sizes {' '.join(report['sizes'])} "
        f"--repeats {report['repeats']} --out results/step_time.json`."
    )
    return "\n".join(lines)


TABLES = {
    "compare_biology": lambda: compare("biology"),
    "compare_spanish": lambda: compare("spanish"),
    "step_time": step_time,
}


def render(text: str) -> str:
    """Return the README with every marked table made anew."""
    return MARK.sub(
        lambda match: f"<!-- {match['name']} -->\n{TABLES[match['name']]()}\n<!-- /{match['name']} -->", text
    )


if __name__ == "__main__":
    before = README.read_text(encoding="utf-8")
    after = render(before)
    if "--check" in sys.argv[1:]:
        sys.exit(0 if before == after else "README.md differs from results/: run `python docs/tables.py`")
    README.write_text(after, encoding="utf-8")
