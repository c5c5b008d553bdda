"""Tables of experiments (`recipes/experiment.py`): methods side by side, over labels and seeds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from experiments.report.aggregate import (
    BASE,
    Comparison,
    Result,
    aggregate,
    complete_seeds,
)
from experiments.report.attackers import attacker_documents
from experiments.report.caveats import teaches_facts
from experiments.report.costs import costs
from experiments.report.methods import base_of, card, in_order, variant_name
from experiments.report.numbers import part, ranged
from experiments.report.targets import targets
from experiments.report.verdicts import edge
from experiments.tables.absent import Labels, Report, sentence_on_missing
from routed_peft.data import FORGET
from routed_peft.evaluation.measures.robustness import TOLERANCE
from routed_peft.evaluation.relearning import Attack
from routed_peft.report.numbers import place

NONE = "–"
REMOVED, RELEARNED, COMPUTE, PENALTY = "removed", "relearned", "compute", "penalty"
SAME_LABELS, EQUAL, PERFECT = "retain tax, same labels", "… equal retain text", "… perfect filter"
"""Columns. The retain tax names the filter that it is taken against."""


def losses(
    report: Report,
    command: str,
    *,
    labels: Sequence[Labels],
    methods: Collection[str] | None = None,
    name_all: bool = False,
) -> str:
    """Return a table of methods over seeds, at one kind of labels or more, of those that most seeds have.

    Args:
        report: the experiment.
        command: that made it.
        labels: share of documents that carry one, recall and precision.
        methods: keys; all by default, at several kinds of labels those that look at them.
        name_all: name below the table all that the experiment asks for and lacks, with other labels and by other methods, too.
    """
    found, count = most_seeds(report, labels)
    if not count:
        return f"Not run yet: `{command}`."
    results = [
        r for _, comparison in found for r in results_with_row(comparison, methods, labeled_only=len(labels) > 1)
    ]
    whole = aggregate([cell for cell in report["cells"] if cell["seed"] in found[0][1].seeds])  # all its filters
    columns: dict[str, Callable[[Result], str]] = {"labels": lambda r: r.condition.labels} if len(labels) > 1 else {}
    columns |= {
        "method": lambda r: method_name(r, report),
        "forget loss": lambda r: ranged(r.forget),
        RELEARNED: lambda r: relearned(r, report, count),
        "retain loss": lambda r: ranged(r.retain),
        REMOVED: lambda r: ranged(r.removed, as_share=True),
        SAME_LABELS: lambda r: ranged(r.retain_tax_same_labels),
        EQUAL: lambda r: ranged(r.retain_tax_equal_retain),
        COMPUTE: lambda r: f"{paid.mean:.2f}" if (paid := costs(whole, r).compute) else NONE,
        PENALTY: lambda r: part(costs(whole, r).penalty),
    }
    rows = [[write(result) for write in columns.values()] for result in results]
    kept = [i for i in range(len(columns)) if any(row[i] != NONE for row in rows)]
    names = [list(columns)[i] for i in kept]
    absent = (
        sentence_on_missing(report) if name_all else sentence_on_missing(report, [kind for kind, _ in found], methods)
    )
    said = [*caption(report, found, results=results, names=names, count=count), *absent, f"From `{command}`."]
    return table_with_caption(names, [[row[i] for i in kept] for row in rows], said)


def caption(
    report: Report,
    found: Sequence[tuple[Labels, Comparison]],
    *,
    results: Sequence[Result],
    names: Collection[str],
    count: int,
) -> list[str]:
    """Return the sentences below `losses`: the meaning of its columns, and the targets that were missed."""
    settings = report["settings"]
    tokens = settings["steps"] * settings["batch_size"] * settings["length"] / 1e6
    said = [
        f"Mean (range) over {count} {'seeds' if count > 1 else 'seed'}, {tokens:.2f} million training tokens each, nats per "
        "token on test text."
    ]
    if RELEARNED in names:
        said.append(f"Relearned: after the worst of {attack_description(report)}.")
        if teaches_facts(settings):
            said.append("The attacker's lines are new, their facts are not: the facts that are scored are among them.")
    said += self_labels(results)
    said.append(f"Targets missed: {target_list(found, False)}.")
    if (open_ones := target_list(found, None)) != "none":
        said.append(f"Cannot be told: {open_ones}.")
    return said


def recovery(report: Report, command: str) -> str:
    """Return a table of the steps until an attacker has the knowledge back, with all labels."""
    found = aggregate(report["cells"])
    (name,), steps = report["experiment"]["attacks"], report["experiment"]["attack_steps"]
    rows = []
    for result in results_with_row(found, None, labeled_only=False):
        attack = result.attacks.get(name)
        if result.condition.method == BASE:
            rows.append([method_name(result, report), ranged(result.forget), NONE, NONE, "0"])
        elif attack is not None and attack.recovery_by_seed and attack.forget[-1].n == len(found.seeds):
            between = " to ".join(map(place, attack.recovery_range))
            row = [method_name(result, report), ranged(result.forget), ranged(attack.forget[-1]), place(attack.halfway)]
            rows.append([*row, f"{place(attack.recovery)} ({between})"])
    names = ["method", "forget loss", f"… after {steps[-1]} steps", "half-way back", "steps to recover"]
    said = [
        f"Mean (range) over {len(found.seeds)} seeds; the worst case of {attack_description(report)}. Steps to "
        f"recover: until the forget loss of no routing is reached within {TOLERANCE:g} nats; half-way back: until that midway "
        "between no routing and perfect filter.",
        *(f"Target {one.verdict}: {one.wanted}: {one.measured}." for one in targets(found) if "steps" in one.wanted),
        *sentence_on_missing(report),
        f"From `{command}`.",
    ]
    return table_with_caption(names, rows, said)


def markdown(names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def table_with_caption(names: Sequence[str], rows: Sequence[Sequence[str]], said: Sequence[str]) -> str:
    """Return a table with the sentences below it."""
    return "\n".join([*markdown(names, rows), "", " ".join(said)])


def most_seeds(report: Report, labels: Sequence[Labels]) -> tuple[list[tuple[Labels, Comparison]], int]:
    """Sum up an experiment at those kinds of labels that most seeds have, and say how many seeds that is."""
    found = [(kind, of_labels(report["cells"], kind)) for kind in labels]
    count = max(len(comparison.seeds) for _, comparison in found)
    return [(kind, comparison) for kind, comparison in found if len(comparison.seeds) == count], count


def of_labels(cells: list[dict[str, Any]], labels: Labels) -> Comparison:
    """Sum up the cells with these labels and those without any, of seeds that have the models for comparison."""
    kept = [c for c in cells if (c["labeled"], c["recall"], c["precision"]) in ((None, None, None), labels)]
    seeds = complete_seeds(kept)
    return aggregate([cell for cell in kept if cell["seed"] in seeds])


def results_with_row(found: Comparison, methods: Collection[str] | None, labeled_only: bool) -> list[Result]:
    """Return the results that have a row: those of all seeds, and, ``labeled_only``, of methods that look at labels."""
    results = sorted(found.results.values(), key=lambda r: in_order(found.methods).index(r.condition.method))
    return [
        result
        for result in results
        if len(result.cells) == len(found.seeds)
        and (methods is None or base_of(result.condition.method) in methods)
        and (not labeled_only or result.condition.labeled is not None)
    ]


def method_name(result: Result, report: Report) -> str:
    """Return the name of a method; ours stands out."""
    name = card(result.condition.method, report["settings"]).name
    if result.condition.labeled == 1 and result.condition.quality == (1.0, 1.0):
        name = name.replace(" with self-labels", "")  # there is nothing left for them to find
    return f"**{name}**" if result.condition.method == "routed" else name


def attack_description(report: Report, counted: bool = True) -> str:
    """Describe the attackers: documents, how many of them where they are ``counted``, steps and learning rates."""
    about, attacks = report["experiment"], sorted(report["experiment"]["attacks"], key=lambda name: name != "forget")
    split = "held-out" if about.get("attack_split", "validation") == "validation" else "the training set's"
    count = attacker_documents(report["settings"], about) if counted else None
    all_ = "forget documents" if count is None else f"{count} forget documents"
    rest = "of them" if "forget" in attacks else all_ if count is None else f"of {all_}"
    kinds = {name: f"on {name.rpartition('-')[2]} {rest}" for name in attacks if name.startswith("few-shot")}
    kinds |= {"forget": f"on all {all_}"}
    named = " and ".join(kinds.get(name, f"“{name}”") for name in attacks)
    rates = ", ".join(f"{rate:g}" for rate in about["attack_rates"])
    beyond = about.get("extensions", 0)
    more = f", and up to {beyond} beyond an end where the best is there" if beyond else ""
    return (
        f"fine-tuning {named} ({split}), {about['attack_steps'][-1]} steps of {Attack.batch_size} at most, all learning rates "
        f"({rates}{more}) and steps"
    )


def documents_available(report: Report) -> str:
    """Name the held-out forget documents that attackers have, and how many they are."""
    count = attacker_documents(report["settings"], report["experiment"])
    return "held-out forget documents" if count is None else f"{count} held-out forget documents"


def relearned(result: Result, report: Report, seeds: int) -> str:
    """Return the forget loss after the worst attack, where every seed was attacked in every way that is asked for."""
    wanted = [name for name in report["experiment"].get("attacks", ()) if Attack.parse(name).target == FORGET]
    worst, found = result.worst, [result.attacks.get(name) for name in wanted]
    if worst is None or any(attack is None or attack.forget[-1].n < seeds for attack in found):
        return NONE
    if not worst.attacked:
        return worst.verdict
    return ranged(worst.forget[-1]) + edge(worst) + ("" if worst.in_every_seed else f" ({worst.verdict})")


def self_labels(results: Sequence[Result]) -> list[str]:
    """Return the sentence on precision and recall of the labels that regions gave, or none."""
    said = []
    for result in results:
        method, _, changes = result.condition.method.partition(":")
        precision, recall = result.number("found_precision"), result.number("found_recall")
        if method == "routed" and precision and recall and result.condition.labeled != 1:
            which = f" ({variant_name(changes)})" if changes else ""
            said.append(f"{recall.mean:.2f}/{precision.mean:.2f} at {result.condition.labels}{which}")
    return [f"Recall/precision of self-labels: {', '.join(said)}."] if said else []


def target_list(found: Sequence[tuple[Labels, Comparison]], met: bool | None) -> str:
    """Name the targets that are missed, or that cannot be told (None), with the measurements."""
    here: dict[str, dict[str, None]] = {}  # what does not depend on labels comes up with all of them, and is said once
    several = len({labels[1:] for labels, _ in found}) > 1
    for (labeled, recall, precision), comparison in found:
        for target in targets(comparison, [labeled]):
            if target.met is met:
                part, _, wanted = target.wanted.rpartition(" of the labels: ")
                where = f" at {part}" if part else ""
                where += f" ({recall:g}/{precision:g})" if part and several else ""
                here.setdefault(wanted, {})[target.measured + where] = None
    return "; ".join(f"{wanted}: {' / '.join(measured)}" for wanted, measured in here.items()) or "none"
