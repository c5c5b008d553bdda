"""The demo's data: tokenizer, packed rows with labels, held-out text, and the attacker's documents."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from routed_peft.corpora import load_pair
from routed_peft.data import FORGET, RETAIN, pack, schedule, simulate_labels, train_tokenizer
from routed_peft.demo.settings import Arm, DemoSettings

SIDES = (FORGET, RETAIN)


@dataclass(frozen=True)
class Material:
    """What all arms share.

    Attributes:
        tokenizer: trained on the training text of both sides.
        rows: packed training rows, with ``side`` (the truth) and ``route_label`` (what is known of it).
        validation: side -> packed rows for the curves.
        files: what the lm-eval tasks read: ``forget_file``, ``retain_file``.
        attacker: forget documents of the validation split, for relearning.
    """

    tokenizer: PreTrainedTokenizerBase
    rows: Dataset
    validation: dict[str, Dataset]
    files: dict[str, str]
    attacker: list[str]

    @classmethod
    def prepare(cls, settings: DemoSettings, folder: Path) -> Material:
        """Load the pair, train the tokenizer, label, pack, and write held-out text to ``folder``."""
        train = _per_side(load_pair(settings.pair, "train"), settings.documents)
        tokenizer = train_tokenizer(train["text"][:], settings.vocab_size)
        labeled = simulate_labels(train, labeled=settings.labeled, seed=settings.seed)
        rows = pack(labeled, tokenizer, settings.length, seed=settings.seed)
        held_out = load_pair(settings.pair, "validation")
        packed = pack(held_out, tokenizer, settings.length, by=["side"], seed=settings.seed)
        validation = {side: _first(packed, side, settings.validation_rows) for side in SIDES}
        attacker = _first(held_out, FORGET, settings.relearn_documents)["text"][:]
        test = load_pair(settings.pair, "test")
        folder.mkdir(parents=True)
        files = {}
        for side in SIDES:
            file = folder / f"{side}_test.jsonl"
            _write_texts(file, _first(test, side, settings.limit)["text"][:])
            files[f"{side}_file"] = str(file)
        _write_texts(folder / "attacker.jsonl", attacker)
        return cls(tokenizer, rows, validation, files, attacker)

    def run_of(self, arm: Arm, settings: DemoSettings) -> Dataset:
        """Return the rows of a whole run in training order: equally many for every arm."""
        rows = self.rows
        if arm.drop is not None:
            rows = rows.select(np.flatnonzero(np.array(rows[arm.drop][:]) != FORGET))
        shares: dict[str, Any] = (
            {"labeled_first": settings.labeled_first, "forget_share": settings.forget_share} if arm.routed else {}
        )
        return schedule(rows, settings.steps * settings.batch_size, seed=settings.seed, **shares)


def tokens_by_side(run: Dataset, length: int) -> dict[str, int]:
    """Count the tokens of a run by true side."""
    counts = Counter(run["side"][:])
    return {side: counts[side] * length for side in SIDES}


def _first(ds: Dataset, side: str, count: int) -> Dataset:
    return ds.select(np.flatnonzero(np.array(ds["side"][:]) == side)[:count])


def _per_side(ds: Dataset, count: int | None) -> Dataset:
    return ds if count is None else concatenate_datasets([_first(ds, side, count) for side in SIDES])


def _write_texts(file: Path, texts: list[str]) -> None:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
