"""Rows of a cell: labels that may be wrong or relabeled, rows that mix sides, and weights of tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from experiments.removal.settings import MethodArm, Settings
from routed_peft import presets
from routed_peft.data import (
    FORGET,
    ROUTE_LABEL,
    add_frequency_weights,
    pack,
    schedule,
    simulate_labels,
    token_frequency_weights,
)
from routed_peft.demo.material import SIDES, Material
from routed_peft.routes import BASE
from routed_peft.training import SelfLabelConfig, SelfLabeledRows

ERA_WEIGHT = presets.era()[FORGET].weight(BASE)


def make_rows(
    train: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    *,
    relabel: Callable[[Dataset], Dataset] | None = None,
) -> tuple[Dataset, Dataset]:
    """Return documents with the labels that they came with, and rows of them, with `side` of each token where they mix sides.

    ``relabel`` changes the labels first, as a classifier would.
    """
    documents = simulate_labels(
        train, labeled=settings.labeled, recall=settings.recall, precision=settings.precision, seed=settings.seed
    )
    labeled = documents if relabel is None else relabel(documents)
    by, per_token = ([ROUTE_LABEL], ["side"]) if settings.mixed_rows else (None, [])
    rows = pack(labeled, tokenizer, length=settings.length, by=by, seed=settings.seed, per_token=per_token)
    return documents, rows


def run_of(material: Material, arm: MethodArm, settings: Settings) -> Dataset | SelfLabeledRows:
    """Return the rows of a whole run in training order: equally many for every arm."""
    if not arm.routed:
        return material.run_of(arm, settings)
    rows, count, seed = material.rows, settings.steps * settings.batch_size, settings.seed
    if arm.era:
        run = schedule(rows, count, seed=seed)
        return add_frequency_weights(run, frequency_weights(material), base_weight=ERA_WEIGHT)
    if settings.frequency_weights and not settings.self_labels:
        problem = "the weights belong to rows that count as forget by then"
        raise ValueError(f"`frequency_weights` needs `self_labels`: {problem}")
    if not settings.self_labels:
        shares = {name: getattr(settings, name) for name in ("labeled_first", "forget_share", "first_forget_share")}
        return schedule(rows, count, seed=seed, **shares)
    weights = frequency_weights(material) if settings.frequency_weights else None
    if weights is not None:
        weights = weights + (1 - weights) * settings.base_weight
    separator = material.tokenizer.eos_token_id if settings.by_document else None
    config = SelfLabelConfig.from_settings(settings)
    return SelfLabeledRows(rows, count, config=config, seed=seed, token_weights=weights, separator=separator)


def frequency_weights(material: Material) -> Tensor:
    """Return how much each token teaches the base: as far as it is as common in retain text as in forget text."""
    labels, texts = material.documents["route_label"][:], material.documents["text"][:]
    # unlabeled text has forget text in it, and would make its words look common on either side
    forget, retain = ([text for text, label in zip(texts, labels, strict=True) if label == side] for side in SIDES)
    return token_frequency_weights(material.tokenizer, forget, retain_texts=retain)


def share_of(side: str | list[str], name: str) -> float:
    """Return the share of a row's tokens that are of the side ``name``.

    >>> share_of("forget", "forget"), share_of(["forget", "retain"], "forget")
    (1.0, 0.5)
    """
    return float(side == name) if isinstance(side, str) else side.count(name) / len(side)


def tokens_by_side(run: Dataset | SelfLabeledRows, length: int, label: str | None = None) -> dict[str, int]:
    """Count the tokens of a run by true side: of all rows, of ``length`` tokens each, or of those that came with a label."""
    sides, labels = (
        run.in_order(column) if isinstance(run, SelfLabeledRows) else run[column][:] for column in ("side", ROUTE_LABEL)
    )
    counts: Counter[str] = Counter()
    for side, own in zip(sides, labels, strict=True):
        if label in (None, own):
            counts.update({name: share_of(side, name) for name in SIDES})
    return {side: round(counts[side] * length) for side in SIDES}
