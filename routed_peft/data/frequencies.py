"""Token weights of ERA: route tokens that are more frequent in forget text than in retain text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from routed_peft.data.columns import ROUTE_LABEL, ROUTE_WEIGHTS, AnyDataset, add_column
from routed_peft.data.labels import FORGET
from routed_peft.routes import BASE


def token_frequency_weights(
    tokenizer: PreTrainedTokenizerBase,
    forget_texts: Iterable[str],
    *,
    retain_texts: Iterable[str],
    scale: float = 1.0,
    bias: float = 4.0,
    forget_count: float = 1.0,
    retain_count: float = 20.0,
) -> Tensor:
    r"""Return a weight per token, low for tokens of the forget side (gradient routing, arXiv 2410.04332, section 4.2).

    .. math::
        w = 1 - \sigma\!\left(\text{scale} \cdot (f/r - r/f) - \text{bias}\right)

    where :math:`f` and :math:`r` are a token's share of all tokens on the forget and on the retain side, counted in
    tokenized running text with pseudo-counts. A token equally frequent on both sides has weight 0.982, one much more
    frequent on the forget side a weight near 0. The weights are ``(V,)``, in (0, 1).

    Args:
        tokenizer: the tokenizer of the model to be trained.
        forget_texts: texts of the forget side; the paper takes 25,000 stories per side.
        retain_texts: texts of the retain side.
        scale: steepness of the fall.
        bias: ratio of frequencies at which the weight falls to one half, about.
        forget_count: pseudo-count of every token on the forget side.
        retain_count: the same on the retain side; it keeps tokens rare on both sides from being routed.

    Raises:
        ValueError: if a side has no tokens, a pseudo-count is not positive, or no token that occurs has a weight below 0.5.

    >>> from routed_peft.data import train_tokenizer
    >>> tokenizer = train_tokenizer(["a"], vocab_size=258)
    >>> w = token_frequency_weights(tokenizer, ["abbb" * 5000], retain_texts=["accc" * 5000])
    >>> [round(w[i].item(), 1) for i in tokenizer.convert_tokens_to_ids(["a", "b", "c"])]
    [1.0, 0.0, 1.0]
    """
    if not (forget_count > 0 and retain_count > 0):
        raise ValueError(f"`forget_count` and `retain_count` must be positive, got {forget_count} and {retain_count}")
    size = len(tokenizer)
    forget, retain = (_count(tokenizer, texts, size) for texts in (forget_texts, retain_texts))
    if not (forget.sum() and retain.sum()):
        raise ValueError("`forget_texts` and `retain_texts` must both hold tokens, got "
                         f"{int(forget.sum())} and {int(retain.sum())}")  # fmt: skip
    f = (forget + forget_count) / (forget + forget_count).sum()
    r = (retain + retain_count) / (retain + retain_count).sum()
    w = 1 - torch.sigmoid(scale * (f / r - r / f) - bias)
    if not ((w < 0.5) & (forget > 0)).any():
        raise ValueError(f"no token of `forget_texts` is routed: the lowest weight is {w.min():.3f}, and none is below "
            f"0.5. Give more text, a lower `bias` (now {bias}) or a lower `retain_count` (now {retain_count})")  # fmt: skip
    return w.float()


def add_frequency_weights(ds: AnyDataset, w: Tensor, *, base_weight: float, label: str = FORGET) -> AnyDataset:
    r"""Add ERA's per-token base weights as the column ``route_weights``, ``{"base": one number per position}``.

    In rows labeled ``label`` the base weight :math:`a` of the position that predicts token :math:`t` becomes
    :math:`w_t + (1 - w_t) a`. The column multiplies the route's own weight, so it holds that number divided by :math:`a`.
    Other rows, and a row's last position, have 1.

    ``ds`` has packed rows with ``input_ids`` and ``route_label``, ``w``, ``(V,)``, is of `token_frequency_weights`, and
    ``base_weight`` (``presets.era``: -0.75) is that of the route of ``label``. ValueError if it is zero (no multiple of it is
    ``w``), a token is outside ``w``, or no token of these rows has a weight below one half: nothing would be routed. A
    streaming dataset is not checked for the latter.

    >>> ds = Dataset.from_dict({"input_ids": [[2, 1, 0], [2, 1, 0]], "route_label": ["forget", "retain"]})
    >>> add_frequency_weights(ds, torch.tensor([0.0, 1.0, 0.5]), base_weight=-0.5)["route_weights"][:]
    [{'base': [-2.0, 1.0, 1.0]}, {'base': [1.0, 1.0, 1.0]}]
    """
    if not base_weight or not np.isfinite(base_weight):
        raise ValueError(f"`base_weight` must be a finite number other than 0, got {base_weight}: the column "
                         "multiplies it")  # fmt: skip
    table = w.double().numpy()
    routed = 0

    def weights(batch: Mapping[str, list[Any]]) -> list[dict[str, list[float]]]:
        nonlocal routed
        rows = []
        for ids, name in zip(batch["input_ids"], batch[ROUTE_LABEL], strict=True):
            multipliers = np.ones(len(ids))
            if name == label:
                predicted = np.asarray(ids[1:], dtype=np.int64)
                if len(predicted) and not 0 <= predicted.min() <= predicted.max() < len(table):
                    raise ValueError(f"`w` has weights for {len(table)} tokens, got token {predicted.max()}: another "
                                     "tokenizer?")  # fmt: skip
                row = table[predicted]
                routed += int((row < 0.5).sum())
                multipliers[:-1] = (row + (1 - row) * base_weight) / base_weight
            rows.append({BASE: multipliers.tolist()})
        return rows

    out = add_column(ds, ROUTE_WEIGHTS, needs=["input_ids", ROUTE_LABEL], values=weights)
    if isinstance(out, Dataset) and not routed:
        raise ValueError(f"no token of the rows labeled {label!r} has a weight below 0.5: nothing would be routed. "
            "Check that `w` was made with this tokenizer, from text like these rows, and that the label occurs")  # fmt: skip
    return out


def tokens_of_words(tokenizer: PreTrainedTokenizerBase, words: Iterable[str]) -> list[int]:
    """Return the ids of words that are single tokens: as written and capitalized, with and without a leading space.

    In running text a word's token nearly always has the leading space, so ids of words without it route almost nothing.
    ``words`` have no surrounding spaces, and ``tokenizer`` is that of the model to be trained. ValueError for a word none of
    whose forms is a single token.

    >>> from routed_peft.data import train_tokenizer
    >>> tokenizer = train_tokenizer(["a tree, the tree"] * 9, vocab_size=270)
    >>> tokenizer.convert_ids_to_tokens(tokens_of_words(tokenizer, ["tree"]))
    ['Ġtree']
    """
    found: list[int] = []
    for word in words:
        forms = dict.fromkeys(space + form for form in (word, word[:1].upper() + word[1:]) for space in ("", " "))
        encoded = [tokenizer(form, add_special_tokens=False)["input_ids"] for form in forms]
        single = [ids[0] for ids in encoded if len(ids) == 1 and ids[0] != tokenizer.unk_token_id]
        if not single:
            pieces = tokenizer.convert_ids_to_tokens(encoded[-1])
            raise ValueError(f"`words`: {word!r} is no single token in any form, this tokenizer splits it into "
                             f"{pieces}")  # fmt: skip
        found += single
    return list(dict.fromkeys(found))


def _count(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], size: int) -> Tensor:
    counts, texts = np.zeros(size), iter(texts)
    while batch := list(islice(texts, 1000)):
        encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        counts += np.bincount(np.concatenate([np.asarray(ids, dtype=np.int64) for ids in encoded]), minlength=size)
    return torch.from_numpy(counts)
