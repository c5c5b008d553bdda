"""Documents as recipes take them: built-in text or files of one's own, and what is known of their labels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from datasets import ClassLabel, Dataset
from transformers import PreTrainedTokenizerBase

from routed_peft.corpora import load_pair
from routed_peft.data.columns import ROUTE_LABEL, column_values
from routed_peft.data.labels import FORGET, RETAIN, labels_from_column, labels_from_keywords
from routed_peft.data.loading import load_texts, load_training_file
from routed_peft.data.noise import simulate_labels
from routed_peft.data.packing import pack, tokenize

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
    labeled: float = field(default=1.0, metadata={"help": "Share of documents that carry a label at all."})
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

    >>> ds = labeled_documents(DocumentArguments(pair="spanish", labeled=0.5))
    >>> sorted(set(ds["route_label"])), sorted(set(ds["side"]))
    (['forget', 'retain', 'unlabeled'], ['forget', 'retain'])
    """
    ds: Any = load_training_file(args.train_file, columns=["text"]) if args.train_file else load_pair(args.pair)
    for name in (ROUTE_LABEL, SIDE):
        if name in ds.column_names and isinstance(ds.features[name], ClassLabel):  # arms compare names
            ds = ds.remove_columns(name).add_column(name, column_values(ds, name))
    truth = SIDE if SIDE in ds.column_names else ROUTE_LABEL
    if args.label_keywords:
        ds, truth = labels_from_keywords(ds, {FORGET: args.label_keywords}, default=RETAIN), ROUTE_LABEL
    elif ROUTE_LABEL not in ds.column_names:
        ds = labels_from_column(ds, SIDE, {FORGET: FORGET, RETAIN: RETAIN})
    sides = {FORGET: args.labeled_forget, RETAIN: args.labeled_retain}
    labeled = {side: args.labeled if share is None else share for side, share in sides.items()}
    if {*labeled.values(), args.recall, args.precision} != {1.0}:
        ds = simulate_labels(ds, truth, labeled, args.recall, args.precision, args.label_seed)
    return ds


def of_arm(ds: Dataset, arm: str) -> Dataset:
    """Return the rows or documents that an arm trains on: "filter" leaves out what is labelled forget, "perfect_filter" what
    truly is; every other arm takes all.

    Raises:
        ValueError: where that is not known of the documents.

    >>> of_arm(Dataset.from_dict({"side": ["forget", "retain"]}), "perfect_filter")["side"][:]
    ['retain']
    """
    column = {"filter": ROUTE_LABEL, "perfect_filter": SIDE}.get(arm)
    if column is None:
        return ds
    if column not in ds.column_names:
        raise ValueError(f"`arm: {arm}` needs the column `{column}`, what documents truly are; got {ds.column_names}")
    return ds.filter(lambda value: value != FORGET, input_columns=column)


def labeled_tokens(documents: Dataset, tokenizer: PreTrainedTokenizerBase, length: int, arm: str) -> int:
    """Return how many tokens of forget text somebody had to label for an arm, in whole rows of ``length``: of ``side`` for
    "perfect_filter", of ``route_label`` for "routed" and "filter", none for other arms.

    >>> from routed_peft.data import train_tokenizer
    >>> ds = Dataset.from_dict({"text": ["a b c"] * 8, "route_label": ["forget", "unlabeled"] * 4, "side": ["forget"] * 8})
    >>> tokenizer = train_tokenizer(ds["text"], 270)
    >>> [labeled_tokens(ds, tokenizer, 4, arm) for arm in ("none", "filter", "perfect_filter")]
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
        ValueError: on an entry of ``eval_files`` that is not ``name=FILE``.
    """
    if args.train_file:
        if wrong := [entry for entry in args.eval_files if "=" not in entry]:
            raise ValueError(f"`eval_files` has {wrong[0]!r}: write name=FILE, such as forget={wrong[0]}")
        pairs = (entry.split("=", 1) for entry in args.eval_files)
        sides = {name: load_texts([file]) for name, file in pairs}
    else:
        ds = load_pair(args.pair, "validation")
        sides = {name: ds.filter(lambda side, n=name: side == n, input_columns=SIDE) for name in (FORGET, RETAIN)}
    if args.eval_documents is not None:
        sides = {name: part.select(range(min(args.eval_documents, len(part)))) for name, part in sides.items()}
    return {name: pack(part, tokenizer, args.length, by=[]) for name, part in sides.items()}
