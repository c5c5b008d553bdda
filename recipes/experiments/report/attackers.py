"""Number of forget documents that the attackers of an experiment have, counted from the packaged text."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from routed_peft.corpora import PAIRS, SPLITS, load_pair
from routed_peft.data import FORGET, RETAIN, first_of
from routed_peft.evaluation.relearning import AttackData


def attacker_documents(settings: Mapping[str, Any], experiment: Mapping[str, Any]) -> int | None:
    """Return the number of forget documents that an attacker has at most.

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
    data = AttackData.without_overlap(
        forget_train=first_of(texts, FORGET)["text"][:],
        forget_test=first_of(test, FORGET, limit)["text"][:],
        retain_test=first_of(test, RETAIN, limit)["text"][:],
    )
    return len(data.forget_train)
