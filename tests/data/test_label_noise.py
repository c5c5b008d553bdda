from __future__ import annotations

import pytest
from datasets import ClassLabel, Dataset, Features
from hypothesis import given, settings
from hypothesis import strategies as st

from routed_peft.data import label_statistics, simulate_labels

share = st.floats(0, 1)


def sides(forget: int, retain: int) -> Dataset:
    column = ["forget", "retain"] * min(forget, retain)
    column += ["forget"] * (forget - min(forget, retain)) + ["retain"] * (retain - min(forget, retain))
    return Dataset.from_dict({"side": column, "row": list(range(forget + retain))})


def carrying(ds: Dataset, *labels: str) -> set[int]:
    return {row for row, label in zip(ds["row"], ds["route_label"], strict=True) if label in labels}


@settings(max_examples=60, deadline=None)
@given(
    forget=st.integers(0, 40),
    retain=st.integers(0, 40),
    labeled_forget=share,
    labeled_retain=share,
    recall=share,
    precision=st.floats(0.3, 1),
    seed=st.integers(0, 5),
)
def test_counts_are_those_of_the_formulas(forget, retain, labeled_forget, labeled_retain, recall, precision, seed):
    n_forget, n_retain = round(labeled_forget * forget), round(labeled_retain * retain)
    hits = round(recall * n_forget)
    wrong = round(hits * (1 - precision) / precision)
    labeled = {"forget": labeled_forget, "retain": labeled_retain}
    make = lambda: simulate_labels(
        sides(forget, retain), "side", labeled=labeled, recall=recall, precision=precision, seed=seed
    )
    if not forget + retain:
        return
    if wrong > n_retain:
        with pytest.raises(ValueError, match=f"calls for {wrong} retain rows"):
            make()
        return
    expected = {
        "forget": {"forget": hits, "retain": n_forget - hits, "unlabeled": forget - n_forget},
        "retain": {"forget": wrong, "retain": n_retain - wrong, "unlabeled": retain - n_retain},
    }
    found = label_statistics(make())
    for side, counts in expected.items():
        assert found.get(side, {}) == {label: count for label, count in counts.items() if count}


@settings(max_examples=40, deadline=None)
@given(
    small=share,
    large=share,
    recalls=st.tuples(share, share),
    precisions=st.tuples(st.floats(0.6, 1), st.floats(0.6, 1)),
    seed=st.integers(0, 5),
)
def test_labels_are_nested(small, large, recalls, precisions, seed):
    small, large = sorted((small, large))
    ds = sides(30, 60)
    few = simulate_labels(ds, labeled=small, recall=min(recalls), precision=max(precisions), seed=seed)
    many = simulate_labels(ds, labeled=large, recall=max(recalls), precision=min(precisions), seed=seed)
    assert carrying(few, "forget", "retain") <= carrying(many, "forget", "retain")
    assert carrying(few, "forget") <= carrying(many, "forget")


def test_the_seed_decides_and_nothing_else():
    ds = sides(100, 100)
    first, again, other = (simulate_labels(ds, labeled=0.5, seed=seed) for seed in (3, 3, 4))
    assert first["route_label"][:] == again["route_label"][:] != other["route_label"][:]
    halves = carrying(first, "forget", "retain")
    paired = sum((2 * i in halves) == (2 * i + 1 in halves) for i in range(100))
    assert 30 < paired < 70, "the two sides share one random order"


def test_perfect_labels_are_the_sides_and_replace_earlier_ones():
    ds = sides(3, 4).add_column("route_label", ["x"] * 7)
    out = simulate_labels(ds)
    assert out["route_label"][:] == out["side"][:] and out["row"][:] == ds["row"][:]


def test_class_label_sides_count_by_name():
    features = Features({"side": ClassLabel(names=["retain", "forget"])})
    ds = simulate_labels(Dataset.from_dict({"side": [0, 1, 1]}, features=features))
    assert label_statistics(ds) == {"forget": {"forget": 2}, "retain": {"retain": 1}}


BAD = {
    "recall": ({"recall": 1.1}, "`recall` is a share"),
    "precision": ({"precision": -0.1}, "`precision` is a share"),
    "zero precision": ({"precision": 0.0}, "`precision` must be above 0"),
    "NaN": ({"labeled": float("nan")}, "is a share"),
    "one side": ({"labeled": {"forget": 1.0}}, "one each for 'forget' and 'retain'"),
    "column": ({"side_column": "topic"}, "lacks the column `topic`"),
    "values": ({"side_column": "row"}, "holds 'forget' and 'retain', got"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_raise(case):
    arguments, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        simulate_labels(sides(4, 4), **arguments)
