"""Attacks on a path or Hub id, with records to continue from and to read."""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from routed_peft.evaluation.measures.robustness import TOLERANCE
from routed_peft.evaluation.measures.statistics import with_interval
from routed_peft.evaluation.relearning.attacks import Attack
from routed_peft.evaluation.relearning.curves import check_settings
from routed_peft.evaluation.relearning.data import AttackData
from routed_peft.evaluation.relearning.summary import FORMAT, KIND, read_summary, summarize
from routed_peft.evaluation.relearning.sweep import STEPS, RelearnOptions, check_texts, relearn
from routed_peft.evaluation.source import Regions, open_plain, open_source, own_regions, processes
from routed_peft.evaluation.text_loss import TextLoss
from routed_peft.files import read_json
from routed_peft.runs.provenance import versions
from routed_peft.runs.records import RUN, SUMMARY, RunDirectory


@dataclass(frozen=True)
class SourceOptions:
    """Further settings of `relearn_source`.

    Attributes:
        extensions: see `RelearnOptions`.
        regions: regions of a run to keep and merge; by default none, but all for an arm trained without routing
            (`own_regions`).
        reference: the model from which nothing was removed, or its loss on ``forget_test`` in nats per token.
        oracle: directory with the same attacks on the perfect filter, for the normalized area under the curves.
        revision: branch, tag or commit of a Hub id.
        regions_repo: directory or Hub id of regions that are not stored with the run; by default the one that it names.
        device: of the attack; a GPU by default, if there is one.
        progress: show a bar for every attack.
        trust_remote_code: run the code that models bring along.
    """

    extensions: int = 2
    regions: Regions | None = None
    reference: str | Path | float | None = None
    oracle: str | Path | None = None
    revision: str | None = None
    regions_repo: str | None = None
    device: str | None = None
    progress: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.reference, int | float) and not 0 < self.reference < math.inf:
            raise ValueError(f"`reference` is a loss in nats per token, above 0, got {self.reference}")
        if self.oracle is not None and self.reference is None:
            needed = "the area lies between the perfect filter and the reference; give both"
            raise ValueError(f"`oracle` needs a `reference`: {needed}")


def relearn_source(
    src: str | Path,
    data: AttackData,
    *,
    out: str | Path,
    attacks: Sequence[Attack | str] = ("forget",),
    learning_rates: Sequence[float] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    steps: Sequence[int] = STEPS,
    options: SourceOptions | None = None,
) -> dict[str, Any]:
    """Attack a run, an export or any other checkpoint, and write ``run.json``, ``metrics.jsonl`` and ``summary.json`` to
    ``out``.

    Curves there of the same weights, data and settings are not run again, so that a killed command can be repeated, and
    attacks, rates and seeds added to a finished one.

    Args:
        src: directory or Hub id of a run, or of a plain checkpoint.
        out: directory without attacks on another source.
        learning_rates: of full and LoRA fine-tuning; these, ``seeds`` and ``steps`` are as for `relearn`.

    Returns:
        The content of ``summary.json``: ``attacks``, by name, from `summarize`; ``start``, the losses before, and
        ``start_intervals``, their 95 % confidence intervals over documents; the source, and versions of libraries.

    Raises:
        ValueError: where the source is no causal language model, tokenizers differ, the reference does not know the forget
            side better than the source (nothing to recover), ``out`` holds attacks on something else, or ``oracle`` lacks
            an attack or differs in settings; and as `relearn` does.
    """
    options, chosen = options or SourceOptions(), _parse_attacks(attacks)
    grids = {attack.name: learning_rates if attack.method in ("full", "lora") else None for attack in chosen}
    for attack in chosen:  # all of them before the first is run
        rates = attack.learning_rates if grids[attack.name] is None else tuple(grids[attack.name] or ())
        check_settings(attack, data, rates=rates, seeds=seeds, steps=steps)
    records = RunDirectory(out)
    regions = own_regions(open_source(src, options.revision)) if options.regions is None else options.regions
    about: dict[str, Any] = {"source": str(src), "revision": options.revision, "regions": regions}
    _check_free(records, about)
    how: dict[str, Any] = {"device": options.device, "trust_remote_code": options.trust_remote_code}
    model, tokenizer = open_plain(src, regions, revision=options.revision, regions_repo=options.regions_repo, **how)
    for attack in chosen:
        check_texts(model, tokenizer, data=data, attack=attack)
    conditions = _conditions(chosen, data, tokenizer=tokenizer, steps=steps, seeds=seeds)
    oracle_losses = {} if options.oracle is None else _oracle_losses(options.oracle, conditions)
    start, intervals = _start_losses(model, tokenizer, data)
    references = _reference_losses(options, model, tokenizer=tokenizer, data=data, attacks=chosen, seeds=seeds)
    facts = {"facts": _facts_loss(model, tokenizer, data=data, seeds=seeds)} if "facts" in references else {}
    for target, loss in references.items():
        if loss > (known := (start | facts)[target]) - TOLERANCE:
            got = f"the reference's {target} loss, {loss:.3f}, is not {TOLERANCE} nats below that of {str(src)!r}, {known:.3f}"
            remedy = "Give the model from before unlearning, and text that it knows"
            raise ValueError(f"there is nothing to recover: {got}. {remedy}")
    if processes().is_main_process:
        settings: dict[str, Any] = {"attacks": [asdict(attack) for attack in chosen], "learning_rates": learning_rates}
        settings |= {"steps": steps, "extensions": options.extensions, "reference": options.reference}
        records.start(about | settings, {f"seed {seed}": seed for seed in seeds}, resume=True)
        (records.path / SUMMARY).unlink(missing_ok=True)  # of a command with fewer attacks, rates or steps
    processes().wait_for_everyone()
    sweep = RelearnOptions(extensions=options.extensions, records=records, progress=options.progress)
    results = {}
    for attack in chosen:
        grid: dict[str, Any] = {"learning_rates": grids[attack.name], "seeds": seeds, "steps": steps}
        curves = relearn(model, tokenizer, attack=attack, data=data, **grid, options=sweep)
        reference, oracle = references.get(attack.target), oracle_losses.get(attack.name)
        found = summarize(attack, curves, reference=reference, oracle=oracle)
        results[attack.name] = found | {"conditions": conditions[attack.name]}
    summary = {"format": FORMAT, "kind": KIND, **about, "start": start, "start_intervals": intervals}
    summary |= {"reference": references or None, "oracle": options.oracle and str(options.oracle)}
    summary |= {"seeds": list(seeds), "steps": list(steps), "attacks": results, "versions": versions()}
    if processes().is_main_process:
        records.finish(summary)
    return summary


def _parse_attacks(attacks: Sequence[Attack | str]) -> list[Attack]:
    chosen = [Attack.parse(attack) if isinstance(attack, str) else attack for attack in attacks]
    if not chosen or len({attack.name for attack in chosen}) < len(chosen):
        raise ValueError(f"`attacks` must be different and at least one, got {[attack.name for attack in chosen]}")
    return chosen


def _start_losses(
    model: nn.Module, tokenizer: Any, data: AttackData
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Return the losses on either side, and their 95 % confidence intervals over documents."""
    texts = {"forget": data.forget_test, "retain": data.retain_test}
    found = {name: with_interval(TextLoss(model, tokenizer, own), model) for name, own in texts.items()}
    intervals = {name: interval for name, (_, interval) in found.items() if interval is not None}
    return {name: loss for name, (loss, _) in found.items()}, intervals


def _conditions(
    attacks: Sequence[Attack], data: AttackData, *, tokenizer: Any, steps: Sequence[int], seeds: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """Return the settings in which two attacks must agree to be compared, by attack; texts and tokenizer by SHA-256."""

    digest = lambda content: hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    alike = {"steps": list(steps), "seeds": list(seeds), "tokenizer": digest(tokenizer.get_vocab())}
    return {one.name: {"attack": asdict(one), "texts": digest(data.relevant_to(one)), **alike} for one in attacks}


def _oracle_losses(oracle: str | Path, conditions: Mapping[str, Mapping[str, Any]]) -> dict[str, list[float]]:
    """Return the perfect filter's losses at every step, by attack."""
    found, losses = read_summary(oracle), {}
    for name, wanted in conditions.items():
        one = found["attacks"].get(name)
        if one is None:
            raise ValueError(f"`oracle` {str(oracle)!r} lacks the attack {name!r}: attack the perfect filter alike")
        then = one.get("conditions", {})
        if odd := [key for key, value in wanted.items() if then.get(key) != value]:
            raise ValueError(f"`oracle` {str(oracle)!r} was attacked with other settings, in {', '.join(odd)} of "
                             f"{name!r} ({then.get(odd[0])} then, {wanted[odd[0]]} now): attack both alike")  # fmt: skip
        if one["verdict"] != "diverged":  # a diverged attack says nothing; one that recovers nothing counts
            losses[name] = [point["mean"] for point in one["envelope"]]
    return losses


def _reference_losses(
    options: SourceOptions,
    attacked: nn.Module,
    *,
    tokenizer: Any,
    data: AttackData,
    attacks: Sequence[Attack],
    seeds: Sequence[int],
) -> dict[str, float]:
    """Return the losses of the model from which nothing was removed, by target, as far as they are known."""
    reference = options.reference
    if reference is None or isinstance(reference, int | float):
        return {} if reference is None else {"forget": float(reference)}
    how: dict[str, Any] = {"device": options.device, "trust_remote_code": options.trust_remote_code}
    model, its_tokenizer = open_plain(reference, "all", **how)  # with all of its regions
    own, other = (one.config.model_type for one in (attacked, model))  # type: ignore[union-attr]
    given = f"`reference` {str(reference)!r}"
    remedy = "give the model from which the source was made"
    if own != other:
        raise ValueError(f"{given} is a {other} model and the source a {own} one: {remedy}")
    if its_tokenizer.get_vocab() != tokenizer.get_vocab():
        differs = f"the tokenizer of {given} differs from that of the source"
        raise ValueError(f"{differs}, so their losses per token cannot be compared: {remedy}")
    losses = {"forget": TextLoss(model, tokenizer, data.forget_test)(model)}
    if any(attack.target == "facts" for attack in attacks):
        losses["facts"] = _facts_loss(model, tokenizer, data=data, seeds=seeds)
    return losses


def _facts_loss(model: nn.Module, tokenizer: Any, *, data: AttackData, seeds: Sequence[int]) -> float:
    """Return the loss on the scored facts, the mean over seeds."""
    return statistics.fmean(TextLoss(model, tokenizer, data.halves(seed)[1])(model) for seed in seeds)


def _check_free(records: RunDirectory, about: dict[str, Any]) -> None:
    config = read_json(records.path / RUN)["config"] if os.path.lexists(records.path / RUN) else about
    before = {key: config.get(key) for key in about}
    if before not in (about, json.loads(json.dumps(about))):
        raise ValueError(f"`out` {records.path} holds other records, of {before}: name another directory for {about}")
