"""Tables of README and of pages in docs/, each between two marks, made anew from results/."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from experiments.tables.absent import Labels
from experiments.tables.experiment_tables import losses, recovery
from experiments.tables.finetuning_tables import gemma, style
from experiments.tables.overview_table import overview
from experiments.tables.results import ROOT, load_experiment
from experiments.tables.rl_tables import persona, persona_short, reward_hack, reward_hack_short
from experiments.tables.timing_tables import grpo_step, monitor_step, step_time
from experiments.tables.tradeoff_tables import attacked, facts, frontier, leaking

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
MARK = re.compile(r"<!-- (?P<name>\w+) -->\n.*?<!-- /(?P=name) -->", re.DOTALL)


def experiment(name: str, write: Callable[..., str], **options: Any) -> str:
    """Return a table of an experiment, or the command that makes it."""
    command = f"python recipes/experiment.py --config recipes/configs/experiment_{name}.yaml"
    report = load_experiment(name)
    return f"Not run yet: `{command}`." if report is None else write(report, command, **options)


def in_short() -> str:
    """Return the table of routing and filters on all texts and kinds of labels."""
    parts = {name: (title, load_experiment(name), labels) for name, title, labels in OVERVIEW}
    there = [name for name, part in parts.items() if part[1] is not None]
    commands = (
        f"`python recipes/experiment.py --config recipes/configs/experiment_{{{','.join(there)}}}.yaml`, one by one"
    )
    return overview([parts[name] for name in there], FILTERS_AND_ROUTED, commands)


TABLES = {
    "grpo_step": grpo_step,
    "monitor_step": monitor_step,
    "in_short": in_short,
    "experiment_arithmetic_short": lambda: experiment("arithmetic", losses, labels=ALL, methods=SHORT_ARITHMETIC),
    "experiment_arithmetic": lambda: experiment("arithmetic", with_gaps, labels=ALL),
    "experiment_biology": lambda: experiment("biology", losses, labels=HALF),
    "experiment_biology_shares": lambda: experiment("biology", with_gaps, labels=SHARES, methods=RIVALS),
    "experiment_entangled": lambda: experiment("entangled", with_gaps, labels=HALF),
    "experiment_spanish_shares": lambda: experiment("spanish", losses, labels=SHARES, methods=RIVALS),
    "experiment_entangled_tenth": lambda: experiment("entangled", losses, labels=TENTH),
    "experiment_entangled_few": lambda: experiment("entangled", losses, labels=FEW),
    "experiment_wrong_labels": lambda: experiment("wrong_labels", with_gaps, labels=QUALITIES),
    "experiment_mixed_rows": lambda: experiment("mixed_rows", with_gaps, labels=HALF),
    "experiment_entangled_mixed": lambda: experiment("entangled_mixed", with_gaps, labels=HALF),
    "experiment_spanish": lambda: experiment("spanish", with_gaps, labels=HALF),
    "experiment_spanish_undo": lambda: experiment("spanish_undo", with_gaps, labels=ALL),
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


def main(arguments: Sequence[str]) -> None:
    """Write the tables of all pages; with ``--check`` compare them only, and exit with a message where one differs."""
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = render(before)
        if "--check" not in arguments:
            page.write_text(after, encoding="utf-8")
        elif before != after:
            sys.exit(f"{page.name} differs from results/: run `python docs/tables.py`")
