"""Documents of recipes, from built-in text or your own files, with their labels and true sides."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.utils import logging

from routed_peft.corpora import load_pair
from routed_peft.data.columns import ROUTE_LABEL, column_values
from routed_peft.data.label_noise import simulate_labels
from routed_peft.data.labels import FORGET, RETAIN, labels_from_column, labels_from_keywords
from routed_peft.data.loading import load_texts, load_training_file
from routed_peft.data.packing import pack, tokenize
from routed_peft.deprecation import formerly_positional

logger = logging.get_logger(__name__)

SIDE = "side"
"""Column of the true side of a document, "forget" or "retain"."""


@dataclass
class DocumentArguments:
    """Settings of documents and their labels; recipes inherit them, and every field is a flag."""

    pair: str = field(default="biology", metadata={"help": "Built-in text: biology, spanish, entangled or arithmetic."})
    train_file: str | None = field(
        default=None,
        metadata={"help": "JSONL, Parquet or Hub dataset instead of `pair`, with text, and route_label or side."},
    )
    eval_files: list[str] = field(default_factory=list, metadata={"help": "name=FILE for each side, with text."})
    eval_documents: int | None = field(
        default=None, metadata={"help": "Maximum number of held-out documents per side."}
    )
    length: int = field(default=128, metadata={"help": "Tokens per row."})
    labeled: float = field(
        default=1.0,
        metadata={
            "help": "Share of documents that carry a label, where labels are simulated from `side`; labels you provide "
            "(`route_label`, `label_keywords`) are never changed."
        },
    )
    labeled_forget: float | None = field(default=None, metadata={"help": "`labeled` for the forget side alone."})
    labeled_retain: float | None = field(default=None, metadata={"help": "`labeled` for the retain side alone."})
    recall: float = field(default=1.0, metadata={"help": "Share of labeled forget documents labeled forget."})
    precision: float = field(default=1.0, metadata={"help": "Share of documents labeled forget that truly are."})
    label_seed: int = field(
        default=0, metadata={"help": "Seed of the choice of documents without a label, or with a wrong one."}
    )
    label_keywords: list[str] = field(
        default_factory=list, metadata={"help": "Label documents with one of these words forget, all others retain."}
    )


def labeled_documents(args: DocumentArguments) -> Dataset:
    """Return documents with their label (``route_label``) and, where it is known, their true ``side``.

    Labels come from ``label_keywords``, else from the column ``route_label``, else they are simulated from the column
    ``side`` with the shares, recall and precision of ``args``. Labels of the first two sources are never changed.

    Raises:
        ValueError: where documents have neither column and there are no keywords.

    >>> ds = labeled_documents(DocumentArguments(pair="spanish", labeled=0.5))
    >>> sorted(set(ds["route_label"])), sorted(set(ds["side"]))
    (['forget', 'retain', 'unlabeled'], ['forget', 'retain'])
    """
    ds: Any = load_training_file(args.train_file, columns=["text"]) if args.train_file else load_pair(args.pair)
    for name in (ROUTE_LABEL, SIDE):
        if name in ds.column_names and isinstance(ds.features[name], ClassLabel):  # because arms compare names
            ds = ds.remove_columns(name).add_column(name, column_values(ds, name))
    sides = {FORGET: args.labeled_forget, RETAIN: args.labeled_retain}
    labeled = {side: args.labeled if share is None else share for side, share in sides.items()}
    spoilt = {*labeled.values(), args.recall, args.precision} != {1.0}
    if args.label_keywords or ROUTE_LABEL in ds.column_names:
        if spoilt:
            whose = "`label_keywords`" if args.label_keywords else f"the column `{ROUTE_LABEL}`"
            logger.warning(
                f"the labels of {whose} are never changed: `labeled`, `recall` and `precision` are for labels simulated from "
                f"the column `{SIDE}`, and are not applied"
            )
        if args.label_keywords:
            ds = labels_from_keywords(ds, {FORGET: args.label_keywords}, default=RETAIN)
        return ds
    if SIDE not in ds.column_names:
        raise ValueError(
            f"documents need a column `{ROUTE_LABEL}` (their label) or `{SIDE}` (their true side: forget or retain), got "
            f"{ds.column_names}: add one, or make labels from words with `label_keywords`"
        )
    if spoilt:
        return simulate_labels(
            ds, SIDE, labeled=labeled, recall=args.recall, precision=args.precision, seed=args.label_seed
        )
    return labels_from_column(ds, SIDE, {FORGET: FORGET, RETAIN: RETAIN})


def first_of(ds: Dataset, side: str, count: int | None = None) -> Dataset:
    """Return the first ``count`` rows whose true ``side`` is the given one, or all of them.

    >>> first_of(Dataset.from_dict({"text": ["a", "b", "c"], "side": ["forget", "retain", "forget"]}), "forget", 1)["text"][:]
    ['a']
    """
    return ds.select(np.flatnonzero(np.array(ds[SIDE][:]) == side)[:count])


def select_arm(ds: Dataset, arm: str) -> Dataset:
    """Return the rows or documents that an arm trains on.

    "filter" leaves out rows labeled forget, "perfect_filter" rows that truly are forget; every other arm takes all.

    Raises:
        ValueError: where the documents lack the column of the label or true side.

    >>> select_arm(Dataset.from_dict({"side": ["forget", "retain"]}), "perfect_filter")["side"][:]
    ['retain']
    """
    column = {"filter": ROUTE_LABEL, "perfect_filter": SIDE}.get(arm)
    if column is None:
        return ds
    if column not in ds.column_names:
        known = "the true side of documents" if column == SIDE else "their labels"
        raise ValueError(f"`arm: {arm}` needs the column `{column}`, {known}; got {ds.column_names}")
    return ds.filter(lambda value: value != FORGET, input_columns=column)


@formerly_positional("length", "arm")
def labeled_tokens(documents: Dataset, tokenizer: PreTrainedTokenizerBase, *, length: int, arm: str) -> int:
    """Return the number of tokens of forget text that had to be labeled for an arm, in whole rows of ``length``.

    "perfect_filter" counts forget text by ``side``, "routed" and "filter" by ``route_label``; other arms need no label.

    >>> from routed_peft.data import train_tokenizer
    >>> ds = Dataset.from_dict({"text": ["a b c"] * 8, "route_label": ["forget", "unlabeled"] * 4, "side": ["forget"] * 8})
    >>> tokenizer = train_tokenizer(ds["text"], 270)
    >>> [labeled_tokens(ds, tokenizer, length=4, arm=arm) for arm in ("none", "filter", "perfect_filter")]
    [0, 16, 32]
    """
    column = {"routed": ROUTE_LABEL, "filter": ROUTE_LABEL, "perfect_filter": SIDE}.get(arm)
    if column is None:
        return 0
    known = documents.filter(lambda value: value == FORGET, input_columns=column)
    return sum(map(len, tokenize(known, tokenizer, "text"))) // length * length


def evaluation_rows(args: DocumentArguments, tokenizer: PreTrainedTokenizerBase) -> dict[str, Dataset]:
    """Return packed held-out rows by side, from ``eval_files`` or else the validation split of ``pair``.

    Raises:
        ValueError: where an entry of ``eval_files`` is not ``name=FILE``, or there is no training file.
    """
    if args.eval_files and not args.train_file:
        raise ValueError(f"`eval_files` are used beside `train_file`, got none: the pair `{args.pair}` has its own")
    if args.train_file:
        if wrong := [entry for entry in args.eval_files if "=" not in entry]:
            raise ValueError(f"`eval_files` has {wrong[0]!r}: write name=FILE, such as forget={wrong[0]}")
        pairs = (entry.split("=", 1) for entry in args.eval_files)
        sides = {name: load_texts([file]) for name, file in pairs}
    else:
        ds = load_pair(args.pair, "validation")
        sides = {name: first_of(ds, name) for name in (FORGET, RETAIN)}
    if args.eval_documents is not None:
        sides = {name: part.select(range(min(args.eval_documents, len(part)))) for name, part in sides.items()}
    return {name: pack(part, tokenizer, length=args.length, by=[]) for name, part in sides.items()}


def check_evaluation(args: TrainingArguments, evaluated: Collection[str]) -> None:
    """Raise ValueError where evaluation during training is on, and there is no held-out text.

    >>> check_evaluation(TrainingArguments("out", eval_strategy="steps", eval_steps=5, report_to="none"), {})
    Traceback (most recent call last):
    ...
    ValueError: `eval_strategy` is 'steps', but there is no held-out text: name `eval_files`, or set it to 'no'
    """
    if args.eval_strategy != "no" and not evaluated:
        strategy = getattr(args.eval_strategy, "value", args.eval_strategy)
        raise ValueError(
            f"`eval_strategy` is {strategy!r}, but there is no held-out text: name `eval_files`, or set it to 'no'"
        )
