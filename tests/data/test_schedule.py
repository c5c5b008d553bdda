from __future__ import annotations

from collections import Counter

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from routed_peft.data import schedule


def data(**counts: int) -> Dataset:
    labels = [label for label, count in counts.items() for _ in range(count)]
    return Dataset.from_dict({"route_label": labels, "id": list(range(len(labels)))})


def test_natural_shares_everywhere_and_each_row_once_an_epoch():
    ds = data(forget=10, retain=30, unlabeled=40)
    run = schedule(ds, 160)
    for start in range(0, 160, 16):
        assert Counter(run["route_label"][start : start + 16]) == {"forget": 2, "retain": 6, "unlabeled": 8}
    assert sorted(run["id"][:80]) == list(range(80)) and sorted(run["id"][80:]) == list(range(80))
    assert run["id"][:80] != run["id"][80:]
    assert schedule(ds, 160)["id"][:] == run["id"][:] != schedule(ds, 160, seed=1)["id"][:]


def test_labeled_first_and_forget_share():
    run = schedule(data(forget=20, retain=20, unlabeled=40), 400, labeled_first=0.25, forget_share=0.1)
    assert Counter(run["route_label"][:100]) == {"forget": 50, "retain": 50}
    assert Counter(run["route_label"][100:]) == {"forget": 30, "retain": 90, "unlabeled": 180}
    fewer = schedule(
        data(forget=20, retain=20, unlabeled=40), 400, labeled_first=0.25, forget_share=0.1, first_forget_share=0.2
    )
    assert Counter(fewer["route_label"][:100]) == {"forget": 20, "retain": 80}
    assert Counter(fewer["route_label"][100:]) == Counter(run["route_label"][100:])


@given(st.floats(0, 1), st.none() | st.floats(0, 0.99), st.integers(1, 60))
def test_always_exactly_so_many_rows(labeled_first, forget_share, rows):
    run = schedule(
        data(forget=3, retain=4, unlabeled=5, neutral=1), rows, labeled_first=labeled_first, forget_share=forget_share
    )
    assert len(run) == rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "`rows` must be positive"),
        ({"rows": 4, "labeled_first": 1.5}, r"in \[0, 1\]"),
        ({"rows": 4, "forget_share": 1.0}, "`forget_share` must be"),
        ({"rows": 4, "first_forget_share": 1.0}, "`first_forget_share` must be"),
    ],
)
def test_bad_shares(options, message):
    with pytest.raises(ValueError, match=message):
        schedule(data(forget=1, retain=1), **options)


def test_labels_that_are_missing():
    with pytest.raises(ValueError, match="needs rows labeled forget"):
        schedule(data(retain=2, unlabeled=2), 4, labeled_first=0.5)
    with pytest.raises(ValueError, match="has only the labels"):
        schedule(data(retain=2), 4, forget_share=0.5)
