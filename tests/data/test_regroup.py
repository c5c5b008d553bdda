from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from routed_peft.data import pack, train_tokenizer
from routed_peft.data.beginnings import begin_tokens
from routed_peft.data.packing import document_means, document_of, regroup


def beginning_tokenizer(template):
    """A tokenizer of one token a byte that begins texts, as Gemma's and Llama's do."""
    tokenizer = train_tokenizer(["x"], vocab_size=258)
    tokenizer.add_special_tokens({"bos_token": "<bos>", "additional_special_tokens": ["<go>"]})
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<bos>", "<go>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=ids)
    return tokenizer


@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=4))
def test_means_over_documents(ids):
    """The obvious way: cut every row after each 0, and leave out the row's first token, which nothing predicts."""
    ids, values = torch.tensor(ids), torch.arange(5.0).expand(len(ids), 5) ** 2
    found = document_means(values, document_of(ids, separator=0))
    for row, means in zip(ids.tolist(), found, strict=True):
        cuts = [0, *(i + 1 for i, token in enumerate(row) if token == 0 and i < 5), 6]
        for start, stop in pairwise(cuts):
            own = [float((i - 1) ** 2) for i in range(max(start, 1), stop)]
            assert means[start:stop].tolist() == pytest.approx([sum(own) / max(1, len(own))] * (stop - start))


@pytest.mark.parametrize("template", ["<bos> $A", "<go> <bos> $A", "$A"])
@pytest.mark.parametrize("seed", range(3))
def test_rows_laid_out_anew_begin_as_packed_ones_do(template, seed):
    tokenizer = beginning_tokenizer(template)
    begin, eos, rng = begin_tokens(tokenizer), tokenizer.eos_token_id, np.random.default_rng(seed)
    texts = [letter * int(rng.integers(1, 20)) for letter in "abcdefghij" * 3]
    rows = pack(Dataset.from_dict({"text": texts, "route_label": ["unlabeled"] * 30}), tokenizer, length=9, seed=seed)
    forget = set(tokenizer.encode("abcde", add_special_tokens=False))
    documents = document_of(torch.tensor(rows["input_ids"][:]), eos)
    is_forget = [
        [bool(forget & set(np.array(ids)[own.numpy() == i])) for i in range(int(own.max()) + 1)]
        for ids, own in zip(rows["input_ids"], documents, strict=True)
    ]
    found, labels = regroup(rows, is_forget, separator=eos, begin=begin)
    taken: Counter[int] = Counter()
    for row, label in zip(found, labels, strict=True):
        ids = row["input_ids"]
        letters = {token for token in ids if token not in (*begin, eos)}
        assert len(ids) == 9 and ids[: len(begin)] == begin and letters
        assert letters <= forget if label == "forget" else not letters & forget
        starts = [i + 1 for i, token in enumerate(ids[:-1]) if token == eos]
        assert all(ids[i : i + len(begin)] == begin[: 9 - i] for i in starts)
        taken.update(token for token in ids if token not in (*begin, eos))
        if begin:
            assert all(new in (-100, token) for new, token in zip(row["labels"], ids, strict=True))
            assert not {new for new in row["labels"] if new in begin}
    before = Counter(token for ids in rows["input_ids"] for token in ids if token not in (*begin, eos))
    assert all(taken[token] <= before[token] for token in taken)
    assert sum(before.values()) - sum(taken.values()) <= 2 * 9, "only the tail of either side is dropped"
