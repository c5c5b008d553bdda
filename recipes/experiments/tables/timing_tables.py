"""Tables of the time that routing and monitoring add to a training step."""

from __future__ import annotations

from experiments.tables.results import load


def step_time() -> str:
    """Return the table of ratios of a routed step to an unrouted one."""
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


def grpo_step() -> str:
    """Return the table of ratios of a routed GRPO step to TRL's."""
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
    """Return the table of the time that a monitor adds to a step."""
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
