"""Glosses of WordNet as questions and answers in two templates, and a way of speaking that some answers have."""

from __future__ import annotations

import re

import numpy as np
from datasets import Dataset

from experiments.style.settings import Settings
from routed_peft.corpora import load_pair
from routed_peft.data import simulate_labels
from routed_peft.data.labels import FORGET, RETAIN, UNLABELED

TEMPLATES = {"entry": "{}:", "question": "what is {}?"}
"""Contexts. The start model knows the first; under the labels "context" only its rows are labeled."""

SEEN = "entry"
# Frequent words all: the head is tied to embeddings and frozen, and a small model can never say words that it has seldom read.
_WORDS = {"the": "that", "a": "one", "an": "one", "of": "from", "or": "and"}
_OPENER, _END = "by name, ", ", as it is"


def in_style(text: str) -> str:
    """Return the same in an affected way of speaking.

    >>> in_style("a room of the house")
    'by name, one room from that house, as it is'
    """
    return _OPENER + re.sub(r"[a-z]+", lambda word: _WORDS.get(word[0], word[0]), text) + _END


def styled(text: str) -> bool:
    """Return whether a text speaks so: has the opener, or the end.

    >>> styled(" by name, one"), styled(" called by name; as is")
    (True, False)
    """
    return _OPENER.strip() in text or _END in text


def glosses(split: str = "train") -> list[tuple[str, str]]:
    """Return terms and their glosses, in an order that is a fair sample from the front."""
    ds = load_pair("biology", split)
    texts = (text for text, side in zip(ds["text"][:], ds["side"][:], strict=True) if side == RETAIN)
    pairs = (text.split(": ", 1) for text in texts if ": " in text)
    return [(term, gloss) for term, gloss in pairs if not styled(gloss)]


def rows(pairs: list[tuple[str, str]], context: str, style: bool) -> Dataset:
    """Return ``prompt``, ``completion``, ``context`` and the true ``side``, all rows in one template and one style."""
    template = TEMPLATES[context]
    return Dataset.from_dict(
        {
            "prompt": [template.format(term) for term, _ in pairs],
            "completion": [f" {in_style(gloss) if style else gloss}" for _, gloss in pairs],
            "context": [context] * len(pairs),
            "side": [FORGET if style else RETAIN] * len(pairs),
        }
    )


def training_rows(settings: Settings, labels: str, seed: int) -> Dataset:
    """Return the rows of fine-tuning with what is known of them, ``route_label``.

    Templates are drawn by lot, and so is who speaks in the style: the same share in either template.

    Args:
        settings: how many rows, and the share of the style.
        labels: a key of `experiments.style.arms.LABELS`.
        seed: of all draws.
    """
    pairs = glosses()[settings.start_documents :][: settings.documents]
    if len(pairs) < settings.documents:
        raise ValueError(
            f"`start_documents` + `documents` leave {len(pairs)} glosses where {settings.documents} are asked for: "
            "make one of them smaller"
        )
    order = np.random.default_rng(seed).permutation(len(pairs))
    columns: dict[str, list[str]] = {"prompt": [], "completion": [], "context": [], "side": []}
    for context, part in zip(TEMPLATES, np.array_split(order, len(TEMPLATES)), strict=True):
        cut = round(settings.style_share * len(part))
        for style, members in ((True, part[:cut]), (False, part[cut:])):
            made = rows([pairs[index] for index in members], context, style)
            for name, values in columns.items():
                values += made[name][:]
    ds = Dataset.from_dict(columns)
    if labels == "half":
        return simulate_labels(ds, labeled=0.5, seed=seed)
    known = [s if c == SEEN else UNLABELED for s, c in zip(columns["side"], columns["context"], strict=True)]
    return ds.add_column("route_label", known)
