"""Tables of experiments with one question: settings of self-labels, leakage, single facts, kinds of attacks."""

from __future__ import annotations

import json
from collections.abc import Callable

from experiments.report.aggregate import BASE, Comparison, Result, aggregate
from experiments.report.costs import costs
from experiments.report.methods import VARIANT
from experiments.report.numbers import part, ranged
from experiments.report.relearning import Relearning
from experiments.tables.absent import Report, sentence_on_missing
from experiments.tables.experiment_tables import (
    NONE,
    REMOVED,
    SAME_LABELS,
    documents_available,
    method_name,
    of_labels,
    results_with_row,
    table_with_caption,
)
from routed_peft.evaluation.measures import Spread
from routed_peft.evaluation.relearning.attacks import METHODS, Attack
from routed_peft.report.attacks import spread


def frontier(report: Report, command: str) -> str:
    """Return a table of settings of self-labels: removal, retain tax, and losses with the region on."""
    found = of_labels(report["cells"], (0.5, 1.0, 1.0))
    columns: dict[str, Callable[[Result], str]] = {
        "routed, with": lambda r: setting(r, report),
        "forget loss": lambda r: ranged(r.forget),
        "retain loss": lambda r: ranged(r.retain),
        REMOVED: lambda r: ranged(r.removed, as_share=True),
        SAME_LABELS: lambda r: ranged(r.retain_tax_same_labels),
        "region on: forget": lambda r: ranged(region_on(found, r, "forget")),
        "retain": lambda r: ranged(region_on(found, r, "retain")),
    }
    results = [
        result for result in results_with_row(found, None, labeled_only=False) if result.number("region_on_forget_loss")
    ]
    rows = [[write(result) for write in columns.values()] for result in results]
    said = (
        f"Mean (range) over {len(found.seeds)} seeds, half of the labels. Region on: nats per token above no routing."
    )
    return table_with_caption(list(columns), rows, [said, *sentence_on_missing(report), f"From `{command}`."])


def setting(result: Result, report: Report) -> str:
    """Name the settings by which a routed arm differs from the experiment's."""
    changes = [change.split("=") for change in result.condition.method.partition(VARIANT)[2].split(",") if change]
    told = (f"`{name}` {value} (not {json.dumps(report['settings'][name])})" for name, value in changes)
    return ", ".join(told) or "**nothing changed**"


def region_on(found: Comparison, result: Result, side: str) -> Spread | None:
    """Return the loss of a model with its region on less that of no routing, seed by seed."""
    base = found.get(BASE)
    assert base is not None, "complete seeds have no routing"
    return spread(
        cell[f"region_on_{side}_loss"] - base.cells[seed][f"{side}_loss"]
        for seed, cell in result.cells.items()
        if seed in base.cells
    )


def leaking(report: Report, command: str) -> str:
    """Return a table of the leakage of unlabeled forget text, over shares of labels."""
    found = aggregate(report["cells"])
    rows = []
    for result in sorted(results_with_row(found, None, labeled_only=True), key=lambda r: r.condition.labeled or 0):
        cost = costs(found, result)
        rest = result.over("unlabeled_tokens_by_side").get("forget")
        row = [result.condition.labels, method_name(result, report), ranged(result.forget), ranged(result.retain)]
        row += [
            ranged(result.retain_tax_same_labels),
            NONE if rest is None else f"{rest / 1000:.1f} k",
            part(cost.leakage),
        ]
        rows.append([*row, part(cost.penalty)])
    names = [
        "labels",
        "method",
        "forget loss",
        "retain loss",
        SAME_LABELS,
        "unlabeled forget tokens",
        "leakage",
        "penalty",
    ]
    said = (
        f"Mean (range) over {len(found.seeds)} seeds. Leakage: of the unlabeled forget tokens that a model was trained on, "
        "the share that would teach a plain model as much. Penalty: the share of its retain tokens that it could do "
        "without. Both are read off plain models that saw more and less text; –: they do not tell, or of the leakage not even "
        "that it is below 100 %."
    )
    return table_with_caption(names, rows, [said, *sentence_on_missing(report), f"From `{command}`."])


def facts(report: Report, command: str) -> str:
    """Return a table of two attacks: training on half of the facts to bring back the others, and biases on the logits."""
    found, about = aggregate(report["cells"]), report["experiment"]
    rows = []
    for result in results_with_row(found, None, labeled_only=False):
        half, bias = (result.attacks.get(name) for name in ("facts", "bias+forget"))
        row = [method_name(result, report), *(ranged(half.forget[i]) if half else NONE for i in (0, -1))]
        row += [share_brought_back(half), ranged(result.forget)]
        row.append(NONE if bias is None else ranged(bias.forget[-1]) if bias.attacked else bias.verdict)
        rows.append(row)
    heads = [
        "facts left out: loss",
        "… after the others",
        "share relearned",
        "forget loss",
        "… after a bias on the logits",
    ]
    rates = ", ".join(f"{rate:g}" for rate in about["attack_rates"])
    said = (
        f"Mean (range) over {len(found.seeds)} seeds. Half of the facts that were trained on are trained on again, "
        f"{about['attack_steps'][-1]} steps at most, the worst case of all steps and learning rates ({rates}, and those beyond "
        "an end where the best is there), and the other half is scored. Share relearned: of the loss on these by which the "
        f"model was worse than no routing. The bias is one number a token, fitted to {documents_available(report)} at "
        f"rates of its own ({', '.join(f'{rate:g}' for rate in METHODS['bias'].learning_rates)})."
    )
    return table_with_caption(["method", *heads], rows, [said, *sentence_on_missing(report), f"From `{command}`."])


def attacked(report: Report, command: str) -> str:
    """Return a table of the forget loss after attacks of several kinds."""
    found, about = aggregate(report["cells"]), report["experiment"]
    rows = []
    for result in results_with_row(found, None, labeled_only=False):
        each = (result.attacks.get(name) for name in about["attacks"])
        rows.append(
            [
                method_name(result, report),
                ranged(result.forget),
                *(NONE if a is None else attack_outcome(a) for a in each),
            ]
        )
    rates = ", ".join(f"{rate:g}" for rate in about["attack_rates"])
    said = (
        f"Mean (range) over {len(found.seeds)} seeds, nats per token on test text: the lowest forget loss within "
        f"{about['attack_steps'][-1]} steps of {Attack.batch_size}, at all learning rates ({rates}, and those beyond an end "
        f"where the best is there), with {documents_available(report)}."
    )
    names = ["method", "before", *(f"`{name}`" for name in about["attacks"])]
    return table_with_caption(names, rows, [said, *sentence_on_missing(report), f"From `{command}`."])


def attack_outcome(attack: Relearning) -> str:
    """Write the forget loss at the end of an attack, or that the attack failed."""
    if not attack.attacked:
        return attack.verdict
    return ranged(attack.forget[-1]) + ("" if attack.in_every_seed else f" ({attack.verdict})")


def share_brought_back(attack: Relearning | None) -> str:
    """Write the share of what was removed that an attack has brought back."""
    return (
        NONE if attack is None else ranged(attack.share_relearned, as_share=True) if attack.attacked else attack.verdict
    )
