"""Tables of the experiments that fine-tune a model: a style of speaking, and Gemma."""

from __future__ import annotations

from experiments.tables.experiment_tables import SAME_LABELS
from experiments.tables.results import criteria, load, mean_range
from experiments.tables.rl_tables import Arms


def style(only: Arms = None) -> str:
    """Return the table of samples in the style and of losses on styled and plain text, of every arm and kind of labels."""
    command = "python recipes/sft_style.py --config recipes/configs/experiment_style.yaml"
    report = load("style")
    if report is None:
        return f"Not run yet: `{command}`."
    heads = ["style, entry", "style, question", "removed, entry", "removed, question", "plain loss", SAME_LABELS]
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
    """Return the table of losses and accuracies of Gemma 3 270M, before and after."""
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
