"""Tables of the experiments with GRPO: a row for every arm."""

from __future__ import annotations

from collections.abc import Collection

from experiments.tables.results import criteria, load, mean_range

Arms = Collection[tuple[str | None, float | None]] | None
"""Arms and scales of the region that have a row; None for all."""


def arms(
    name: str,
    head: str,
    *,
    columns: tuple[str, ...],
    states: tuple[str, ...],
    main: str,
    texts: str,
    only: Arms = None,
) -> str:
    """Return a table with a row for every arm of an experiment with GRPO, and columns for one state or more.

    Args:
        name: of the experiment.
        head: names of the columns, after that of the arm.
        columns: keys of the measurements.
        states: keys of the states.
        main: the arm that is set bold, ablated.
        texts: kind of test data, for the caption.
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
    """Return the table of some arms of reward hacking, at the end."""
    scaled = [("none", 1.0), ("none", 0.0), ("clean", 1.0), ("filter", 1.0), ("penalty", 1.0), ("classic", 0.0)]
    only = [(None, None), *scaled, ("anchored", 1.0), ("anchored", 0.0), ("anchored-random", 0.0)]
    return arms(
        "reward_hack",
        "B | C | D | honest",
        columns=("B", "C", "D", "honest"),
        states=("end",),
        main="anchored",
        texts="prompts",
        only=only,
    )


def persona_short() -> str:
    """Return the table of some arms of the persona, with the trait where it pays."""
    head = "trait | right | ablated: trait | right"
    only = [(arm, None) for arm in (None, "none", "weak", "cut", "random-0", "oracle", "halted")]
    return arms(
        "persona", head, columns=("guilty", "right"), states=("on", "ablated"), main="cut", texts="words", only=only
    )


def reward_hack() -> str:
    """Return the table of hack rates by environment and honest accuracy of every arm, at the end and at the best checkpoint."""
    head = "B | C | D | honest | best checkpoint: B | C | D | honest"
    return arms(
        "reward_hack", head, columns=("B", "C", "D", "honest"), states=("end", "best"), main="anchored", texts="prompts"
    )


def persona() -> str:
    """Return the table of answers with the trait, and of right ones, of every arm with its region and without."""
    head = "trait, guilty | innocent | right | ablated: trait, guilty | innocent | right | "
    head += "best checkpoint, ablated: guilty | innocent | right"
    return arms(
        "persona",
        head,
        columns=("guilty", "innocent", "right"),
        states=("on", "ablated", "ablated_best"),
        main="cut",
        texts="words",
    )
