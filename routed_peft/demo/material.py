"""The demo's data: tokenizer, packed rows with labels, held-out text, and the attacker's documents."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset, concatenate_datasets
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from routed_peft import presets
from routed_peft.corpora import load_pair
from routed_peft.data import (
    FORGET,
    RETAIN,
    ROUTE_LABEL,
    add_frequency_weights,
    first_of,
    pack,
    schedule,
    simulate_labels,
    token_frequency_weights,
    train_tokenizer,
)
from routed_peft.demo.settings import Arm, DemoSettings
from routed_peft.routes import BASE
from routed_peft.training import SelfLabelConfig, SelfLabeledRows

SIDES = (FORGET, RETAIN)
ERA_WEIGHT = presets.era()[FORGET].weight(BASE)


@dataclass(frozen=True)
class Material:
    """Data that all arms share."""

    tokenizer: PreTrainedTokenizerBase  # trained on the training text of both sides
    documents: Dataset  # for training, with their text and the `route_label` that they came with
    rows: Dataset  # packed, with `route_label` and `side` (the truth; of each token where rows mix sides)
    validation: dict[str, Dataset]  # side -> packed rows for the curves
    files: dict[str, str]  # input of the lm-eval tasks: `forget_file`, `retain_file`
    attacker: list[str]  # forget documents of the validation split, for relearning

    @classmethod
    def prepare(
        cls, settings: DemoSettings, folder: Path, relabel: Callable[[Dataset], Dataset] | None = None
    ) -> Material:
        """Load the pair, train the tokenizer, label, pack, and write held-out text to the new directory ``folder``.

        ``relabel`` changes the ``route_label`` of training documents, as a classifier would.
        """
        train, count = load_pair(settings.pair, "train"), settings.documents
        if count is not None:
            train = concatenate_datasets([first_of(train, side, count) for side in SIDES])
        tokenizer = train_tokenizer(train["text"][:], settings.vocab_size)
        documents = simulate_labels(
            train, labeled=settings.labeled, recall=settings.recall, precision=settings.precision, seed=settings.seed
        )
        labeled = documents if relabel is None else relabel(documents)
        by, per_token = ([ROUTE_LABEL], ["side"]) if settings.mixed_rows else (None, [])
        rows = pack(labeled, tokenizer, length=settings.length, by=by, seed=settings.seed, per_token=per_token)
        held_out = load_pair(settings.pair, "validation")
        packed = pack(held_out, tokenizer, length=settings.length, by=["side"], seed=settings.seed)
        validation = {side: first_of(packed, side, settings.validation_rows) for side in SIDES}
        attacker = first_of(held_out, FORGET, settings.relearn_documents)["text"][:]
        test = load_pair(settings.pair, "test")
        folder.mkdir(parents=True)
        files = {}
        for side in SIDES:
            file = folder / f"{side}_test.jsonl"
            _write_texts(file, first_of(test, side, settings.limit)["text"][:])
            files[f"{side}_file"] = str(file)
        _write_texts(folder / "attacker.jsonl", attacker)
        return cls(tokenizer, documents, rows, validation, files, attacker)

    def run_of(self, arm: Arm, settings: DemoSettings) -> Dataset | SelfLabeledRows:
        """Return the rows of a whole run in training order: equally many for every arm."""
        rows, count = self.rows, settings.steps * settings.batch_size
        if arm.drop is not None:
            rows = rows.select(np.flatnonzero(np.array(rows[arm.drop][:]) != FORGET))
        if arm.era:
            run = schedule(rows, count, seed=settings.seed)
            return add_frequency_weights(run, self._frequency_weights(), base_weight=ERA_WEIGHT)
        if not arm.routed:
            return schedule(rows, count, seed=settings.seed)
        if settings.frequency_weights and not settings.self_labels:
            problem = "the weights belong to rows that count as forget by then"
            raise ValueError(f"`frequency_weights` needs `self_labels`: {problem}")
        seed = settings.seed
        if not settings.self_labels:
            shares = {name: getattr(settings, name) for name in ("labeled_first", "forget_share", "first_forget_share")}
            return schedule(rows, count, seed=seed, **shares)
        weights = self._frequency_weights() if settings.frequency_weights else None
        if weights is not None:
            weights = weights + (1 - weights) * settings.base_weight
        separator = self.tokenizer.eos_token_id if settings.by_document else None
        config = SelfLabelConfig.from_settings(settings)
        return SelfLabeledRows(rows, count, config=config, seed=seed, token_weights=weights, separator=separator)

    def _frequency_weights(self) -> Tensor:
        labels, texts = self.documents["route_label"][:], self.documents["text"][:]
        # unlabeled text has forget text in it, and would make its words look common on either side
        forget, retain = (
            [text for text, label in zip(texts, labels, strict=True) if label == side] for side in (FORGET, RETAIN)
        )
        return token_frequency_weights(self.tokenizer, forget, retain_texts=retain)


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


def _write_texts(file: Path, texts: list[str]) -> None:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
