from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from routed_peft.data.regroup import document_means, document_of


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
