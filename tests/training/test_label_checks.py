from __future__ import annotations

import pytest
from datasets import ClassLabel, Features, IterableDataset, List, Value
from training_parts import LABELS, assert_same, rows, train, trainer_of, weights


def stream(*labels: str) -> IterableDataset:
    """Yield four rows, which is a step, of each label."""
    data = [row for label in labels for row in rows(4, [label]).to_list()]
    return IterableDataset.from_generator(lambda: iter(data))


def test_a_stream_in_which_nothing_is_routed_stops_early(tmp_path, tokenizer):
    trainer = trainer_of(tmp_path, tokenizer, dataset=stream(*["unlabeled"] * 6), check_labels_after=2)
    with pytest.raises(ValueError, match=r"no row is routed: only .'unlabeled'. occurs in the first 2 steps"):
        trainer.train()
    assert trainer.state.global_step == 1  # the second was not done


def test_a_region_without_data_yet_is_a_warning(tmp_path, tokenizer, caplog):
    warning = r"no row has trained the region 'forget' in the first 2 steps: only ['retain'] occurred"
    train(tmp_path, tokenizer, dataset=stream(*["retain"] * 3, "forget", "retain", "retain"), check_labels_after=2)
    assert caplog.text.count(warning) == 1
    caplog.clear()
    with pytest.raises(ValueError, match="no row trains the region 'forget'"):
        train(tmp_path, tokenizer, dataset=stream(*["retain"] * 6), check_labels_after=2)
    assert warning in caplog.text


@pytest.mark.slow
def test_streams_may_begin_with_what_is_not_routed(tmp_path, tokenizer, caplog):
    """Without a check under way, or before it."""
    data = ["unlabeled"] * 3 + ["forget"] * 3
    for steps in (0, 5):
        train(tmp_path, tokenizer, dataset=stream(*data), check_labels_after=steps)
    assert "no row" not in caplog.text
    with pytest.raises(ValueError, match=r"no row is routed: only .'unlabeled'. occurs, which"):
        train(tmp_path, tokenizer, dataset=stream(*["unlabeled"] * 6), check_labels_after=0)


def test_names_of_classes_are_those_of_the_stream(tmp_path, tokenizer):
    names = ["retain", "unlabeled", "forget"]  # not the order of the routes
    plain = rows(12, LABELS, length=6)
    features = Features({"input_ids": List(Value("int64")), "route_label": ClassLabel(names=names)})
    runs = [
        weights(train(tmp_path, tokenizer, dataset=dataset.to_iterable_dataset(), max_steps=3).model)
        for dataset in (plain, plain.cast(features))
    ]
    assert_same(*runs)
