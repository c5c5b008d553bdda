"""Label sources: a column, keywords, tokens, or a classifier's scores."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import Pipeline

from routed_peft.data.columns import ROUTE_LABEL, ROUTE_LABELS, AnyDataset, add_column, check_strings

FORGET, RETAIN, UNLABELED = "forget", "retain", "unlabeled"

Classifier = Callable[[list[str]], Sequence[float]]


def labels_from_column(ds: AnyDataset, column: str, mapping: Mapping[Any, str]) -> AnyDataset:
    """Add or replace the column ``route_label``, by the value of a column that rows already have.

    Args:
        ds: map-style or streaming.
        column: its name; ClassLabel integers count by their names.
        mapping: value -> label.

    Raises:
        ValueError: if the column is missing or holds a value that ``mapping`` lacks (a streaming dataset: when read).

    >>> ds = Dataset.from_dict({"topic": ["virology", "law"]})
    >>> labels_from_column(ds, "topic", {"virology": "forget", "law": "retain"})["route_label"][:]
    ['forget', 'retain']
    """

    def label(values: list[Any]) -> list[str]:
        if unknown := {repr(value) for value in values if value not in mapping}:
            raise ValueError(f"the column `{column}` holds {', '.join(sorted(unknown)[:5])}, which `mapping` lacks: it "
                             f"has {list(mapping)}. Say what every value is ('unlabeled' where it is not known)")  # fmt: skip
        return [mapping[value] for value in values]

    return _add_labels(ds, column, label=label)


def labels_from_keywords(
    ds: AnyDataset,
    keywords: Mapping[str, Iterable[str]],
    *,
    default: str,
    column: str = "text",
    whole_words: bool = True,
    case_sensitive: bool = False,
) -> AnyDataset:
    """Add or replace the column ``route_label``, by words in the text: of ``keywords`` the first label with a match.

    Args:
        ds: map-style or streaming.
        keywords: label -> words or phrases.
        default: label of rows without a match.
        column: name of the text's column.
        whole_words: match whole words, so that "tree" does not match "street".
        case_sensitive: match case, so that "tree" does not match "Tree".

    Raises:
        ValueError: if there are no keywords, an empty one, or a label of ``keywords`` that no row gets; a streaming
            dataset is not checked for the latter.

    >>> ds = Dataset.from_dict({"text": ["Trees grow.", "A street.", "The forest!"]})
    >>> labels_from_keywords(ds, {"forget": ["tree", "trees", "forest"]}, default="retain")["route_label"][:]
    ['forget', 'retain', 'forget']
    """
    patterns = {}
    for name, words in keywords.items():
        words = [words] if isinstance(words, str) else list(words)
        if not words or not all(word.strip() for word in words):
            raise ValueError(f"`keywords` needs at least one word for {name!r} and no empty ones, got {words}")
        pattern = "|".join(map(re.escape, words))
        pattern = rf"(?<!\w)(?:{pattern})(?!\w)" if whole_words else pattern
        patterns[name] = re.compile(pattern, 0 if case_sensitive else re.IGNORECASE)
    if not patterns:
        raise ValueError("`keywords` is empty: give at least one label with its words")

    def label(texts: list[str]) -> list[str]:
        check_strings(texts, f"values of the column `{column}`")
        return [next((name for name, pattern in patterns.items() if pattern.search(t)), default) for t in texts]

    out = _add_labels(ds, column, label=label)
    if isinstance(out, Dataset):
        _check_occur(patterns, Counter(out[ROUTE_LABEL]), f"keyword in the column `{column}`")
    return out


def labels_from_tokens(
    ds: AnyDataset, tokens: Mapping[str, Iterable[int]], *, default: str = UNLABELED, within: str | None = None
) -> AnyDataset:
    """Add the column ``route_labels``, in place of any ``route_label``, by ids of tokens; `tokens_of_words` finds ids.

    Args:
        ds: with ``input_ids``.
        tokens: label -> token ids.
        default: the label of every other token.
        within: label only tokens of rows with this ``route_label``; None for all rows.

    Raises:
        ValueError: if a label of ``tokens`` never occurs, so that nothing would be routed; a streaming dataset is not
            checked.

    >>> ds = Dataset.from_dict({"input_ids": [[5, 6, 5], [7, 7]]})
    >>> labels_from_tokens(ds, {"forget": [6]}, default="retain")["route_labels"][0]
    ['retain', 'forget', 'retain']
    """
    table = {int(token): label for label, ids in reversed(list(tokens.items())) for token in ids}

    def label(batch: Mapping[str, list[Any]]) -> list[list[str]]:
        chosen = [True] * len(batch["input_ids"]) if within is None else [x == within for x in batch[ROUTE_LABEL]]
        return [
            [table.get(int(token), default) if here else default for token in ids]
            for ids, here in zip(batch["input_ids"], chosen, strict=True)
        ]

    needs = ["input_ids"] if within is None else ["input_ids", ROUTE_LABEL]
    out = add_column(ds, ROUTE_LABELS, needs=needs, values=label)
    out = out.remove_columns(ROUTE_LABEL) if ROUTE_LABEL in (out.column_names or []) else out
    if isinstance(out, Dataset):
        _check_occur(tokens, Counter(label for row in out[ROUTE_LABELS] for label in row), "token id in `input_ids`")
    return out


def labels_from_classifier(
    ds: AnyDataset,
    classifier: Classifier | Pipeline,
    *,
    forget_above: float,
    retain_below: float,
    column: str = "text",
    positive: str | None = None,
    batch_size: int = 64,
) -> AnyDataset:
    """Add or replace the column ``route_label``, by a score: high "forget", low "retain", in between "unlabeled".

    Args:
        ds: map-style or streaming.
        classifier: any function from texts to scores in [0, 1], or a ``transformers`` text-classification pipeline.
        forget_above: a higher score means "forget".
        retain_below: a lower score means "retain".
        column: name of the text's column.
        positive: of a pipeline, the class whose probability is the score.
        batch_size: texts per call.

    Raises:
        ValueError: if the thresholds are not ``0 <= retain_below <= forget_above <= 1``, or the scores are too few, too
            many, NaN or outside [0, 1] (logits, say); if a pipeline comes without ``positive``, or knows no such class.

    >>> ds = Dataset.from_dict({"text": ["virus", "vir", "law"]})
    >>> score = lambda texts: [t.count("i") / 2 + t.count("u") / 2 for t in texts]
    >>> labels_from_classifier(ds, score, forget_above=0.9, retain_below=0.1)["route_label"][:]
    ['forget', 'unlabeled', 'retain']
    """
    if not 0 <= retain_below <= forget_above <= 1:
        raise ValueError("the thresholds must be 0 <= `retain_below` <= `forget_above` <= 1, got "
                         f"`retain_below={retain_below}` and `forget_above={forget_above}`")  # fmt: skip
    score = _pipeline_scores(classifier, positive) if isinstance(classifier, Pipeline) else classifier

    def label(texts: list[str]) -> list[str]:
        scores = np.asarray(score(texts), dtype=float)
        if scores.shape != (len(texts),):
            raise ValueError(f"`classifier` must give one score per text: got shape {scores.shape} for {len(texts)} "
                             "texts")  # fmt: skip
        if not ((scores >= 0) & (scores <= 1)).all():
            bad = scores[~((scores >= 0) & (scores <= 1))][0]
            raise ValueError(f"`classifier` must give scores in [0, 1], got {bad}: apply a sigmoid to logits, and "
                             "remove NaNs")  # fmt: skip
        return np.select([scores > forget_above, scores < retain_below], [FORGET, RETAIN], UNLABELED).tolist()

    return _add_labels(ds, column, label=label, batch_size=batch_size)


def _add_labels(
    ds: AnyDataset, column: str, *, label: Callable[[list[Any]], list[str]], batch_size: int = 1000
) -> AnyDataset:
    return add_column(ds, ROUTE_LABEL, needs=[column], values=lambda batch: label(batch[column]), batch_size=batch_size)


def _check_occur(labels: Iterable[str], counts: Mapping[str, int], what: str) -> None:
    if never := [label for label in labels if not counts.get(label)]:
        raise ValueError(f"no {what} gives the labels {never}: nothing would be routed for them. Check the spelling, "
                         "and that leading spaces and capitals match the tokens")  # fmt: skip


def _pipeline_scores(pipeline: Pipeline, positive: str | None) -> Classifier:
    known = list((pipeline.model.config.id2label or {}).values())
    if positive not in known:
        raise ValueError(f"`positive` must name the class that means forget, one of {known}, got {positive!r}")

    def score(texts: list[str]) -> list[float]:
        results = pipeline(texts, top_k=None, truncation=True)
        return [next(item["score"] for item in result if item["label"] == positive) for result in results]

    return score
