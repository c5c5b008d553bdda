"""Functions that the task YAMLs call: they turn local rows into documents, and results into token-weighted losses.

lm-eval passes the task's metadata to every function named by ``custom_dataset``. ``--metadata`` and, on its command line,
``--model_args`` override entries. This is how files and the tokenizer arrive here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset

from routed_peft.data.loading import TextFormat, read_rows, read_texts

Row = dict[str, Any]
PACKAGED = Path(__file__).parent / "data"
METADATA = {
    "forget_file",
    "retain_file",
    "text_column",
    "text_template",
    "forget_mc_file",
    "retain_mc_file",
    "adjacent_mc_file",
    "pair",
    "limit",
    "tokenizer",
    "pretrained",
    "revision",
    "trust_remote_code",
    "special_tokens",
    "add_bos_token",
}
"""Keys of lm-eval's metadata that tasks read."""


def load_tokenizer(metadata: Row) -> Any:
    """Return lm-eval's tokenizer: ``tokenizer`` (an object, a path, an id), else that of ``pretrained``.

    Raises:
        ValueError: neither is named, so tokens cannot be counted.
    """
    source = metadata.get("tokenizer") or metadata.get("pretrained")
    if source is None:
        raise ValueError("a loss per token needs the model's `tokenizer`, got none: add --metadata tokenizer=PATH")
    if not isinstance(source, str | Path):
        return source
    from transformers import AutoTokenizer

    hub = {"revision": str(metadata.get("revision") or "main"), "trust_remote_code": metadata.get("trust_remote_code")}
    return AutoTokenizer.from_pretrained(source, **hub)


def count_tokens(tokenizer: Any, texts: Iterable[str], metadata: Row) -> list[int]:
    """Count the tokens of each text that lm-eval scores.

    The first token is conditioned on a begin-of-sequence token that is not scored. If a tokenizer adds one by itself,
    ``--model hf`` scores it as well, unless ``add_bos_token=False``. ``routed`` and `routed_peft.evaluation` never score
    it, and pass ``special_tokens=False`` here.
    """
    if metadata.get("special_tokens") is False:
        from routed_peft.data.beginnings import document_tokens

        return [len(ids) for ids in document_tokens(tokenizer, list(texts))]
    special = metadata.get("special_tokens", metadata.get("add_bos_token"))
    keywords = {} if special is None else {"add_special_tokens": special}
    bos = tokenizer.bos_token
    plain = {"add_special_tokens": False}  # as lm-eval does for a text that starts with a begin-of-sequence token
    return [len(tokenizer.encode(t, **(plain if bos and t.startswith(bos) else keywords))) for t in texts]


def read_limit(limit: int | str | None) -> int | None:
    """Return the number of rows to keep; on a command line, ``limit=5`` is a string.

    Raises:
        ValueError: ``limit`` is not a whole number from 1.

    >>> read_limit("5"), read_limit(None)
    (5, None)
    """
    if limit is None:
        return None
    if not str(limit).isdecimal() or int(limit) < 1:
        raise ValueError(f"`limit` must be a whole number from 1, got {limit!r}: for example --metadata limit=100")
    return int(limit)


def loss_documents(
    side: str, pair: str = "biology", limit: int | str | None = None, **metadata: Any
) -> dict[str, Dataset]:
    """Build the test split of a loss task: columns ``text`` and ``n_tokens``.

    Args:
        side: "forget" or "retain".
        pair: packaged pair of corpora; its held-out rows are used if no file is given.
        limit: number of rows to keep, from the first.
        **metadata: ``forget_file`` and ``retain_file``, with ``text`` or as ``text_column`` and ``text_template`` say;
            ``tokenizer`` or ``pretrained``.

    Raises:
        ValueError: no tokenizer, no such file, a row without text, or a limit that is not a number.
    """
    argument = f"{side}_file"
    if file := metadata.get(argument):
        place = {key: metadata[f"text_{key}"] for key in ("column", "template") if metadata.get(f"text_{key}")}
        form = TextFormat(**place, load_tokenizer=partial(load_tokenizer, metadata))
        texts = read_texts(file, argument, limit=read_limit(limit), form=form)
    else:
        from routed_peft.corpora import load_pair

        rows = load_pair(pair, split="test").shuffle(seed=0)  # a limit then takes a fair sample of them
        texts = [row["text"] for row in rows if row["side"] == side][: read_limit(limit)]
    n_tokens = count_tokens(load_tokenizer(metadata), texts, metadata)
    return {"test": Dataset.from_dict({"text": texts, "n_tokens": n_tokens})}


def loss_per_document(doc: Row, results: Sequence[float]) -> dict[str, tuple[float, int]]:
    """Return the log-likelihood of a document, paired with its number of tokens and with its number of bytes.

    >>> loss_per_document({"text": "añb", "n_tokens": 2}, [-3.0])
    {'token_ce': (-3.0, 2), 'bits_per_byte': (-3.0, 4)}
    """
    (log_likelihood,) = results
    return {
        "token_ce": (log_likelihood, doc["n_tokens"]),
        "bits_per_byte": (log_likelihood, len(doc["text"].encode("utf-8"))),
    }


def token_weighted(items: Iterable[tuple[float, int]]) -> float:
    r"""Return the cross-entropy in nats per token, :math:`-\sum_i \log p(x_i) / \sum_i n_i`: long documents weigh more.

    >>> token_weighted([(-2.0, 1), (-4.0, 3)])
    1.5
    """
    log_likelihoods, counts = zip(*items, strict=True)
    return -sum(log_likelihoods) / sum(counts)


def questions(side: str, limit: int | str | None = None, **metadata: Any) -> dict[str, Dataset]:
    """Build the test split of a multiple choice task, in WMDP's schema ``{question, choices, answer}``.

    Args:
        side: "forget", "retain" or "adjacent".
        limit: number of rows to keep, from the first.
        **metadata: ``forget_mc_file``, ``retain_mc_file`` and ``adjacent_mc_file``; else packaged questions.

    Raises:
        ValueError: no such file, a row that is not in this schema, or a limit that is not a number.

    Example:
        >>> questions("retain", limit=1)["test"].column_names
        ['question', 'choices', 'answer']
    """
    argument = f"{side}_mc_file"
    rows = read_rows(metadata.get(argument) or PACKAGED / f"{side}_mc.jsonl", argument)[: read_limit(limit)]
    for number, row in enumerate(rows, 1):
        question, choices, answer = (row.get(key) for key in ("question", "choices", "answer"))
        fits = isinstance(question, str) and isinstance(choices, list) and len(choices) == 4
        if not (fits and isinstance(answer, int) and 0 <= answer < 4):
            raise ValueError(f"`{argument}` must hold `question`, four `choices` and `answer` from 0 to 3, got {row} "
                             f"in row {number}")  # fmt: skip
    return {"test": Dataset.from_list([{key: row[key] for key in ("question", "choices", "answer")} for row in rows])}
