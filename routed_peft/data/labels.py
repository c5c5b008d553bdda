"""Label sources: a column, keywords, tokens, a classifier's scores, or a simulated labeler of given recall and precision."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import Pipeline

from routed_peft.data.columns import ROUTE_LABEL, ROUTE_LABELS, AnyDataset, add_column, check_strings, column_values

FORGET, RETAIN, UNLABELED = "forget", "retain", "unlabeled"

Classifier = Callable[[list[str]], Sequence[float]]


def labels_from_column(ds: AnyDataset, column: str, mapping: Mapping[Any, str]) -> AnyDataset:
    """Add or replace the column ``route_label``, by the value of a column that rows already have.

    ``mapping`` is value -> label, of ClassLabel integers by their names. ValueError if the column is missing or holds a value
    that ``mapping`` lacks (a streaming dataset: when read).

    >>> ds = Dataset.from_dict({"topic": ["virology", "law"]})
    >>> labels_from_column(ds, "topic", {"virology": "forget", "law": "retain"})["route_label"][:]
    ['forget', 'retain']
    """

    def label(values: list[Any]) -> list[str]:
        if unknown := {repr(value) for value in values if value not in mapping}:
            raise ValueError(f"the column `{column}` holds {', '.join(sorted(unknown)[:5])}, which `mapping` lacks: it "
                             f"has {list(mapping)}. Say what every value is ('unlabeled' where it is not known)")  # fmt: skip
        return [mapping[value] for value in values]

    return add_column(ds, ROUTE_LABEL, needs=[column], values=lambda batch: label(batch[column]))


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

    ``keywords`` are label -> words or phrases, and rows without a match get the label ``default``. With ``whole_words`` "tree"
    does not match "street".

    Raises:
        ValueError: if there are no keywords, an empty one, or a label that no row gets (not checked on a streaming dataset).

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

    out = add_column(ds, ROUTE_LABEL, needs=[column], values=lambda batch: label(batch[column]))
    if isinstance(out, Dataset):
        _check_occur(patterns, Counter(out[ROUTE_LABEL]), f"keyword in the column `{column}`")
    return out


def labels_from_tokens(
    ds: AnyDataset, tokens: Mapping[str, Iterable[int]], *, default: str = UNLABELED, within: str | None = None
) -> AnyDataset:
    """Add the column ``route_labels``, in place of any ``route_label``, by ids of tokens; `tokens_of_words` finds ids.

    ``tokens`` are label -> ids in ``input_ids``, and every other token gets ``default``. Where ``within`` is given, so do all
    tokens of rows with another ``route_label``. ValueError if a label of ``tokens`` never occurs, so that nothing would be
    routed; a streaming dataset is not checked.

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

    values = lambda batch: label(batch[column])
    return add_column(ds, ROUTE_LABEL, needs=[column], values=values, batch_size=batch_size)


def simulate_labels(
    ds: Dataset,
    side_column: str = "side",
    *,
    labeled: float | Mapping[str, float] = 1.0,
    recall: float = 1.0,
    precision: float = 1.0,
    seed: int = 0,
) -> Dataset:
    r"""Add the column ``route_label`` to rows of known side, as an imperfect labeler would, with exact counts.

    Of the :math:`N_s` rows of side :math:`s`, :math:`n_s = [\ell_s N_s]` are labeled at all, with brackets for rounding; the
    rest are "unlabeled". Among those labeled,

    .. math::
        TP = [\text{recall} \cdot n_\text{forget}], \qquad
        FP = [TP \cdot (1 - \text{precision}) / \text{precision}],

    :math:`TP` true forget rows and :math:`FP` retain rows carry "forget", the other labeled rows "retain".

    The seed gives each side an order of its own, and every count takes rows from the front. So rows labeled at
    ``labeled=0.1`` are among those labeled at 0.5. As ``labeled`` or ``recall`` rises or ``precision`` falls, more rows carry
    "forget", and none of the former lose it.

    Args:
        ds: with the true side of each row, ``"forget"`` or ``"retain"``, in ``side_column``.
        side_column: name of that column.
        labeled: share of rows labeled at all, for both sides or by side.
        recall: share of labeled true forget rows that carry "forget", in [0, 1].
        precision: share of the rows carrying "forget" that truly are, in (0, 1].
        seed: same seed, same labels.

    Raises:
        ValueError: if a share is out of range, a side is neither of the two, or labeled retain rows are too few for that.

    >>> ds = Dataset.from_dict({"side": ["forget"] * 10 + ["retain"] * 20})
    >>> label_statistics(simulate_labels(ds, labeled={"forget": 0.8, "retain": 1.0}, recall=0.5, precision=0.8))
    {'forget': {'forget': 4, 'retain': 4, 'unlabeled': 2}, 'retain': {'forget': 1, 'retain': 19}}
    """
    shares = dict(labeled) if isinstance(labeled, Mapping) else {FORGET: labeled, RETAIN: labeled}
    if set(shares) != {FORGET, RETAIN}:
        raise ValueError(f"`labeled` is one share, or one each for 'forget' and 'retain', got {labeled}")
    given = {"recall": recall, "precision": precision} | {f"labeled[{side}]": v for side, v in shares.items()}
    for name, value in given.items():
        if not 0 <= value <= 1:
            raise ValueError(f"`{name}` is a share between 0 and 1, got {value}")
    if precision == 0:
        raise ValueError("`precision` must be above 0: at 0 the number of wrong rows is undefined")

    pools = {side: order[: round(shares[side] * len(order))] for side, order in _orders(ds, side_column, seed).items()}
    hits = round(recall * len(pools[FORGET]))
    wrong = round(hits * (1 - precision) / precision)
    if wrong > len(pools[RETAIN]):
        raise ValueError(f"`precision={precision}` beside {hits} forget rows found calls for {wrong} retain rows "
                         f"carrying 'forget', but only {len(pools[RETAIN])} retain rows are labeled")  # fmt: skip
    labels = np.full(len(ds), UNLABELED, dtype=object)
    for side, found in ((FORGET, hits), (RETAIN, wrong)):
        labels[pools[side]] = RETAIN
        labels[pools[side][:found]] = FORGET
    return ds.remove_columns([ROUTE_LABEL] * (ROUTE_LABEL in ds.column_names)).add_column(ROUTE_LABEL, labels.tolist())


def label_statistics(ds: Dataset, side_column: str = "side") -> dict[str, dict[str, int]]:
    """Count rows by true side and label.

    >>> label_statistics(Dataset.from_dict({"side": ["forget", "forget"], "route_label": ["forget", "unlabeled"]}))
    {'forget': {'forget': 1, 'unlabeled': 1}}
    """
    counts = Counter(zip(column_values(ds, side_column), column_values(ds, ROUTE_LABEL), strict=True))
    table: dict[str, dict[str, int]] = {}
    for (side, label), count in sorted(counts.items()):
        table.setdefault(side, {})[label] = count
    return table


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


def _orders(ds: Dataset, side_column: str, seed: int) -> dict[str, np.ndarray]:
    sides = np.array(column_values(ds, side_column), dtype=object)
    if other := {side for side in set(sides) if side not in (FORGET, RETAIN)}:
        raise ValueError(f"the column `{side_column}` holds 'forget' and 'retain', got {sorted(map(str, other))} as "
                         "well")  # fmt: skip
    return {
        side: np.random.default_rng([seed, i]).permutation(np.flatnonzero(sides == side))
        for i, side in enumerate((FORGET, RETAIN))
    }
