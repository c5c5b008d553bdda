"""How many forget documents the attackers of an experiment have, counted from the packaged text."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from datasets import Dataset

from routed_peft.corpora import PAIRS, SPLITS, load_pair
from routed_peft.data import FORGET, RETAIN
from routed_peft.evaluation.relearning import AttackData


def attacker_documents(settings: Mapping[str, Any], experiment: Mapping[str, Any]) -> int | None:
    """Return how many forget documents an attacker has who gets all that an experiment leaves them.

    These are the documents of the split that attackers train on, less those that are scored.

    Args:
        settings: of the experiment; its ``pair`` and ``limit``.
        experiment: what was compared; its ``attack_split``.

    Returns:
        The number; None where the text is not packaged, or summaries do not say which it was.
    """
    pair, split = settings.get("pair"), experiment.get("attack_split", "validation")
    if pair not in PAIRS or split not in SPLITS or "limit" not in settings:
        return None
    return _count(pair, split, settings["limit"])


@lru_cache
def _count(pair: str, split: str, limit: int | None) -> int:
    texts, test = load_pair(pair, split), load_pair(pair, "test")
    data = AttackData.apart(
        forget_train=_side(texts, FORGET),
        forget_test=_side(test, FORGET)[:limit],
        retain_test=_side(test, RETAIN)[:limit],
    )
    return len(data.forget_train)


def _side(texts: Dataset, side: str) -> list[str]:
    return [text for text, own in zip(texts["text"][:], texts["side"][:], strict=True) if own == side]
