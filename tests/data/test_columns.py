from __future__ import annotations

from collections import Counter

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value

from routed_peft import presets
from routed_peft.data import check_route_columns, class_names, route_column

ROUTES = presets.sgtm("forget")


def test_counts_per_example_also_after_select_and_shuffle():
    ds = Dataset.from_dict({"route_label": ["forget", "retain", "retain", "unlabeled"] * 5})
    assert check_route_columns(ds, ROUTES) == {"forget": 5, "retain": 10, "unlabeled": 5}
    assert check_route_columns(ds.shuffle(seed=0), ROUTES) == {"forget": 5, "retain": 10, "unlabeled": 5}
    assert check_route_columns(ds.select([1, 2, 5]), ROUTES) == Counter(retain=3)
    assert check_route_columns(ds.with_format("torch"), ROUTES)["forget"] == 5


def test_counts_per_token_leave_out_padding():
    ds = Dataset.from_dict({"input_ids": [[1, 2], [3]], "route_labels": [["forget", "retain"], ["forget"]]})
    assert check_route_columns(ds, ROUTES) == {"forget": 2, "retain": 1}
    features = Features({"route_labels": List(ClassLabel(names=["retain", "forget"]))})
    ds = Dataset.from_dict({"route_labels": [[1, 1, -100], [0]]}, features=features)
    assert check_route_columns(ds, ROUTES) == {"forget": 2, "retain": 1}


def test_class_labels_count_by_name():
    features = Features({"route_label": ClassLabel(names=["retain", "forget"])})
    ds = Dataset.from_dict({"route_label": [1, 0, 0]}, features=features)
    assert class_names(ds) == ["retain", "forget"] and class_names(ds.to_iterable_dataset()) == ["retain", "forget"]
    assert check_route_columns(ds, ROUTES) == {"forget": 1, "retain": 2}


CLASSES = Features({"route_label": ClassLabel(names=["retain", "forget"])})
BAD = {
    "no column": (Dataset.from_dict({"labels": ["forget"]}), r"got \['labels'\].*packing=True"),
    "null": (Dataset.from_dict({"route_label": ["forget", None]}), "`route_label` has nulls"),
    "null class": (Dataset.from_dict({"route_label": [1, -1]}, features=CLASSES), "`route_label` has nulls"),
    "null token": (Dataset.from_dict({"route_labels": [["forget", None]]}), "`route_labels` has nulls"),
    "null list": (Dataset.from_dict({"route_labels": [["forget"], None]}), "`route_labels` has nulls"),
    "unknown": (Dataset.from_dict({"route_label": ["forget", "retian"]}), "did you mean 'retain'"),
    "unknown class": (
        Dataset.from_dict({"route_label": [0]}, features=Features({"route_label": ClassLabel(names=["law"])})),
        "'law' has no route",
    ),
    "integers": (Dataset.from_dict({"route_label": [0, 1]}), "has no name"),
    "length": (
        Dataset.from_dict({"input_ids": [[1], [1, 2, 3]], "route_labels": [["forget"], ["forget", "retain"]]}),
        "got 2 labels for 3 tokens in row 1",
    ),
    "one a row": (Dataset.from_dict({"route_labels": ["forget"]}), "one label per token, got one string a row"),
    "both": (Dataset.from_dict({"route_label": ["forget"], "route_labels": [["forget"]]}), "got both"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_columns_raise(case):
    ds, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        check_route_columns(ds, ROUTES)


def test_a_wrong_length_behind_shuffled_indices_is_found_in_a_later_batch():
    rows = {"input_ids": [[1]] * 10_050 + [[1, 2]], "route_labels": [["forget"]] * 10_051}
    with pytest.raises(ValueError, match="got 1 labels for 2 tokens in row 10050"):
        check_route_columns(Dataset.from_dict(rows), ROUTES)
    with pytest.raises(ValueError, match="in row 0"):
        check_route_columns(Dataset.from_dict(rows).select([10_050, 3]), ROUTES)


def test_route_column():
    assert route_column(["input_ids", "route_labels", "labels"]) == "route_labels"


def test_a_plain_column_has_no_class_names():
    assert (
        class_names(Dataset.from_dict({"route_label": ["a"]}, features=Features({"route_label": Value("string")})))
        is None
    )
