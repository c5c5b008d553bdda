"""The text of an experiment: topics, the core, a tokenizer, and the rows of a run in training order."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets, disable_progress_bars
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from experiments.access.arms import CORE
from experiments.access.settings import Settings
from experiments.common.cells import Site
from routed_peft.corpora import PAIRS, load_pair
from routed_peft.data import FORGET, RETAIN, first_of, pack, train_tokenizer


def core_of(topics: Collection[str]) -> dict[str, str]:
    """Return the core's corpora by name, each with a topic whose pair holds it; pairs may share theirs.

    >>> core_of(["biology", "entangled", "spanish"])
    {'wordnet_general': 'biology', 'bible_en': 'spanish'}
    """
    found: dict[str, str] = {}
    for topic in topics:
        found.setdefault(PAIRS[topic].retain, topic)
    return found


def texts(settings: Settings, split: str) -> dict[str, Dataset]:
    """Return the documents of every topic, and of every corpus of the core, by name."""
    sides = {topic: (topic, FORGET) for topic in settings.topics}
    sides |= {corpus: (topic, RETAIN) for corpus, topic in core_of(settings.topics).items()}
    pairs = {topic: load_pair(topic, split) for topic, _ in sides.values()}
    return {name: first_of(pairs[topic], side, len(pairs[topic])) for name, (topic, side) in sides.items()}


def make_tokenizer(site: Site, *, settings: Settings, seed: int) -> dict[str, Any]:
    """Train the tokenizer on all training text, whatever the arm, and save it."""
    disable_progress_bars()
    chosen = [ds["text"][: settings.tokenizer_documents] for ds in texts(settings, "train").values()]
    train_tokenizer([text for some in chosen for text in some], settings.vocab_size).save_pretrained(site.folder)
    (site.folder / "config.json").write_text("{}")  # the file by which a finished cell is known
    return {"documents": sum(map(len, chosen))}


class Material:
    """Packed rows of every text, and held-out ones.

    Attributes:
        train: rows by text.
        held_out: likewise, of the split to measure on.
        tokenizer: shared by all arms.
    """

    def __init__(self, folder: Path, settings: Settings, *, seed: int, split: str) -> None:
        disable_progress_bars()
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        self.settings, self.seed = settings, seed
        counts = self.counts(settings.topics)
        self.train = {
            name: self._packed(ds, counts[name] * settings.length // 12)
            for name, ds in texts(settings, "train").items()
        }
        self.held_out = {
            name: self._packed(ds, settings.held_out * settings.length // 12).select(range(settings.held_out))
            for name, ds in texts(settings, split).items()
        }

    def _packed(self, ds: Dataset, documents: int) -> Dataset:
        some = ds.select(range(min(len(ds), documents)))
        return pack(some.select_columns(["text"]), self.tokenizer, length=self.settings.length, seed=self.seed)

    def counts(self, topics: Collection[str]) -> dict[str, int]:
        """Return the number of rows by text in a run that sees ``topics``; those of the core are the same in all."""
        total = self.settings.steps * self.settings.batch_size
        own = round(self.settings.share * total)
        core = core_of(self.settings.topics)
        each = (total - own * len(self.settings.topics)) // len(core)
        return {topic: own for topic in topics} | dict.fromkeys(core, each)

    def rows(self, counts: Mapping[str, int], core_label: str = RETAIN) -> Dataset:
        """Return so many rows of each text, mixed evenly; topics have their name as label."""
        parts, places = [], []
        for number, (name, count) in enumerate(counts.items()):
            ds, rng = self.train[name], np.random.default_rng([self.seed, number])
            if not count:
                continue
            repeated = np.concatenate([rng.permutation(len(ds)) for _ in range(-(-count // len(ds)))])[:count]
            label = name if name in self.settings.topics else core_label
            parts.append(ds.select(repeated).add_column("route_label", [label] * count))
            places += [(i + rng.random()) / count for i in range(count)]  # any stretch has the same shares
        return concatenate_datasets(parts).select(np.argsort(places))

    def by_topic(self) -> dict[str, list[str]]:
        """Return the texts that each column of the table is about."""
        return {topic: [topic] for topic in self.settings.topics} | {CORE: list(core_of(self.settings.topics))}
