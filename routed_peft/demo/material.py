"""The demo's data: tokenizer, packed rows with labels, held-out text, and the attacker's documents."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from routed_peft.corpora import load_pair
from routed_peft.data import FORGET, RETAIN, first_of, pack, schedule, simulate_labels, train_tokenizer
from routed_peft.demo.settings import Arm, DemoSettings
from routed_peft.training import SelfLabelConfig, SelfLabeledRows

SIDES = (FORGET, RETAIN)
MakeRows = Callable[[Dataset, PreTrainedTokenizerBase, Any], tuple[Dataset, Dataset]]
"""Training documents, tokenizer and settings -> the documents with labels, and rows of them."""


@dataclass(frozen=True)
class Material:
    """Data that all arms share."""

    tokenizer: PreTrainedTokenizerBase  # trained on the training text of both sides
    documents: Dataset  # for training, with their text and the `route_label` that they came with
    rows: Dataset  # packed, with `route_label` and `side` (the truth)
    validation: dict[str, Dataset]  # side -> packed rows for the curves
    files: dict[str, str]  # input of the lm-eval tasks: `forget_file`, `retain_file`
    attacker: list[str]  # forget documents of the validation split, for relearning

    @classmethod
    def prepare(cls, settings: DemoSettings, folder: Path, make_rows: MakeRows | None = None) -> Material:
        """Load the pair, train the tokenizer, label, pack, and write held-out text to the new directory ``folder``.

        ``make_rows`` is called in place of `labeled_rows`.
        """
        train, count = load_pair(settings.pair, "train"), settings.documents
        if count is not None:
            train = concatenate_datasets([first_of(train, side, count) for side in SIDES])
        tokenizer = train_tokenizer(train["text"][:], settings.vocab_size)
        documents, rows = (make_rows or labeled_rows)(train, tokenizer, settings)
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
        if arm.routed:
            return SelfLabeledRows(rows, count, config=SelfLabelConfig.from_settings(settings), seed=settings.seed)
        if arm.drop is not None:
            rows = rows.select(np.flatnonzero(np.array(rows[arm.drop][:]) != FORGET))
        return schedule(rows, count, seed=settings.seed)


def labeled_rows(train: Dataset, tokenizer: PreTrainedTokenizerBase, settings: DemoSettings) -> tuple[Dataset, Dataset]:
    """Return documents of which a share is labeled, and rows packed from them."""
    documents = simulate_labels(train, labeled=settings.labeled, seed=settings.seed)
    return documents, pack(documents, tokenizer, length=settings.length, seed=settings.seed)


def tokens_by_side(run: Dataset | SelfLabeledRows, length: int) -> dict[str, int]:
    """Count the tokens of a run, in rows of ``length`` tokens, by their true side."""
    sides = list(run.in_order("side") if isinstance(run, SelfLabeledRows) else run["side"][:])
    return {side: sides.count(side) * length for side in SIDES}


def _write_texts(file: Path, texts: list[str]) -> None:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
