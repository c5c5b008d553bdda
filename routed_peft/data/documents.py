"""Documents of recipes, from built-in text or your own files, with their labels and true sides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.utils import logging

from routed_peft.corpora import load_pair
from routed_peft.data.columns import ROUTE_LABEL, check_has_route, class_names, column_values, label_name
from routed_peft.data.labels import FORGET, RETAIN, UNLABELED, labels_from_column, labels_from_keywords, simulate_labels
from routed_peft.data.loading import TEXT, TOKENS, TextFormat, load_documents
from routed_peft.data.packing import pack, tokenize
from routed_peft.mistakes import check_choices, check_numbers, option
from routed_peft.routes import BASE, Routes

logger = logging.get_logger(__name__)

SIDE = "side"
"""Column of the true side of a document, "forget" or "retain"."""

_FILTERED = {"filter": ROUTE_LABEL, "perfect_filter": SIDE}
"""Column by which an arm leaves documents out."""


@dataclass
class DocumentArguments:
    """Settings of documents and their labels; recipes inherit them, and every field is a flag."""

    pair: str = option("biology", "Built-in text: biology, spanish, entangled or arithmetic.")
    train_file: str | None = option(None, "JSONL, JSON, Parquet, a pattern or a Hub dataset instead of `pair`, with "
        "text (or chats in `messages`, or `input_ids`), and route_label or side.")  # fmt: skip
    forget_file: str | None = option(None, "Forget text, with `retain_file` instead of `train_file`; also plain .txt.")
    retain_file: str | None = option(None, "Retain text, beside `forget_file`.")
    text_column: str = option(TEXT, "Column of the text, or of chats, in all of these files.")
    text_template: str | None = option(None, 'Text made of columns, such as "{question} {answer}", instead of '
        "`text_column`.")  # fmt: skip
    eval_files: list[str] = option([], "name=FILE for each side, with text.")
    eval_documents: int | None = option(None, "Maximum number of held-out documents per side.")
    length: int = option(128, "Tokens per row.")
    labeled: float = option(1.0, "Share of documents that carry a label, where labels are simulated from `side`; "
        "labels you provide (`route_label`, `label_keywords`) are never changed.")  # fmt: skip
    labeled_forget: float | None = option(None, "`labeled` for the forget side alone.")
    labeled_retain: float | None = option(None, "`labeled` for the retain side alone.")
    recall: float = option(1.0, "Share of labeled forget documents labeled forget.")
    precision: float = option(1.0, "Share of documents labeled forget that truly are.")
    label_seed: int = option(0, "Seed of the choice of documents without a label, or with a wrong one.")
    label_keywords: list[str] = option([], "Label documents with one of these words forget, all others retain.")

    def __post_init__(self) -> None:
        check_choices(self)
        check_numbers(self, "labeled", "labeled_forget", "labeled_retain", "recall", "precision", high=1)
        check_numbers(self, "length", low=2)
        check_numbers(self, "eval_documents", low=1)
        check_numbers(self, "label_seed")

    def text_format(self, load_tokenizer: Callable[[], Any] | None = None) -> TextFormat:
        """Return the place of text in these files."""
        return TextFormat(self.text_column, self.text_template, load_tokenizer)

    def own_files(self) -> bool:
        """Return whether documents come from files instead of `pair`."""
        return any((self.train_file, self.forget_file, self.retain_file))


def labeled_documents(args: DocumentArguments, load_tokenizer: Callable[[], Any] | None = None) -> Dataset:
    """Return documents with their label (``route_label``) and, where it is known, their true ``side``.

    Labels come from ``label_keywords``, else from the column ``route_label``, else they are simulated from the column
    ``side`` with the shares, recall and precision of ``args``. Labels of the first two sources are never changed.
    ``load_tokenizer`` returns the model's tokenizer, which chats need. ValueError where documents have neither column and there
    are no keywords, and as `load_documents` does.

    >>> ds = labeled_documents(DocumentArguments(pair="spanish", labeled=0.5))
    >>> sorted(set(ds["route_label"])), sorted(set(ds["side"]))
    (['forget', 'retain', 'unlabeled'], ['forget', 'retain'])
    """
    ds = _load(args, load_tokenizer)
    for name in (ROUTE_LABEL, SIDE):
        if name in ds.column_names and isinstance(ds.features[name], ClassLabel):  # because arms compare names
            ds = ds.remove_columns(name).add_column(name, column_values(ds, name))
        elif name in ds.column_names and (odd := [one for one in ds[name][:] if not isinstance(one, str | None)]):
            raise ValueError(
                f"documents need strings in the column `{name}`, got {odd[0]!r}: write the names themselves"
            )
    sides = {FORGET: args.labeled_forget, RETAIN: args.labeled_retain}
    labeled = {side: args.labeled if share is None else share for side, share in sides.items()}
    spoilt = {*labeled.values(), args.recall, args.precision} != {1.0}
    if args.label_keywords or ROUTE_LABEL in ds.column_names:
        if spoilt:
            whose = "`label_keywords`" if args.label_keywords else f"the column `{ROUTE_LABEL}`"
            logger.warning(f"the labels of {whose} are never changed: `labeled`, `recall` and `precision` are for "
                           f"labels simulated from the column `{SIDE}`, and are not applied")  # fmt: skip
        if args.label_keywords:
            ds = labels_from_keywords(ds, {FORGET: args.label_keywords}, default=RETAIN)
        return ds
    if SIDE not in ds.column_names:
        raise ValueError(f"documents need a column `{ROUTE_LABEL}` (their label) or `{SIDE}` (their true side: forget "
            f"or retain), got {ds.column_names}: add one, or make labels from words with `label_keywords`")  # fmt: skip
    if spoilt:
        shares = {"recall": args.recall, "precision": args.precision}
        return simulate_labels(ds, SIDE, labeled=labeled, **shares, seed=args.label_seed)
    return labels_from_column(ds, SIDE, {FORGET: FORGET, RETAIN: RETAIN})


def _load(args: DocumentArguments, load_tokenizer: Callable[[], Any] | None) -> Dataset:
    if not args.own_files():
        return load_pair(args.pair)
    form, files = args.text_format(load_tokenizer), {FORGET: args.forget_file, RETAIN: args.retain_file}
    if args.train_file:
        if any(files.values()):
            raise ValueError("`train_file` and `forget_file` or `retain_file` are given: leave one way out")
        return load_documents(args.train_file, argument="train_file", form=form, keep_tokens=True)
    parts = []
    for side, file in files.items():
        if file:
            part = load_documents(file, argument=f"{side}_file", form=form, keep_tokens=True)
            part = part.select_columns(TEXT if TEXT in part.column_names else TOKENS)
            parts.append(part.add_column(SIDE, [side] * len(part)))
    if len({part.column_names[0] for part in parts}) > 1:
        raise ValueError("one of `forget_file` and `retain_file` has text and the other `input_ids`: give both alike")
    return concatenate_datasets(parts)


def check_both_sides(documents: Dataset) -> None:
    """Raise ValueError where all documents are of one label and true side.

    >>> check_both_sides(Dataset.from_dict({"route_label": ["forget", "forget"]}))
    Traceback (most recent call last):
    ...
    ValueError: every document is forget, and routing needs text of both sides: add some of the other
    """
    found = set(documents[ROUTE_LABEL])
    if SIDE in documents.column_names:  # otherwise unlabeled text may be of either
        found = (found | set(documents[SIDE])) - {UNLABELED}
    if len(found) < 2:
        names = ", ".join(map(str, found))
        raise ValueError(f"every document is {names}, and routing needs text of both sides: add some of the other")


def first_of(ds: Dataset, side: str, count: int | None = None) -> Dataset:
    """Return the first ``count`` rows whose true ``side`` is the given one, or all of them.

    >>> first_of(Dataset.from_dict({"text": ["a", "b", "c"], "side": ["forget", "retain", "forget"]}), "forget", 1)["text"][:]
    ['a']
    """
    return ds.select(np.flatnonzero(np.array(ds[SIDE][:]) == side)[:count])


def forget_labels(routes: Routes | None) -> list[str]:
    """Return the labels of text that the base should not learn from: those whose route weakens, blocks or reverses it.

    Where there is no such route, as in a placebo, or none are given, it is "forget" alone.
    """
    return [label for label, route in (routes or {}).items() if route.weight(BASE) < 1] or [FORGET]


def count_left_out(ds: Dataset, arm: str, routes: Routes | None = None) -> dict[str, int]:
    """Return how many rows or documents an arm leaves out, by label ("filter") or true side ("perfect_filter").

    Other arms leave nothing out. ``routes`` are those of the method that the arm is compared with; see `forget_labels`.
    ValueError where the column is missing, a label has no route, or a filter leaves nothing out.

    >>> count_left_out(Dataset.from_dict({"side": ["forget", "retain"]}), "perfect_filter")
    {'forget': 1}
    """
    column = _FILTERED.get(arm)
    if column is None:
        return {}
    if column not in ds.column_names:
        known = "the true side of documents" if column == SIDE else "their labels"
        raise ValueError(f"`arm: {arm}` needs the column `{column}`, {known}; got {ds.column_names}")
    names, chosen = class_names(ds) if column == ROUTE_LABEL else None, forget_labels(routes)
    values = column_values(ds, column)
    counts = Counter(label_name(value, names) for value in values) if column == ROUTE_LABEL else Counter(values)
    if column == ROUTE_LABEL and routes is not None:
        for label in counts:
            check_has_route(label, routes)
    else:
        chosen = list(dict.fromkeys([*chosen, FORGET]))
    found = {label: counts[label] for label in chosen if counts[label]}
    if not found:
        raise ValueError(f"`arm: {arm}` leaves out documents whose `{column}` is one of {chosen}, and leaves nothing "
                         f"out: the column holds {sorted(map(str, counts))}. Correct the column, or give these labels "
                         "a route that keeps them from the base")  # fmt: skip
    return found


def select_arm(ds: Dataset, arm: str, routes: Routes | None = None) -> Dataset:
    """Return the rows or documents that an arm trains on: all but those of `count_left_out`, with its errors.

    >>> select_arm(Dataset.from_dict({"side": ["forget", "retain"]}), "perfect_filter")["side"][:]
    ['retain']
    """
    left_out = count_left_out(ds, arm, routes)
    if not left_out:
        return ds
    values = column_values(ds, _FILTERED[arm])
    return ds.select([index for index, value in enumerate(values) if value not in left_out])


def labeled_tokens(
    documents: Dataset, tokenizer: PreTrainedTokenizerBase, *, length: int, arm: str, routes: Routes | None = None
) -> int:
    """Return the number of tokens of forget text that had to be labeled for an arm, in whole rows of ``length``.

    "perfect_filter" counts forget text by ``side``, "routed" and "filter" by ``route_label``; other arms need no label.
    ``routes`` are those of the method; see `forget_labels`.

    >>> from routed_peft.data import train_tokenizer
    >>> ds = Dataset.from_dict({"text": ["a b c"] * 8, "route_label": ["forget", "unlabeled"] * 4, "side": ["forget"] * 8})
    >>> tokenizer = train_tokenizer(ds["text"], 270)
    >>> [labeled_tokens(ds, tokenizer, length=4, arm=arm) for arm in ("none", "filter", "perfect_filter")]
    [0, 16, 32]
    """
    column = {"routed": ROUTE_LABEL, **_FILTERED}.get(arm)
    if column is None:
        return 0
    chosen = {*forget_labels(routes), *([FORGET] if column == SIDE else [])}
    known = documents.select([i for i, value in enumerate(column_values(documents, column)) if value in chosen])
    return sum(map(len, tokenize(known, tokenizer, TEXT))) // length * length


def evaluation_rows(
    args: DocumentArguments, tokenizer: PreTrainedTokenizerBase, *, documents: Dataset | None = None
) -> dict[str, Dataset]:
    """Return packed held-out rows by side, from ``eval_files`` or else the validation split of ``pair``.

    ValueError where an entry of ``eval_files`` is not ``name=FILE``, a name comes twice, most of a file is in the ``documents``
    of training, or there is no training file.
    """
    if args.own_files():
        if wrong := [entry for entry in args.eval_files if "=" not in entry]:
            raise ValueError(f"`eval_files` has {wrong[0]!r}: write name=FILE, such as forget={wrong[0]}")
        pairs = [entry.split("=", 1) for entry in args.eval_files]
        names = [name for name, _ in pairs]
        if odd := [name for name in names if not name or names.count(name) > 1]:
            raise ValueError(f"`eval_files` has the name {odd[0]!r} twice or none: give every file a name of its own")
        form = args.text_format(lambda: tokenizer)
        sides = {name: load_documents(file, argument="eval_files", form=form, keep_tokens=True) for name, file in pairs}
        for name, part in sides.items():
            if documents is not None:
                _check_held_out(name, part, documents)
    elif args.eval_files:
        raise ValueError(f"`eval_files` are used beside `train_file`, got none: the pair `{args.pair}` has its own")
    else:
        ds = load_pair(args.pair, "validation")
        sides = {name: first_of(ds, name) for name in (FORGET, RETAIN)}
    if args.eval_documents is not None:
        sides = {name: part.select(range(min(args.eval_documents, len(part)))) for name, part in sides.items()}
    return {name: pack(part, tokenizer, length=args.length, by=[]) for name, part in sides.items()}


def _check_held_out(name: str, held_out: Dataset, documents: Dataset) -> None:
    """Raise ValueError where most held-out documents are trained on, and warn where some are."""
    column = TEXT if TEXT in held_out.column_names else TOKENS
    if column not in documents.column_names:
        return
    known = set(map(str, documents[column]))
    if both := sum(str(value) in known for value in held_out[column]):
        found = f"{both} of the {len(held_out)} documents of `eval_files` {name!r} are trained on"
        if 2 * both > len(held_out):
            raise ValueError(f"{found}: give held-out text, from which the model learns nothing")
        logger.warning(f"{found}, so that its loss is lower than that of new text")


def check_evaluation(args: TrainingArguments, evaluated: Collection[str]) -> None:
    """Raise ValueError where evaluation during training is on, and there is no held-out text.

    >>> check_evaluation(TrainingArguments("out", eval_strategy="steps", eval_steps=5, report_to="none"), {})
    Traceback (most recent call last):
    ...
    ValueError: `eval_strategy` is 'steps', but there is no held-out text: name `eval_files`, or set it to 'no'
    """
    if args.eval_strategy != "no" and not evaluated:
        strategy = getattr(args.eval_strategy, "value", args.eval_strategy)
        raise ValueError(f"`eval_strategy` is {strategy!r}, but there is no held-out text: name `eval_files`, or set "
                         "it to 'no'")  # fmt: skip
