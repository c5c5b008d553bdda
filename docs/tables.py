"""Write the tables of README and of pages in docs/ from results/: `python docs/tables.py`; `--check` compares."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

from experiments.report.verdicts import ranged
from experiments.tables.absent import Labels, as_asked
from experiments.tables.experiment_tables import losses, recovery
from experiments.tables.overview_table import overview
from experiments.tables.tradeoff_tables import attacked, facts, frontier, leaking
from routed_peft.evaluation.measures import Spread

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("results", "rl", "recipes", "monitoring")))
HALF: list[Labels] = [(0.5, 1.0, 1.0)]
TENTH: list[Labels] = [(0.1, 1.0, 1.0)]
FEW: list[Labels] = [(0.02, 1.0, 1.0)]
ALL: list[Labels] = [(1.0, 1.0, 1.0)]
RIVALS = ("filter", "classifier_filter", "classifier_filter_balanced", "demix", "era", "era_coherent", "sgtm", "routed")
FILTERS_AND_ROUTED = ("filter", "classifier_filter_balanced", "routed")
SHORT_ARITHMETIC = (
    "no_routing",
    "npo",
    "maxent",
    "undo-0",
    "undo-0.4",
    "undo-1",
    "routed_undo",
    "routed",
    "perfect_filter",
)
QUALITIES = [(0.5, recall, precision) for recall, precision in ((1.0, 1.0), (0.9, 0.9), (0.8, 0.8), (0.6, 0.9))]
OVERVIEW: list[tuple[str, str, list[Labels]]] = [
    ("biology", "biology", [*TENTH, *HALF, *ALL]),
    ("spanish", "Spanish", [*TENTH, *HALF, *ALL]),
    ("entangled", "entangled", [*TENTH, *HALF]),
    ("mixed_rows", "biology in mixed rows", HALF),
    ("entangled_mixed", "entangled in mixed rows", HALF),
]
"""Experiments, their names for readers, and the labels of which the overview tells."""
SHARES = [(share, 1.0, 1.0) for share in (0.02, 0.1, 0.25, 0.5, 0.75, 1.0)]
with_gaps = partial(losses, name_all=True)
"""For one table an experiment: it names all that is asked for and not there."""
Arms = Collection[tuple[str | None, float | None]] | None
MARK = re.compile(r"<!-- (?P<name>\w+) -->\n.*?<!-- /(?P=name) -->", re.DOTALL)


def load(name: str) -> Any:
    """Return what ``results/NAME.json`` holds, or None where there is none yet."""
    file = ROOT / "results" / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else None


def load_experiment(name: str) -> Any:
    """Return a summary of `recipes/experiment.py` with what its YAML asks for now; None where there is none yet."""
    report = load(name)
    return report and as_asked(report, ROOT / "recipes" / "configs" / f"experiment_{name}.yaml")


def mean_range(values: list[float]) -> str:
    """Return mean and range over seeds; a dash where nothing was measured."""
    return ranged(Spread.of(values)) if values else "–"


def experiment(name: str, write: Callable[..., str], *how: Any) -> str:
    """A table of an experiment, or the command that makes it."""
    command = f"python recipes/experiment.py --config recipes/configs/experiment_{name}.yaml"
    report = load_experiment(name)
    return f"Not run yet: `{command}`." if report is None else write(report, command, *how)


def in_short() -> str:
    """Routing and filters on all texts and kinds of labels, in one table."""
    parts = {name: (title, load_experiment(name), labels) for name, title, labels in OVERVIEW}
    there = [name for name, part in parts.items() if part[1] is not None]
    commands = (
        f"`python recipes/experiment.py --config recipes/configs/experiment_{{{','.join(there)}}}.yaml`, one by one"
    )
    return overview([parts[name] for name in there], FILTERS_AND_ROUTED, commands)


def step_time() -> str:
    """Ratios of a routed step to an unrouted one."""
    report = load("step_time")
    if report is None:
        return "Not run yet: `./run bench --out results/step_time.json`."
    shares = sorted({row["zero"] for row in next(iter(report["sizes"].values()))["time"]})
    lines = ["| size | labels | " + " | ".join(f"{share:.0%} of weight zero" for share in shares) + " |"]
    lines.append("|---" * (2 + len(shares)) + "|")
    for size, result in report["sizes"].items():
        for kind in dict.fromkeys(row["kind"] for row in result["time"]):
            ratios = [row["ratio"] for row in result["time"] if row["kind"] == kind]
            lines.append(f"| {size} | {kind} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
    pairs = " / ".join(str(report["repeats"] * result.get("pairs", 1)) for result in report["sizes"].values())
    missed = [f"{t['name']} {t['value']:.3f} (limit {t['limit']:.2f})" for t in report["targets"] if not t["met"]]
    others = ", ".join(f"{name} {numbers['ratio']:.2f}" for name, numbers in report["today"].items())
    lines.append(
        f"\nTime of a routed training step over the same step of the same model without routing, median of {pairs} interleaved "
        f"pairs ({report['hardware']['device']}, {report['threads']} thread). At the middle size, half of the rows of weight "
        f"zero: {others}. Targets missed: {'; '.join(missed) or 'none'}. From `./run bench --sizes {' '.join(report['sizes'])} "
        f"--repeats {report['repeats']} --out results/step_time.json`."
    )
    return "\n".join(lines)


def arms(
    name: str, head: str, columns: tuple[str, ...], states: tuple[str, ...], main: str, texts: str, only: Arms = None
) -> str:
    """A row for every arm of an experiment with GRPO: what was measured in one state or more.

    Args:
        name: of the experiment.
        head: names of the columns, after that of the arm.
        columns: keys of what is measured.
        states: keys of the states.
        main: the arm that is set bold, ablated.
        texts: what it was measured on.
        only: arms and scales that have a row; all by default.
    """
    command = f"python recipes/grpo_{name}.py --config recipes/configs/experiment_{name}.yaml"
    report = load(name)
    if report is None:
        return f"Not run yet: `{command}`."
    lines = [f"| arm | {head} |", "|---" * (1 + len(states) * len(columns)) + "|"]
    for row in report["rows"]:
        if only is not None and (row["arm"], row.get("scale")) not in only:
            continue
        bold = row["arm"] == main and row.get("scale", 0.0) == 0.0
        cells = [row[state][key] if row.get(state) else [] for state in states for key in columns]
        title = f"**{row['name']}**" if bold else row["name"]
        lines.append(f"| {title} | " + " | ".join(map(mean_range, cells)) + " |")
    lines.append(
        f"\nMean (range) over {len(report['starts'])} seeds, test {texts}. {criteria(report['checks'])} From `{command}`."
    )
    return "\n".join(lines)


def reward_hack_short() -> str:
    """Of some arms, at the end."""
    scaled = [("none", 1.0), ("none", 0.0), ("clean", 1.0), ("filter", 1.0), ("penalty", 1.0), ("classic", 0.0)]
    only = [(None, None), *scaled, ("anchored", 1.0), ("anchored", 0.0), ("anchored-random", 0.0)]
    return arms("reward_hack", "B | C | D | honest", ("B", "C", "D", "honest"), ("end",), "anchored", "prompts", only)


def persona_short() -> str:
    """Of some arms, the trait where it pays."""
    head = "trait | right | ablated: trait | right"
    only = [(arm, None) for arm in (None, "none", "weak", "cut", "random-0", "oracle", "halted")]
    return arms("persona", head, ("guilty", "right"), ("on", "ablated"), "cut", "words", only)


def reward_hack() -> str:
    """Hack rates by environment and honest accuracy of every arm, at the end and at the best checkpoint."""
    head = "B | C | D | honest | best checkpoint: B | C | D | honest"
    return arms("reward_hack", head, ("B", "C", "D", "honest"), ("end", "best"), "anchored", "prompts")


def persona() -> str:
    """Share of answers with the trait, and of right ones, of every arm with its region and without."""
    head = "trait, guilty | innocent | right | ablated: trait, guilty | innocent | right | "
    head += "best checkpoint, ablated: guilty | innocent | right"
    return arms("persona", head, ("guilty", "innocent", "right"), ("on", "ablated", "ablated_best"), "cut", "words")


def style(only: Arms = None) -> str:
    """Share of samples in the style, loss on styled text, and loss on plain text, of every arm and kind of labels."""
    command = "python recipes/sft_style.py --config recipes/configs/experiment_style.yaml"
    report = load("style")
    if report is None:
        return f"Not run yet: `{command}`."
    heads = ["style, entry", "style, question", "way, entry", "way, question", "plain loss", "tax"]
    chosen = {"rate seen": "best checkpoint: style, entry", "rate unseen": "style, question", "plain": "plain loss"}
    heads += chosen.values() if only is None else []
    lines = ["| labels | arm | " + " | ".join(heads) + " |", "|---" * (len(heads) + 2) + "|"]
    for row in sorted(report["rows"], key=lambda row: row["labels"] or ""):
        if only is not None and (row["arm"], row["scale"]) not in only:
            continue
        name = f"**{row['name']}**" if (row["arm"], row["scale"]) == ("sgtm", 0.0) else row["name"]
        values = [*row["columns"].values(), *(row["best"][key] for key in chosen if only is None)]
        cells = map(mean_range, values)
        lines.append(f"| {row['labels'] or '–'} | {name} | " + " | ".join(cells) + " |")
    seeds = len({cell["seed"] for cell in report["cells"]})
    lines.append(
        f"\nMean (range) over {seeds} seeds, {report['split']} text. {criteria(report['checks'])} From `{command}`."
    )
    return "\n".join(lines)


def gemma() -> str:
    """Losses and accuracies of Gemma 3 270M, before and after."""
    command = "python recipes/experiment_gemma.py --out results/gemma.json"
    report = load("gemma")
    if report is None:
        return f"Not run yet: `{command}`."
    columns = {
        "forget loss": "routed_forget_loss/token_ce",
        "retain loss": "routed_retain_loss/token_ce",
        "forget questions": "routed_forget_cloze/acc",
        "… blanked": "routed_forget_cloze_control/acc",
        "adjacent questions": "routed_adjacent_cloze/acc",
        "retain questions": "routed_retain_cloze/acc",
        "… blanked ": "routed_retain_cloze_control/acc",
    }
    lines = ["| model | " + " | ".join(map(str.strip, columns)) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, scores in report["rows"].items():
        lines.append(f"| {name} | " + " | ".join(f"{scores[key]:.2f}" for key in columns.values()) + " |")
    lines.append(
        f"\nOne seed, {report['recipe']['limit']} documents of a side and questions of a task. From `{command}`."
    )
    return "\n".join(lines)


def criteria(checks: list[dict[str, Any]]) -> str:
    """Say how many criteria hold, and which do not."""
    held = sum(bool(check["holds"]) for check in checks)
    missed = [f"{check['name']} ({check['rule']})" for check in checks if not check["holds"]]
    names = "; ".join(missed) or "none"
    return f"Of {len(checks)} criteria, {held} hold in every seed; missed or not measured: {names}."


def grpo_step() -> str:
    """Ratios of a routed GRPO step to TRL's."""
    report = load("grpo_step")
    if report is None:
        return "Not run yet: `python benchmarks/grpo_step.py --out results/grpo_step.json`."
    lines = ["| size | routing | ratio | limit | |", "|---|---|---|---|---|"]
    for target in report["targets"]:
        met = "" if target["met"] else "missed"
        lines.append(f"| {target['size']} | {target['kind']} | {target['value']:.2f} | {target['limit']:.2f} | {met} |")
    lines.append(
        f"\nTime of a routed GRPO step, generation included, over TRL's, median of {report['repeats']} interleaved pairs "
        f"({report['hardware']['device']}, {report['threads']} thread): with the same two LoRAs; the subspace region over two "
        f"LoRAs of the same ranks. From `python benchmarks/grpo_step.py --sizes {' '.join(report['sizes'])} --repeats "
        f"{report['repeats']} --out results/grpo_step.json`."
    )
    return "\n".join(lines)


def monitor_step() -> str:
    """What a monitor adds to a step."""
    report = load("monitor_step")
    if report is None:
        return "Not run yet: `python benchmarks/monitor_step.py --out results/monitor_step.json`."
    lines = ["| size | run | observed step | all steps | limit | |", "|---|---|---|---|---|---|"]
    for t in report["targets"]:
        ratio, met = report["sizes"][t["size"]][t["kind"]]["ratio"], "" if t["met"] else "missed"
        lines.append(f"| {t['size']} | {t['kind']} | {ratio:.2f} | {t['value']:.3f} | {t['limit']:.2f} | {met} |")
    lines.append(
        f"\nTime of a step that the monitor observes over the same step without one, median of {report['repeats']} interleaved "
        f"pairs ({report['hardware']['device']}, {report['threads']} thread), and of all steps where every "
        f"{report['every']}th is observed, the default. From `python benchmarks/monitor_step.py --sizes "
        f"{' '.join(report['sizes'])} --repeats {report['repeats']} --out results/monitor_step.json`."
    )
    return "\n".join(lines)


TABLES = {
    "grpo_step": grpo_step,
    "monitor_step": monitor_step,
    "in_short": in_short,
    "experiment_arithmetic_short": lambda: experiment("arithmetic", losses, ALL, SHORT_ARITHMETIC),
    "experiment_arithmetic": lambda: experiment("arithmetic", with_gaps, ALL),
    "experiment_biology": lambda: experiment("biology", losses, HALF),
    "experiment_biology_shares": lambda: experiment("biology", with_gaps, SHARES, RIVALS),
    "experiment_entangled": lambda: experiment("entangled", with_gaps, HALF),
    "experiment_spanish_shares": lambda: experiment("spanish", losses, SHARES, RIVALS),
    "experiment_entangled_tenth": lambda: experiment("entangled", losses, TENTH),
    "experiment_entangled_few": lambda: experiment("entangled", losses, FEW),
    "experiment_wrong_labels": lambda: experiment("wrong_labels", with_gaps, QUALITIES),
    "experiment_mixed_rows": lambda: experiment("mixed_rows", with_gaps, HALF),
    "experiment_entangled_mixed": lambda: experiment("entangled_mixed", with_gaps, HALF),
    "experiment_spanish": lambda: experiment("spanish", with_gaps, HALF),
    "experiment_spanish_undo": lambda: experiment("spanish_undo", with_gaps, ALL),
    "recovery": lambda: experiment("recovery", recovery),
    "frontier": lambda: experiment("frontier", frontier),
    "leakage": lambda: experiment("leakage", leaking),
    "facts": lambda: experiment("facts", facts),
    "attacks": lambda: experiment("attacks", attacked),
    "step_time": step_time,
    "persona": persona,
    "style": style,
    "style_short": lambda: style(
        [("none", 1.0), ("perfect_filter", 1.0), ("filter", 1.0), ("sgtm", 1.0), ("sgtm", 0.0)]
    ),
    "persona_short": persona_short,
    "reward_hack_short": reward_hack_short,
    "gemma": gemma,
    "reward_hack": reward_hack,
}


def render(text: str) -> str:
    """Return a page with every marked table made anew."""
    return MARK.sub(
        lambda match: f"<!-- {match['name']} -->\n{TABLES[match['name']]()}\n<!-- /{match['name']} -->", text
    )


if __name__ == "__main__":
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = render(before)
        if "--check" in sys.argv[1:]:
            if before != after:
                sys.exit(f"{page.name} differs from results/: run `python docs/tables.py`")
        else:
            page.write_text(after, encoding="utf-8")
