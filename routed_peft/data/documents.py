"""Documents as recipes take them: built-in text or files of one's own, and what is known of their labels."""

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

logger = logging.get_logger(__name__)

SIDE = "side"
"""Column of what documents truly are."""


@dataclass
class DocumentArguments:
    """Which documents, and which labels; the base of what a recipe is told, each field a flag."""

    pair: str = field(default="biology", metadata={"help": "Built-in text: biology, spanish, entangled or arithmetic."})
    train_file: str | None = field(
        default=None,
        metadata={"help": "JSONL, Parquet or Hub dataset, in place of `pair`: text, and route_label or side."},
    )
    eval_files: list[str] = field(default_factory=list, metadata={"help": "name=FILE for each side, with text."})
    eval_documents: int | None = field(default=None, metadata={"help": "At most so many held-out ones of each side."})
    length: int = field(default=128, metadata={"help": "Tokens per row."})
    labeled: float = field(
        default=1.0,
        metadata={
            "help": "Share of documents that carry a label at all, where labels are made from `side`; labels of your own "
            "(`route_label`, `label_keywords`) are taken as they are."
        },
    )
    labeled_forget: float | None = field(default=None, metadata={"help": "The same, for the forget side alone."})
    labeled_retain: float | None = field(default=None, metadata={"help": "The same, for the retain side alone."})
    recall: float = field(default=1.0, metadata={"help": "Share of labelled forget documents labelled forget."})
    precision: float = field(default=1.0, metadata={"help": "Share of documents labelled forget that are."})
    label_seed: int = field(
        default=0, metadata={"help": "Decides which documents lose their label, or get a wrong one."}
    )
    label_keywords: list[str] = field(
        default_factory=list, metadata={"help": "Label documents with one of these words forget, all others retain."}
    )


def labeled_documents(args: DocumentArguments) -> Dataset:
    """Return documents with their label (``route_label``) and, where it is known, their true ``side``.

    Labels are those of ``label_keywords``, else those of the column ``route_label``, else made from the column ``side`` with
    the shares, recall and precision that ``args`` asks for. The first two are taken as they are.

    Raises:
        ValueError: where documents have neither column and there are no keywords.

    >>> ds = labeled_documents(DocumentArguments(pair="spanish", labeled=0.5))
    >>> sorted(set(ds["route_label"])), sorted(set(ds["side"]))
    (['forget', 'retain', 'unlabeled'], ['forget', 'retain'])
    """
    ds: Any = load_training_file(args.train_file, columns=["text"]) if args.train_file else load_pair(args.pair)
    for name in (ROUTE_LABEL, SIDE):
        if name in ds.column_names and isinstance(ds.features[name], ClassLabel):  # arms compare names
            ds = ds.remove_columns(name).add_column(name, column_values(ds, name))
    sides = {FORGET: args.labeled_forget, RETAIN: args.labeled_retain}
    labeled = {side: args.labeled if share is None else share for side, share in sides.items()}
    spoilt = {*labeled.values(), args.recall, args.precision} != {1.0}
    if args.label_keywords or ROUTE_LABEL in ds.column_names:
        if spoilt:
            whose = "`label_keywords`" if args.label_keywords else f"the column `{ROUTE_LABEL}`"
            logger.warning(
                f"the labels of {whose} are taken as they are: `labeled`, `recall` and `precision` are for labels made from "
                f"the column `{SIDE}`, and are not applied"
            )
        if args.label_keywords:
            ds = labels_from_keywords(ds, {FORGET: args.label_keywords}, default=RETAIN)
        return ds
    if SIDE not in ds.column_names:
        raise ValueError(
            f"documents need a column `{ROUTE_LABEL}` (their label) or `{SIDE}` (what they truly are: forget or retain), got "
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
    """Return the rows or documents that an arm trains on: "filter" leaves out what is labelled forget, "perfect_filter" what
    truly is; every other arm takes all.

    Raises:
        ValueError: where that is not known of the documents.

    >>> select_arm(Dataset.from_dict({"side": ["forget", "retain"]}), "perfect_filter")["side"][:]
    ['retain']
    """
    column = {"filter": ROUTE_LABEL, "perfect_filter": SIDE}.get(arm)
    if column is None:
        return ds
    if column not in ds.column_names:
        known = "what documents truly are" if column == SIDE else "their labels"
        raise ValueError(f"`arm: {arm}` needs the column `{column}`, {known}; got {ds.column_names}")
    return ds.filter(lambda value: value != FORGET, input_columns=column)


def labeled_tokens(documents: Dataset, tokenizer: PreTrainedTokenizerBase, *, length: int, arm: str) -> int:
    """Return how many tokens of forget text somebody had to label for an arm, in whole rows of ``length``: of ``side`` for
    "perfect_filter", of ``route_label`` for "routed" and "filter", none for other arms.

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
    """Return packed held-out rows by side: of ``eval_files`` beside a training file, else of the validation split of ``pair``.

    Raises:
        ValueError: on an entry of ``eval_files`` that is not ``name=FILE``, or without a training file.
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
    """Raise ValueError where losses are to be taken on the way, and there is nothing to take them of.

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
