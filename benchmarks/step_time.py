"""Time and memory of a routed training step over the same step, of the same model with the same extra units, unrouted.

    python benchmarks/step_time.py --sizes small medium large --repeats 9 --out results/step_time.json

Every number is a ratio within one run: pairs of steps side by side, taking turns at being first, medians over the pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from steps import (
    RETAIN,
    ROUTES,
    ROWS,
    SIZES,
    Size,
    Step,
    compare,
    make_optimizer,
    peak_bytes,
    plain_step,
    routed_step,
    row_labels,
    todays_steps,
    token_labels,
)

from routed_peft import GradientRouting, Route
from routed_peft.runs.provenance import versions

SHARES = (0.0, 0.1, 0.5, 0.9)
TIME_LIMITS = {0.0: 1.05, 0.1: 1.05, 0.5: 1.00, 0.9: 0.92}
MEMORY_LIMIT, COMPILED_LIMIT, REGION_LIMIT = 1.02, 1.05, 0.01


def routed_steps(size: Size, device: str, labels: dict[str, torch.Tensor]) -> dict[str, Step]:
    model, batch = size.model(device), size.batch(device)
    routing, optimizer = GradientRouting(model, ROUTES, train_base=True), make_optimizer(model)
    return {name: partial(routed_step, routing, model, optimizer, batch, m) for name, m in labels.items()}


def time_by_share(size: Size, device: str, repeats: int) -> list[dict[str, Any]]:
    """Shares of zero-weight rows and tokens; `sgtm` has the remaining rows ablate the region."""
    kinds: dict[str, Callable[[float], torch.Tensor]] = {
        "rows": row_labels,
        "tokens": partial(token_labels, length=size.length),
        "sgtm rows": partial(row_labels, rest=RETAIN),
    }
    cases = {f"{kind} {share}": (kind, share) for share in SHARES for kind in kinds}
    steps = routed_steps(size, device, {case: kinds[kind](share) for case, (kind, share) in cases.items()})
    model = size.model(device)
    plain = partial(plain_step, model, make_optimizer(model), size.batch(device))
    timed = compare(plain, steps, repeats * size.pairs, device)
    return [{"kind": cases[case][0], "zero": cases[case][1], **numbers} for case, numbers in timed.items()]


def memory_by_share(size: Size, device: str) -> list[dict[str, Any]]:
    """Peak memory of one model, first unrouted, then routed."""
    model, batch = size.model(device), size.batch(device)
    optimizer = make_optimizer(model)
    plain = peak_bytes(partial(plain_step, model, optimizer, batch), optimizer, device)
    routing = GradientRouting(model, ROUTES, train_base=True)
    found = []
    for share in SHARES:
        for kind, labels in {"rows": row_labels(share), "tokens": token_labels(share, size.length)}.items():
            routed = peak_bytes(partial(routed_step, routing, model, optimizer, batch, labels), optimizer, device)
            found.append({"kind": kind, "zero": share, "bytes": routed, "ratio": routed / plain})
    return found


def compiled(size: Size, device: str, repeats: int) -> dict[str, float]:
    """Compare compiled steps, both without the gather; and the compiled gradients with those of eager ones."""
    labels, batch = row_labels(0.5, RETAIN), size.batch(device)
    grads = []
    steps: list[Step] = []
    for routed, compile_it in ((True, False), (True, True), (False, True)):
        model = size.model(device)
        optimizer = make_optimizer(model)
        run: Any = torch.compile(model) if compile_it else model
        step: Step = partial(plain_step, run, optimizer, batch)
        if routed:
            routing = GradientRouting(model, ROUTES, train_base=True, gather=False)
            with routing(labels):
                run(**batch).loss.backward()
            grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
            optimizer.zero_grad()
            step = partial(routed_step, routing, run, optimizer, batch, labels)
        if compile_it:
            steps.append(step)
    scale = max(float(g.abs().max()) for g in grads[0].values())
    error = max(float((grads[1][name] - g).abs().max()) for name, g in grads[0].items()) / scale
    timed = compare(steps[1], {"compiled": steps[0]}, repeats, device)["compiled"]
    return {**timed, "relative_gradient_error": error}


def regions(size: Size, device: str, repeats: int) -> list[dict[str, Any]]:
    """Routed over unrouted with 1, 2 and 4 regions; half the rows are core's, which ablate all, the others a region's."""
    found: list[dict[str, Any]] = []
    for count in (1, 2, 4):
        wide = replace(size, regions=count)
        names = [f"r{i}" for i in range(count)]
        routes = {"core": Route(ablated=tuple(names))}
        for name in names:
            others = tuple(n for n in names if n != name)
            routes[name] = Route(weights={"base": 0.0}, ablated=others)
        labels = torch.tensor([0 if i % 2 else 1 + (i // 2) % count for i in range(ROWS)])
        model, batch = wide.model(device), wide.batch(device)
        plain = partial(plain_step, model, make_optimizer(model), batch)
        model = wide.model(device)
        routing = GradientRouting(model, routes, train_base=True)
        step = partial(routed_step, routing, model, make_optimizer(model), batch, labels)
        found.append({"regions": count, **compare(plain, {"routed": step}, repeats, device)["routed"]})
    for row in found[1:]:
        row["per_further_region"] = (row["ratio"] - found[0]["ratio"]) / (row["regions"] - 1)
    return found


def targets(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Hold the report against the limits."""
    found = []
    for size, result in report["sizes"].items():
        for share, limit in TIME_LIMITS.items():
            worst = max(row["ratio"] for row in result["time"] if row["zero"] == share)
            found.append(
                {"name": f"{size}: time, {share:.0%} zero weights, worst kind", "limit": limit, "value": worst}
            )
        memory = max(row["ratio"] for row in result["memory"])
        found.append({"name": f"{size}: peak memory, worst share", "limit": MEMORY_LIMIT, "value": memory})
    for name, limit, value in (
        ("compiled, no gather", COMPILED_LIMIT, report.get("compiled", {}).get("ratio")),
        *(
            (f"further region, up to {row['regions']}", REGION_LIMIT, row["per_further_region"])
            for row in report["regions"][1:]
        ),
    ):
        if value is not None:
            found.append({"name": name, "limit": limit, "value": value})
    return [{**target, "met": target["value"] <= target["limit"]} for target in found]


def show(report: dict[str, Any]) -> None:
    console = Console()
    table = Table(title="Training step, routed / unrouted: median ratio (quartiles)")
    for column in ("size", "labels", *(f"{share:.0%} zero" for share in SHARES), "s per step"):
        table.add_column(column)
    for size, result in report["sizes"].items():
        for kind in dict.fromkeys(row["kind"] for row in result["time"]):
            rows = [row for row in result["time"] if row["kind"] == kind]
            cells = (f"{r['ratio']:.3f} ({r['lower_quartile']:.2f}–{r['upper_quartile']:.2f})" for r in rows)
            table.add_row(size, kind, *cells, f"{rows[0]['seconds']:.3f}")
    console.print(table)
    table = Table("beside it, half of the rows of weight zero", "ratio")
    for name, numbers in report["today"].items():
        table.add_row(name, f"{numbers['ratio']:.3f}")
    console.print(table)
    table = Table("target", "limit", "measured", "")
    for target in report["targets"]:
        table.add_row(
            target["name"], f"{target['limit']:.2f}", f"{target['value']:.3f}", "met" if target["met"] else "missed"
        )
    console.print(table)


def hardware(device: str) -> dict[str, Any]:
    names = [line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    found = {"device": device, "processor": names[0] if names else platform.processor(), "cores": os.cpu_count()}
    return found | ({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {})


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["small", "medium", "large"])
    parser.add_argument(
        "--repeats", type=int, default=9, help="pairs of steps; four times as many at the size small, twice at medium"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="on the CPU; one thread is timed by its own clock")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    middle = SIZES[args.sizes[len(args.sizes) // 2]]
    report: dict[str, Any] = {
        "hardware": hardware(args.device),
        "versions": {**versions(), "python": platform.python_version()},
        "threads": args.threads,
        "repeats": args.repeats,
        "sizes": {},
    }
    for name in args.sizes:
        size = SIZES[name]
        times = time_by_share(size, args.device, args.repeats)
        report["sizes"][name] = {**asdict(size), "time": times, "memory": memory_by_share(size, args.device)}
    model = middle.model(args.device)
    plain = partial(plain_step, model, make_optimizer(model), middle.batch(args.device))
    half = row_labels(0.5)
    others = routed_steps(middle, args.device, {"routed": half}) | todays_steps(middle, args.device, half)
    report["today"] = compare(plain, others, args.repeats, args.device)
    report["regions"] = regions(middle, args.device, 2 * args.repeats)
    if not args.no_compile:
        report["compiled"] = compiled(middle, args.device, args.repeats)
    report["targets"] = targets(report)
    show(report)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    main()
