"""Packaged text with a forget side and a retain side: three real pairs, from entangled to disjoint, and arithmetic.

Sources and licenses: ``NOTICE.md`` beside this file.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from dataclasses import dataclass
from importlib.resources import files

from datasets import Dataset

from routed_peft.corpora.arithmetic import FACTS, arithmetic

__all__ = ["PAIRS", "SPLITS", "Pair", "load_pair", "split_of"]

SPLITS = ("train", "validation", "test")
_TEST_SHARE, _VALIDATION_SHARE = 0.04, 0.02


@dataclass(frozen=True)
class Pair:
    """Two sides by the names of their corpora, and a description, ``forget side / retain side``."""

    forget: str
    retain: str
    about: str


PAIRS: dict[str, Pair] = {
    "biology": Pair("gene_ontology", "wordnet_general", "Gene Ontology definitions / WordNet without biology"),
    "spanish": Pair("bible_es", "bible_en", "the Bible in Spanish / in English, verse by verse"),
    "entangled": Pair("wordnet_biology", "wordnet_general", "WordNet's animals, plants and body parts / the rest"),
    "arithmetic": Pair("multiplication", "addition", "products and quotients / sums and differences, made up"),
}
"""Pairs by name. ``biology`` and ``entangled`` share their retain side, and both sides the template ``term: gloss``."""


def split_of(id: str) -> str:
    """Return the split of a row, which depends on a hash of its id alone.

    About 4 % of all rows are test, 2 % validation. A verse has the same id in both languages, so the translation of a test
    verse is never in train.

    >>> split_of("Gen 1:1")
    'train'
    """
    u = _fraction(id)
    if u < _TEST_SHARE:
        return "test"
    return "validation" if u < _TEST_SHARE + _VALIDATION_SHARE else "train"


def load_pair(name: str, split: str = "train") -> Dataset:
    """Load one split of a pair: forget rows, then retain rows. Each side is shuffled, so its first n rows are a fair sample.

    Args:
        name: a key of `PAIRS`.
        split: ``"train"``, ``"validation"`` or ``"test"``.

    Returns:
        A dataset with the string columns ``text``, ``side`` (``"forget"`` or ``"retain"``) and ``id``, unique per side.

    Raises:
        ValueError: no such pair or split.

    Example:
        >>> row = load_pair("biology", "validation")[0]
        >>> row["side"], row["id"], row["text"]
        ('forget', 'GO:...', '...: ...')
    """
    if name not in PAIRS:
        raise ValueError(f"`name` must be one of {list(PAIRS)}, got {name!r}")
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {list(SPLITS)}, got {split!r}")
    pair = PAIRS[name]
    columns: dict[str, list[str]] = {"text": [], "side": [], "id": []}
    for side, corpus in (("forget", pair.forget), ("retain", pair.retain)):
        rows = sorted(
            (row for row in _read(corpus) if split_of(row["id"]) == split), key=lambda row: _fraction(row["id"])
        )
        columns["text"] += [row["text"] for row in rows]
        columns["side"] += [side] * len(rows)
        columns["id"] += [row["id"] for row in rows]
    return Dataset.from_dict(columns)


def _fraction(id: str) -> float:
    return int.from_bytes(hashlib.sha256(id.encode()).digest()[:8], "big") / 2**64


def _read(corpus: str) -> list[dict[str, str]]:
    if corpus in FACTS:
        return arithmetic(corpus)
    packed = files(__name__).joinpath(f"{corpus}.jsonl.gz").read_bytes()
    return [json.loads(line) for line in gzip.decompress(packed).splitlines()]
