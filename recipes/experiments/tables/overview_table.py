"""Table of all experiments on text: routing and filters, over texts and labels."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from experiments.report.aggregate import BASE, FILTER, ORACLE, Comparison, Condition, Result
from experiments.report.attackers import attacker_documents
from experiments.report.costs import costs
from experiments.report.methods import base_of
from experiments.report.numbers import ranged
from experiments.report.targets import ON, REMOVED, ROBUST, TAX, goals
from experiments.tables.absent import Labels, Report, listed, not_run
from experiments.tables.experiment_tables import (
    COMPUTE,
    NONE,
    PERFECT,
    RELEARNED,
    SAME_LABELS,
    attack_description,
    markdown,
    method_name,
    most_seeds,
    relearned,
    results_with_row,
)
from experiments.tables.tradeoff_tables import region_on
from routed_peft.report.numbers import number, share


def overview(parts: Sequence[tuple[str, Report, Sequence[Labels]]], methods: Collection[str], commands: str) -> str:
    """Return one table of several experiments: removal, robustness and costs, over labels.

    Args:
        parts: of each its title, the experiment, and kinds of labels.
        methods: keys of those that look at labels; beside them stand no routing and the perfect filter, once.
        commands: that made them.
    """
    rows: dict[tuple[str, ...], list[str]] = {}  # by what they say, so that what two experiments share comes once
    attacks: dict[str, list[str]] = {}  # what attackers do -> on which texts, and how many documents they have
    seeds: set[int] = set()
    absent: dict[str, list[str]] = {}
    for name, report, labels in parts:
        found, count = most_seeds(report, labels)
        if not count:
            continue
        seeds.add(count)
        documents = attacker_documents(report["settings"], report["experiment"])
        counted = name if documents is None else f"{name}: {documents} documents"
        attacks.setdefault(attack_description(report, counted=False), []).append(counted)
        for method, kinds in not_run(report, [kind for kind, _ in found], methods).items():
            absent.setdefault(method, []).append(f"{name}, {' and '.join(kinds)}" if any(kinds) else name)
        ends = [(found[0][1], found[0][1].get(method)) for method in (BASE, ORACLE)]
        between = [(c, r) for _, c in found for r in results_with_row(c, methods, labeled_only=True)]
        between = [(c, r) for c, r in between if r.condition != Condition(FILTER, 1.0, 1.0, 1.0)]  # the perfect filter
        for comparison, r in (ends[0], *between, ends[1]):
            assert r is not None, "complete seeds have both"
            row = overview_row(comparison, r, report=report, seeds=count)
            rows.setdefault(tuple(row), [name, r.condition.labels, *row])
    names = ["text", "labels", "method", "forget loss", RELEARNED, "retain loss", "removed", SAME_LABELS, PERFECT]
    names += ["region on", COMPUTE]
    worst = "; ".join(f"of {attack} ({'; '.join(texts)})" for attack, texts in attacks.items())
    about = (
        f"Mean (range) over {' or '.join(map(str, sorted(seeds)))} seeds, nats per token on test text. Relearned: after the "
        f"worst {worst}. Retain tax: retain loss less that of the filter with the same labels, and less that of the perfect "
        "filter, which spends all of its tokens on retain text. Region on: forget and retain loss less those of no routing. "
        f"✗: a goal missed, that is at least {share(REMOVED[0.5])} removed at half of the labels and {share(REMOVED[0.1])} "
        f"at a tenth, where they are right, retain tax at most {TAX:.2f} against the filter with the same labels, relearned "
        f"at least {ROBUST:.2f} of the perfect filter’s loss, region on at most {ON:.2f} on both sides. From {commands}."
    )
    if absent:
        about += f" Asked for, and not run yet: {listed(absent)}."
    return "\n".join([*markdown(names, list(rows.values())), "", about])


def overview_row(found: Comparison, result: Result, *, report: Report, seeds: int) -> list[str]:
    """Return the cells of `overview` for a method, with marks where a routed one misses a goal."""
    labeled = result.condition.labeled
    ours = base_of(result.condition.method) == "routed" and labeled is not None
    aims = {goal.kind: goal for goal in goals(found, result, labeled)} if ours and labeled else {}
    rises = [region_on(found, result, side) for side in ("forget", "retain")] if "on" in aims else []
    texts = {
        "robust": relearned(result, report, seeds),
        "": ranged(result.retain),
        "removed": ranged(result.removed, as_share=True),
        "tax": ranged(result.retain_tax_same_labels) if labeled is not None else NONE,
        "best": ranged(result.retain_tax) if result.condition.method != ORACLE else NONE,
        "on": " / ".join(f"{'+' * (one.mean >= 0)}{number(one.mean)}" for one in rises if one) or NONE,
    }
    missed = {kind for kind, goal in aims.items() if goal.met is False}
    paid = costs(found, result).compute
    return [
        method_name(result, report),
        ranged(result.forget),
        *(text + " ✗" * (kind in missed) for kind, text in texts.items()),
        f"{paid.mean:.2f}" if paid else NONE,
    ]
