"""Attacks on what a user names, a path or a Hub id, with records to continue from and to read."""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from routed_peft.evaluation.measures.robustness import TOLERANCE
from routed_peft.evaluation.measures.statistics import with_interval
from routed_peft.evaluation.processes import processes
from routed_peft.evaluation.relearning.attacks import Attack
from routed_peft.evaluation.relearning.data import AttackData
from routed_peft.evaluation.relearning.summary import FORMAT, KIND, read_summary, summarise
from routed_peft.evaluation.relearning.sweep import STEPS, check_settings, relearn
from routed_peft.evaluation.source import Regions, open_plain
from routed_peft.evaluation.text_loss import TextLoss
from routed_peft.runs.provenance import versions
from routed_peft.runs.records import RUN, SUMMARY, RunDirectory, own_regions


def relearn_source(
    src: str | Path,
    data: AttackData,
    out: str | Path,
    attacks: Sequence[Attack | str] = ("forget",),
    learning_rates: Sequence[float] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    steps: Sequence[int] = STEPS,
    extensions: int = 2,
    regions: Regions | None = None,
    reference: str | Path | float | None = None,
    revision: str | None = None,
    device: str | None = None,
    progress: bool = False,
    oracle: str | Path | None = None,
) -> dict[str, Any]:
    """Attack a run, an export or any other checkpoint, and write what came of it.

    ``out`` gets ``run.json``, ``metrics.jsonl`` and ``summary.json``. Curves that are in ``metrics.jsonl`` already, of the same
    weights, data and settings, are not run again: a command that was killed is repeated, and attacks, rates and seeds can be
    added to one that has finished.

    Args:
        src: directory or Hub id of a run, or of a plain checkpoint.
        data: see `AttackData`.
        out: directory, which holds no attacks on something else.
        attacks: what is tried; see `Attack`.
        learning_rates: of full and LoRA fine-tuning; see `relearn`.
        seeds: see `relearn`.
        steps: see `relearn`.
        extensions: see `relearn`.
        regions: the regions of a run that stay, and are merged. By default none, so that the ablated model is attacked; all of
            an arm that was trained without routing (`own_regions`).
        reference: the model from which nothing was removed, or its loss on ``data.forget_test`` in nats per token.
        revision: branch, tag or commit of a Hub id.
        device: where to attack; by default a GPU if there is one.
        progress: show a bar for every attack.
        oracle: where the same attacks on the perfect filter were written to, for the normalised area under the curves.

    Returns:
        What ``summary.json`` holds: ``attacks``, by name, as `summarise` returns them; ``start``, the losses before, and
        ``start_intervals``, between which they would lie in 95 of 100 draws of documents; what was attacked, and with which
        versions.

    Raises:
        ValueError: where the source is no causal language model, tokenizers differ, the reference does not know the forget
            side better than the source (there is nothing to recover), ``out`` holds attacks on something else, or ``oracle``
            lacks an attack or was attacked otherwise; and what `relearn` raises.
    """
    chosen = [Attack.parse(attack) if isinstance(attack, str) else attack for attack in attacks]
    if not chosen or len({attack.name for attack in chosen}) < len(chosen):
        raise ValueError(f"`attacks` must be different and at least one, got {[attack.name for attack in chosen]}")
    given = None if learning_rates is None else tuple(learning_rates)
    grids = [given if attack.method in ("full", "lora") else None for attack in chosen]
    for attack, grid in zip(chosen, grids, strict=True):  # all of them before the first is run
        check_settings(attack, data, attack.learning_rates if grid is None else grid, seeds, steps)
    if isinstance(reference, int | float) and not 0 < reference < math.inf:
        raise ValueError(f"`reference` is a loss in nats per token, above 0, got {reference}")
    records = RunDirectory(out)
    regions = own_regions(src) if regions is None else regions
    about: dict[str, Any] = {"source": str(src), "revision": revision, "regions": regions}
    _check_free(records, about)
    if oracle is not None and reference is None:
        raise ValueError(
            "`oracle` needs a `reference`: the area lies between the perfect filter and what it is to reach"
        )
    model, tokenizer = open_plain(src, regions, revision, device)
    conditions = _conditions(chosen, data, tokenizer, steps, seeds)
    others = {} if oracle is None else _oracle(oracle, conditions)
    start, intervals = _before(model, tokenizer, data)
    references = _references(reference, model, tokenizer, data, chosen, seeds, device)
    known = start | {"facts": _facts_loss(model, tokenizer, data, seeds) if "facts" in references else math.nan}
    for target, loss in references.items():
        if loss > known[target] - TOLERANCE:
            raise ValueError(
                f"there is nothing to recover: the reference's {target} loss, {loss:.3f}, is not {TOLERANCE} nats below that "
                f"of {str(src)!r}, {known[target]:.3f}. Give the model that was never unlearnt, and text that it knows"
            )
    if processes().is_main_process:
        settings: dict[str, Any] = {"attacks": [asdict(attack) for attack in chosen], "learning_rates": learning_rates}
        settings |= {"steps": steps, "extensions": extensions, "reference": reference}
        records.start(about | settings, {f"seed {seed}": seed for seed in seeds}, resume=True)
        (records.path / SUMMARY).unlink(missing_ok=True)  # of a command with fewer attacks, rates or steps
    processes().wait_for_everyone()
    results = {}
    for attack, grid in zip(chosen, grids, strict=True):
        curves = relearn(
            model,
            tokenizer,
            attack,
            data,
            grid,
            seeds,
            steps,
            extensions=extensions,
            records=records,
            progress=progress,
        )
        found = summarise(attack, curves, references.get(attack.target), others.get(attack.name))
        results[attack.name] = found | {"conditions": conditions[attack.name]}
    summary = {"format": FORMAT, "kind": KIND, **about, "start": start, "start_intervals": intervals}
    summary |= {"reference": references or None, "oracle": oracle and str(oracle)}
    summary |= {"seeds": list(seeds), "steps": list(steps), "attacks": results, "versions": versions()}
    if processes().is_main_process:
        records.finish(summary)
    return summary


def _before(
    model: nn.Module, tokenizer: Any, data: AttackData
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Return the losses on either side, and between which they would lie in 95 of 100 draws of documents."""
    texts = {"forget": data.forget_test, "retain": data.retain_test}
    found = {name: with_interval(TextLoss(model, tokenizer, own), model) for name, own in texts.items()}
    intervals = {name: interval for name, (_, interval) in found.items() if interval is not None}
    return {name: loss for name, (loss, _) in found.items()}, intervals


def _conditions(
    attacks: Sequence[Attack], data: AttackData, tokenizer: Any, steps: Sequence[int], seeds: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """Return what must be the same for two models to have been attacked alike, by attack; texts and tokenizer by SHA-256."""

    def digest(content: Any) -> str:
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    alike = {"steps": list(steps), "seeds": list(seeds), "tokenizer": digest(tokenizer.get_vocab())}
    return {
        attack.name: {"attack": asdict(attack), "texts": digest(data.relevant_to(attack)), **alike}
        for attack in attacks
    }


def _oracle(oracle: str | Path, conditions: Mapping[str, Mapping[str, Any]]) -> dict[str, list[float]]:
    """Return the perfect filter's loss at every step of every attack."""
    found, losses = read_summary(oracle), {}
    for name, wanted in conditions.items():
        one = found["attacks"].get(name)
        if one is None:
            raise ValueError(f"`oracle` {str(oracle)!r} lacks the attack {name!r}: attack the perfect filter alike")
        then = one.get("conditions", {})
        if odd := [key for key, value in wanted.items() if then.get(key) != value]:
            raise ValueError(
                f"`oracle` {str(oracle)!r} was attacked otherwise than is asked for now, in {', '.join(odd)} of {name!r} "
                f"({then.get(odd[0])} then, {wanted[odd[0]]} now): attack both alike"
            )
        if one["verdict"] != "diverged":  # that says nothing; where nothing came back, it holds out all the way
            losses[name] = [point["mean"] for point in one["envelope"]]
    return losses


def _references(
    reference: str | Path | float | None,
    attacked: nn.Module,
    tokenizer: Any,
    data: AttackData,
    attacks: Sequence[Attack],
    seeds: Sequence[int],
    device: str | None,
) -> dict[str, float]:
    """Return the losses of the model from which nothing was removed, as far as they are known."""
    if reference is None or isinstance(reference, int | float):
        return {} if reference is None else {"forget": float(reference)}
    model, its_tokenizer = open_plain(reference, "all", device=device)  # nothing may be missing from it
    own, other = (one.config.model_type for one in (attacked, model))  # type: ignore[union-attr]
    if own != other:
        raise ValueError(
            f"`reference` {str(reference)!r} is a {other} model and the source a {own} one: give the model that the source "
            "was made from"
        )
    if its_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"the tokenizer of `reference` {str(reference)!r} differs from that of the source, so their losses per token "
            "cannot be compared: give the model that the source was made from"
        )
    losses = {"forget": TextLoss(model, tokenizer, data.forget_test)(model)}
    if any(attack.target == "facts" for attack in attacks):
        losses["facts"] = _facts_loss(model, tokenizer, data, seeds)
    return losses


def _facts_loss(model: nn.Module, tokenizer: Any, data: AttackData, seeds: Sequence[int]) -> float:
    """Return the loss on the facts that are scored, the mean over seeds."""
    return statistics.fmean(TextLoss(model, tokenizer, data.halves(seed)[1])(model) for seed in seeds)


def _check_free(records: RunDirectory, about: dict[str, Any]) -> None:
    file = records.path / RUN
    if not os.path.lexists(file):
        return
    config = json.loads(file.read_text(encoding="utf-8"))["config"]
    before = {key: config.get(key) for key in about}
    if before != json.loads(json.dumps(about)):
        raise ValueError(f"`out` {records.path} holds other records, of {before}: name another directory for {about}")
