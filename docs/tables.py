"""Write the tables of README and of pages in docs/ from results/: `python docs/tables.py`; `--check` compares."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from routed_peft.evaluation.measures import Crossing, Spread
from routed_peft.evaluation.report.aggregate import Comparison, Result, aggregate, complete_seeds
from routed_peft.evaluation.report.cards import card, in_order
from routed_peft.evaluation.report.costs import costs
from routed_peft.evaluation.report.page import place
from routed_peft.evaluation.report.page import share as in_percent
from routed_peft.evaluation.report.verdicts import ranged, targets
from routed_peft.experiment.methods import METHODS, UNLEARNING

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "rl.md", ROOT / "docs" / "recipes.md", ROOT / "docs" / "monitoring.md")
Labels = tuple[float, float, float]
"""Share of documents that carry a label, recall, precision."""
RIVALS = ("filter", "classifier_filter", "demix", "era", "sgtm", "routed")
QUALITIES = [(0.5, recall, precision) for recall, precision in ((1.0, 1.0), (0.9, 0.9), (0.8, 0.8), (0.6, 0.9))]
SHARES = [(share, 1.0, 1.0) for share in (0.1, 0.25, 0.5, 0.75, 1.0)]
Arms = Collection[tuple[str | None, float | None]] | None
MARK = re.compile(r"<!-- (?P<name>\w+) -->\n.*?<!-- /(?P=name) -->", re.DOTALL)


def load(name: str) -> Any:
    """Return what ``results/NAME.json`` holds, or None where there is none yet."""
    file = ROOT / "results" / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else None


def mean_range(values: list[float]) -> str:
    """Return mean and range over seeds; a dash where nothing was measured."""
    return ranged(Spread.of(values)) if values else "–"


def experiment(name: str, labels: Sequence[Labels] = ((0.5, 1.0, 1.0),), methods: Collection[str] | None = None) -> str:
    """Losses, way and tax of methods over seeds, at one kind of labels or more, of those that most seeds have.

    Args:
        name: of the experiment.
        labels: share of documents that carry one, recall and precision.
        methods: keys; all by default, at several kinds of labels those that look at them.
    """
    command = f"python recipes/experiment.py --config recipes/configs/experiment_{name}.yaml"
    report = load(name) or {"cells": []}
    found = [(kind, of_labels(report["cells"], kind)) for kind in labels]
    count = max(len(comparison.seeds) for _, comparison in found)
    if not count:
        return f"Not run yet: `{command}`."
    found = [(kind, comparison) for kind, comparison in found if len(comparison.seeds) == count]
    wanted = {kind: shown(comparison, methods, labeled_only=len(labels) > 1) for kind, comparison in found}
    seeds = found[0][1].seeds
    whole = aggregate([cell for cell in report["cells"] if cell["seed"] in seeds])  # its filters tell penalties
    attacked = any(result.attacks for results in wanted.values() for result in results)
    paid = any(costs(comparison, result).compute for kind, comparison in found for result in wanted[kind])
    equal = any(result.tax_equal_retain for results in wanted.values() for result in results)
    several = len(labels) > 1
    results = [result for chosen in wanted.values() for result in chosen]
    changed = any(
        METHODS[result.condition.method.partition(":")[0]].change in (*UNLEARNING, "undo") for result in results
    )
    columns = [*(["labels"] if several else []), "method", "forget loss", *(["… relearned"] if attacked else [])]
    columns += ["retain loss", "way", "tax", *(["… equal retain text"] if equal else [])]
    columns += ["cost", "penalty"] if paid else []
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for chosen in wanted.values():
        for result in chosen:
            title = card(result.condition.method, report["settings"]).name
            cells = [result.condition.labels] if several else []
            cells += [f"**{title}**" if result.condition.method == "routed" else title, ranged(result.forget)]
            cells += [relearned(result, count)] if attacked else []
            cells += [ranged(result.retain), ranged(result.way, as_share=True), ranged(result.tax)]
            cells += [ranged(result.tax_equal_retain)] if equal else []
            paid_here = costs(whole, result)
            cells += (
                [f"{paid_here.compute.mean:.2f}" if paid_here.compute else "–", wasted(paid_here.penalty)]
                if paid
                else []
            )
            lines.append(f"| {' | '.join(cells)} |")
    settings = report["settings"]
    tokens = settings["steps"] * settings["batch_size"] * settings["length"] / 1e6
    lines.append(
        f"\nMean (range) over {count} {'seeds' if count > 1 else 'seed'}, {tokens:.2f} million training tokens each, nats per "
        "token on test text. "
        + ("Unlearning starts from no routing; what it trains on top is in the cost. " if changed else "")
        + (f"Relearned: after the worst of {strength(report['experiment'])}. " if attacked else "")
        + (
            "‡: its best rate is the lowest or highest tried, in some seed. "
            if any("‡" in line for line in lines)
            else ""
        )
        + ("… equal retain text: against that filter, trained until it has seen as much of it. " if equal else "")
        + (
            "Cost: floating-point operations of training over those of no routing; penalty: share of its retain text that a "
            "plain model could do without for the same retain loss, as far as the filters here can tell. "
            if paid
            else ""
        )
        + self_labels(results)
        + f"Targets missed: {named(found, False)}. "
        + (f"Cannot be told: {open_ones}. " if (open_ones := named(found, None)) != "none" else "")
        + f"From `{command}`."
    )
    return "\n".join(lines)


def of_labels(cells: list[dict[str, Any]], labels: Labels) -> Comparison:
    """Sum up the cells with these labels and those without any, of seeds that have what others are compared with."""
    kept = [c for c in cells if (c["labeled"], c["recall"], c["precision"]) in ((None, None, None), labels)]
    seeds = complete_seeds(kept)
    return aggregate([cell for cell in kept if cell["seed"] in seeds])


def shown(found: Comparison, methods: Collection[str] | None, labeled_only: bool) -> list[Result]:
    """Return the results that have a row: those of all seeds, and, ``labeled_only``, of methods that look at labels."""
    results = sorted(found.results.values(), key=lambda r: in_order(found.methods).index(r.condition.method))
    return [
        result
        for result in results
        if len(result.cells) == len(found.seeds)
        and (methods is None or result.condition.method in methods)
        and (not labeled_only or result.condition.labeled is not None)
    ]


def wasted(penalty: Crossing | None) -> str:
    """Write a compute penalty, or its bound."""
    if penalty is None:
        return "–"
    return ("" if penalty.relation == "=" else f"{penalty.relation} ") + in_percent(penalty.at)


def strength(about: dict[str, Any]) -> str:
    """Say what attackers have: documents, steps and learning rates."""
    split = "held-out" if about.get("attack_split", "validation") == "validation" else "the training set's"
    kinds = [
        f"on {name.rpartition('-')[2]} documents" if "few-shot" in name else f"“{name}”" for name in about["attacks"]
    ]
    named = " and ".join(dict.fromkeys(kind.replace("“forget”", "on all forget documents") for kind in kinds))
    rates = ", ".join(f"{rate:g}" for rate in about["attack_rates"])
    return (
        f"fine-tuning {named} ({split}), {about['attack_steps'][-1]} steps of 16 at most, all learning rates ({rates}"
        f"{', and one more where the best is at an end' if about.get('extensions') else ''}) and steps"
    )


def relearned(result: Result, seeds: int) -> str:
    """Forget loss after the worst attack, where every seed was attacked."""
    worst = result.worst
    if worst is None or worst.forget[-1].n < seeds:
        return "–"
    return f"{ranged(worst.forget[-1])}{'' if worst.interior else ' ‡'}" if worst.attacked else worst.verdict


def self_labels(results: Sequence[Result]) -> str:
    """Say how well the region labelled the rows that had no label, in the routed arm."""
    found = [
        (r, r.number("found_precision"), r.number("found_recall")) for r in results if r.condition.method == "routed"
    ]
    said = [
        f"{precision.mean:.2f} / {recall.mean:.2f} at {result.condition.labels}"
        for result, precision, recall in found
        if precision and recall and result.condition.labeled != 1
    ]
    return f"Precision / recall of self-labels: {', '.join(said)}. " if said else ""


def named(found: Sequence[tuple[Labels, Comparison]], met: bool | None) -> str:
    """Name the targets that are missed, or that cannot be told (None), with what came out instead."""
    here: dict[str, dict[str, None]] = {}  # what does not depend on labels comes up with all of them, and is said once
    several = len({labels[1:] for labels, _ in found}) > 1
    for (labeled, recall, precision), comparison in found:
        for target in targets(comparison, [labeled]):
            if target.met is met:
                share, _, wanted = target.wanted.rpartition(" of the labels: ")
                where = f" at {share}" if share else ""
                where += f" ({recall:g}/{precision:g})" if share and several else ""
                here.setdefault(wanted, {})[target.measured + where] = None
    return "; ".join(f"{wanted}: {' / '.join(measured)}" for wanted, measured in here.items()) or "none"


def recovery() -> str:
    """Steps until an attacker has back what the model that was never unlearnt knows, with all labels."""
    command = "python recipes/experiment.py --config recipes/configs/experiment_recovery.yaml"
    report = load("recovery")
    if report is None:
        return f"Not run yet: `{command}`."
    found = of_labels(report["cells"], (1.0, 1.0, 1.0))
    (name,) = report["experiment"]["attacks"]
    steps = report["experiment"]["attack_steps"]
    lines = [
        f"| method | forget loss | … after {steps[-1]} steps | half-way back | steps to recover |",
        "|---|---|---|---|---|",
    ]
    for result in shown(found, None, labeled_only=False):
        if (attack := result.attacks.get(name)) is not None and attack.forget[-1].n == len(found.seeds):
            title = card(result.condition.method, report["settings"]).name
            title = f"**{title}**" if result.condition.method == "routed" else title
            between = " to ".join(map(place, attack.recovery_range))
            cells = [title, ranged(result.forget), ranged(attack.forget[-1]), place(attack.halfway)]
            lines.append(f"| {' | '.join(cells)} | {place(attack.recovery)} ({between}) |")
    lines.append(
        f"\nMean (range) over {len(found.seeds)} seeds; the worst case of {strength(report['experiment'])}. Steps to "
        "recover: until the forget loss of no routing is reached within 0.02 nats; half-way back: until that midway "
        "between no routing and perfect filter. "
        + " ".join(f"Target {t.verdict}: {t.wanted}: {t.measured}." for t in targets(found) if "steps" in t.wanted)
        + f" From `{command}`."
    )
    return "\n".join(lines)


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
    "experiment_arithmetic": lambda: experiment("arithmetic", [(1.0, 1.0, 1.0)]),
    "experiment_biology": lambda: experiment("biology"),
    "experiment_biology_shares": lambda: experiment("biology", SHARES, RIVALS),
    "experiment_entangled": lambda: experiment("entangled"),
    "experiment_wrong_labels": lambda: experiment("wrong_labels", QUALITIES),
    "experiment_spanish": lambda: experiment("spanish"),
    "recovery": recovery,
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
