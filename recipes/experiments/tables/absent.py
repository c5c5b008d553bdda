"""Cells that experiments ask for and their results lack, for the captions of tables."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from experiments.removal.cells import adds_nothing, parse_quality
from experiments.removal.methods import METHODS
from experiments.removal.settings import Settings
from experiments.report.aggregate import Condition, complete_seeds
from experiments.report.methods import base_of, card

Report = dict[str, Any]
"""A summary of `recipes/experiment.py`."""
Labels = tuple[float, float, float]
"""Share of documents that carry a label, recall, precision."""


def as_asked(report: Report, config: Path) -> Report:
    """Return an experiment with the cells that its YAML asks for now: more, perhaps, than when the summary was written."""
    about = yaml.safe_load(config.read_text())
    now = {key: about[key] for key in ("methods", "seeds", "labeled_shares", "label_quality") if key in about}
    return report | {"experiment": report["experiment"] | now}


def asked_labels(report: Report) -> list[Labels]:
    """Return the kinds of labels that an experiment asks for."""
    about = report["experiment"]
    qualities = map(parse_quality, about.get("label_quality", ["1/1"]))
    return [(share, *quality) for quality in qualities for share in sorted(about.get("labeled_shares", ()))]


def not_run(report: Report, labels: Sequence[Labels], methods: Collection[str] | None = None) -> dict[str, list[str]]:
    """Return the labels at which methods that an experiment asks for are not there, by the methods' names.

    Args:
        report: the experiment.
        labels: that are looked at.
        methods: keys of those that are looked at, with their variants; all by default.
    """
    absent: dict[str, list[str]] = {}
    cells = [(Condition.from_cell(cell), cell) for cell in report["cells"]]
    for labeled, recall, precision in labels:
        here = [
            c for kind, c in cells if (kind.labeled, kind.quality) in ((None, None), (labeled, (recall, precision)))
        ]
        seeds = complete_seeds(here) or report["experiment"].get("seeds", ())
        for method in report["experiment"].get("methods", ()):
            base = base_of(method)
            if methods is not None and base not in methods:
                continue
            if adds_nothing(base, Settings(labeled=labeled, recall=recall, precision=precision)):
                continue
            looks = METHODS[base].labels
            wanted = Condition(method, labeled, recall, precision) if looks else Condition(method)
            own = {cell["seed"] for kind, cell in cells if kind == wanted}
            kinds = absent.setdefault(card(method, report["settings"]).name, [])
            if (not own or not own.issuperset(seeds)) and (looks or not kinds):
                kinds.append(wanted.labels if looks else "")
    return {name: kinds for name, kinds in absent.items() if kinds}


def listed(absent: Mapping[str, Sequence[str]]) -> str:
    """List methods, and in brackets where each is absent; those together that are absent at the same places."""
    together: dict[tuple[str, ...], list[str]] = {}
    for name, kinds in absent.items():
        together.setdefault(tuple(kinds), []).append(name)
    names = {kinds: " / ".join(own) for kinds, own in together.items()}
    return "; ".join(f"{own} ({'; '.join(kinds)})" if any(kinds) else own for kinds, own in names.items())


def sentence_on_missing(
    report: Report, labels: Sequence[Labels] | None = None, methods: Collection[str] | None = None
) -> list[str]:
    """Return the sentence that names what is asked for and not there, or none.

    Args:
        report: the experiment.
        labels: that are looked at; all that are asked for by default.
        methods: likewise.
    """
    absent = not_run(report, asked_labels(report) if labels is None else labels, methods)
    return [f"Asked for, and not run yet: {listed(absent)}."] if absent else []
