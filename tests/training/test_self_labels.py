from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers.processors import TemplateProcessing

from routed_peft import presets
from routed_peft.data import pack, train_tokenizer
from routed_peft.training.self_label_config import SelfLabelConfig
from routed_peft.training.self_labels import SelfLabeledRows


def rows(forget: int = 10, retain: int = 10, unlabeled: int = 20) -> Dataset:
    labels = ["forget"] * forget + ["retain"] * retain + ["unlabeled"] * unlabeled
    return Dataset.from_dict({"input_ids": [[i] for i in range(len(labels))], "route_label": labels})


def self_labeled(rows: Dataset, count: int, token_weights=None, separator=None, **settings) -> SelfLabeledRows:
    return SelfLabeledRows(
        rows, count, config=SelfLabelConfig(**settings), token_weights=token_weights, separator=separator
    )


def labels_of(run: SelfLabeledRows, start: int, stop: int) -> list[str]:
    return [run[i]["route_label"] for i in range(start, stop)]


def test_a_run_starts_with_labeled_rows_only_a_tenth_of_them_forget():
    run = self_labeled(rows(), 100, labeled_first=0.2)
    assert len(run) == 100 and labels_of(run, 0, 20).count("forget") == 2
    half = self_labeled(rows(), 100, labeled_first=0.2, first_forget_share=0.5)
    assert labels_of(half, 0, 20).count("forget") == 10
    assert "unlabeled" not in labels_of(run, 0, 20) and "unlabeled" in labels_of(run, 20, 100)


def test_relabeled_rows_are_taken_in_the_shares_asked_for():
    run = self_labeled(rows(), 100, labeled_first=0.2, forget_share=0.1)
    before = labels_of(run, 0, 24)
    scored = run.rows_labeled("unlabeled", 12)
    run.relabel(scored, np.arange(12) < 3, start=24)
    assert labels_of(run, 0, 24) == before
    after = labels_of(run, 24, 100)
    assert after.count("forget") == 8 and after.count("retain") == 68  # a tenth, to the nearest row
    unscored = set(range(20, 40)) - set(scored.tolist())
    assert not unscored & {run[i]["input_ids"][0] for i in range(24, 100)}


def test_what_was_given_is_overruled_where_that_is_asked_for():
    run = self_labeled(rows(), 100, labeled_first=0.2, forget_share=0.5, overrule=True)
    before = labels_of(run, 0, 24)
    scored = run.rows_to_score(32)
    assert len(set(scored.tolist())) == 32 and {label for label in run._given[scored]} == {
        "forget",
        "retain",
        "unlabeled",
    }
    truth = scored % 2 == 0  # whatever was given
    run.relabel(scored, truth, start=24)
    assert labels_of(run, 0, 24) == before
    taken = [run[i] for i in range(24, 100)]
    assert all((row["route_label"] == "forget") == (row["input_ids"][0] % 2 == 0) for row in taken)
    assert {row["input_ids"][0] for row in taken} == set(scored.tolist()), "those that were not asked about are out"
    assert set(self_labeled(rows(), 100).rows_to_score(100)) == set(range(20, 40))


def test_robust_rows_are_retain_rows_that_count_as_forget():
    run = self_labeled(rows(), 2000, labeled_first=0.2, forget_share=0.1, robust_share=0.5)
    run.relabel(run.rows_labeled("unlabeled"), np.zeros(20, dtype=bool), start=400)
    trained_as, truly = np.array(labels_of(run, 400, 2000)), run.labels[run._order[400:]]
    robust = (trained_as == "forget") & (truly == "retain")
    assert 0.45 < robust.sum() / (truly == "retain").sum() < 0.55
    assert (trained_as[truly == "forget"] == "forget").all()


def test_token_weights_let_shared_tokens_of_forget_rows_teach_the_base():
    """A position predicts the token after it; retain rows that teach the region alone give the base nothing."""
    found = Dataset.from_dict({"input_ids": [[0, 1, 2]] * 40, "route_label": rows()["route_label"]})
    run = self_labeled(
        found, 400, labeled_first=0.2, forget_share=0.5, robust_share=0.5, token_weights=torch.tensor([0.25, 0.5, 0.75])
    )
    run.relabel(run.rows_labeled("unlabeled"), np.arange(20) < 10, start=80)
    weights = {"forget": [0.5, 0.75, 0.0], "robust": [0.0] * 3, "retain": [1.0] * 3}
    kinds = set()
    for place in range(80, 400):
        row, truth = run[place], run.labels[run._order[place]]
        kinds.add(kind := truth if row["route_label"] == truth else "robust")
        assert row["route_weights"] == {"base": weights[kind]}
    assert kinds == {"forget", "robust", "retain"} and "route_weights" not in self_labeled(rows(), 100)[0]


def scoring(rows: list[int], is_forget: list, start: int) -> dict:
    return {"step": start, "start": start, "rows": rows, "is_forget": is_forget, "tokens": 7}


def test_restored_runs_are_the_same():
    """After two scorings, the second of which found other rows; and rows that were trained on before serve anew."""
    first, second = (self_labeled(rows(), 100, labeled_first=0.2, robust_share=0.3) for _ in range(2))
    at_first = [first[i] for i in range(100)]
    once = scoring(first.rows_to_score(20).tolist(), (np.arange(20) % 2 == 0).tolist(), 30)
    again = scoring(first.rows_to_score(15).tolist(), (np.arange(15) % 3 == 0).tolist(), 60)
    first.apply_scoring(once)
    between = [first[i] for i in range(30, 60)]
    first.apply_scoring(again)
    assert [first[i] for i in range(30, 60)] == between, "the second scoring leaves what is behind it"
    assert first.scored_tokens == 14 and len(first.found_rows) == 15
    second.restore({"self_labels": [once, again]})
    assert [first[i] for i in range(100)] == [second[i] for i in range(100)]
    second.restore({})
    assert [second[i] for i in range(100)] == at_first and second.scored_tokens == 0


def mixed_rows() -> Dataset:
    """Two documents in each unlabeled row, 0 after each; 1 is forget, 2 is retain, and the first of every row is cut off."""
    ids = [[1, 1, 1, 0], [2, 2, 2, 0], [1, 0, 2, 0], [2, 0, 1, 0], [1, 0, 2, 0]]
    sides = [["retain" if token == 2 else "forget" for token in row] for row in ids]
    return Dataset.from_dict({"input_ids": ids, "route_label": ["forget", "retain", *["unlabeled"] * 3], "side": sides})


def test_documents_of_one_kind_share_rows_once_they_were_told_apart():
    run = self_labeled(mixed_rows(), 40, labeled_first=0.5, forget_share=0.25, separator=0)
    assert len(run.found_rows) == 0 and set(labels_of(run, 20, 40)) == {"forget", "retain", "unlabeled"}
    run.relabel(np.array([2, 3, 4]), [[True, False], [False, True], [True, False]], start=20)
    new = [run.rows[int(i)] for i in run.found_rows]
    assert [row["input_ids"] for row in new] == [[1, 0, 1, 0], [2, 0, 2, 0]], "the third of each kind fills no row"
    assert new[0]["side"][0] == "forget" and {row["route_label"] for row in new} == {"unlabeled"}
    assert run.labels[run.found_rows].tolist() == ["forget", "retain"]
    taken = [run[i] for i in range(20, 40)]
    assert sum(row["route_label"] == "forget" for row in taken) == 5
    assert all((row["input_ids"][0] == 1) == (row["route_label"] == "forget") for row in taken)
    again = self_labeled(mixed_rows(), 40, labeled_first=0.5, forget_share=0.25, separator=0)
    found = scoring([2, 3, 4], [[True, False], [False, True], [True, False]], 20)
    again.restore({"self_labels": [found]})
    assert [again[i] for i in range(40)] == [run[i] for i in range(40)]
    before = [run[i] for i in range(20, 30)]
    run.relabel(np.array([2, 3, 4]), [[False, False], [False, True], [True, False]], start=30)
    assert [run[i] for i in range(20, 30)] == before, "their rows stay where they were"
    assert [run.rows[int(i)]["input_ids"] for i in run.found_rows] == [[1, 0, 1, 0], [1, 0, 2, 0], [2, 0, 2, 0]]
    second_scoring = scoring([2, 3, 4], [[False, False], [False, True], [True, False]], 30)
    again.restore({"self_labels": [found, second_scoring]})
    assert [again[i] for i in range(40)] == [run[i] for i in range(40)]


def test_where_all_is_labeled_there_are_no_documents_to_ask_about():
    labeled = mixed_rows().select([0, 1])
    run = self_labeled(labeled, 16, labeled_first=0.25, separator=0)
    assert len(run.rows_to_score(100)) == 0
    run.relabel(run.rows_to_score(100), [], start=4)
    assert len(run.found_rows) == 0 and set(labels_of(run, 4, 16)) == {"forget", "retain"}


def test_what_cannot_be_laid_out_anew_is_refused():
    whole = mixed_rows().remove_columns("side").add_column("side", ["forget"] * 5)
    with pytest.raises(ValueError, match="`separator` regroups documents, and 'side' has one value for a whole row"):
        self_labeled(whole, 40, separator=0)
    with pytest.raises(ValueError, match=r"`separator` needs packed rows of one length, got \[1, 2\] and more"):
        self_labeled(
            Dataset.from_dict({"input_ids": [[1], [1, 2]], "route_label": ["forget", "retain"]}), 40, separator=0
        )


def test_bad_arguments():
    with pytest.raises(ValueError, match="the data has only the labels"):
        self_labeled(rows(forget=0), 10)
    with pytest.raises(ValueError, match="`config` is a `SelfLabelConfig`, got 0.2"):
        SelfLabeledRows(rows(), 10, config=0.2)


def test_settings_by_keyword_still_work_and_warn():
    with pytest.warns(DeprecationWarning, match="labeled_first.*pass `config=SelfLabelConfig") as caught:
        run = SelfLabeledRows(rows(), 100, labeled_first=0.2)
    assert caught[0].filename == __file__ and run.config == SelfLabelConfig(labeled_first=0.2)


@pytest.mark.parametrize("overrule", [False, True])
def test_scored_and_reference_rows_are_drawn_from_all_over_the_data(overrule):
    """The first rows of a file may be of one kind; a draw of a part of them comes from the whole."""
    data = rows(400, 400, 400)
    run = self_labeled(data, 100, overrule=overrule)
    drawn = {"forget": run.rows_labeled("forget", 50), "retain": run.rows_labeled("retain", 50)}
    drawn["scored"] = run.rows_to_score(50)
    first, last = {"forget": (0, 400), "retain": (400, 800)}, {"scored": (0, 1200) if overrule else (800, 1200)}
    for name, (low, high) in (first | last).items():
        places = drawn[name]
        assert len(set(places.tolist())) == 50 and low <= places.min() and places.max() < high
        assert abs(places.mean() - (low + high) / 2) < (high - low) / 6, f"{name}: from all over"
        assert places.tolist() != sorted(places.tolist())
    again = self_labeled(data, 100, overrule=overrule)
    assert again.rows_to_score(50).tolist() == drawn["scored"].tolist(), "same seed, same rows"
    assert again.rows_to_score(80)[:50].tolist() == drawn["scored"].tolist(), "of which more are more of the same"
    other = SelfLabeledRows(data, 100, config=run.config, seed=1)
    assert other.rows_to_score(50).tolist() != drawn["scored"].tolist(), "another seed, others"
    assert other.rows_labeled("forget", 50).tolist() != drawn["forget"].tolist()


def test_rows_in_order_robust_rows_and_the_run_depend_on_the_seed():
    data = rows(40, 40, 40)
    runs = [SelfLabeledRows(data, 200, config=SelfLabelConfig(robust_share=0.5), seed=seed) for seed in (0, 0, 1)]
    for run in runs:
        run.relabel(np.arange(80, 120), np.arange(40) < 10, start=40)
    ids = [[run[i]["input_ids"][0] for i in range(200)] for run in runs]
    trained = [labels_of(run, 40, 200) for run in runs]
    assert ids[0] == ids[1] != ids[2] and ids[0][:30] != ids[2][:30] and trained[0] == trained[1] != trained[2]
    assert runs[0].in_order("input_ids") == [[i] for i in ids[0]]


def test_a_scored_token_takes_two_forward_passes():
    run = self_labeled(rows(), 100, labeled_first=0.2)
    assert run.forward_tokens == 0
    run.apply_scoring(scoring(run.rows_to_score(20).tolist(), [True] * 20, 30))
    run.apply_scoring(scoring(run.rows_to_score(10).tolist(), [True] * 10, 60))
    assert run.scored_tokens == 14 and run.forward_tokens == 28


def test_rows_of_documents_begin_as_the_trainers_tokenizer_does():
    tokenizer = train_tokenizer(["x"], vocab_size=258)
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    bos, eos = tokenizer.convert_tokens_to_ids(["<bos>", "<eos>"])
    post = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    tokenizer.backend_tokenizer.post_processor = post
    texts = {"forget": ["a" * 20], "retain": ["b" * 20], "unlabeled": ["c" * 9, "d" * 5, "e" * 9, "f" * 5] * 6}
    documents = [{"text": text, "route_label": label} for label, own in texts.items() for text in own]
    packed = pack(Dataset.from_list(documents), tokenizer, length=8)
    run = self_labeled(packed, 40, labeled_first=0.5, forget_share=0.25, separator=eos)
    routing = SimpleNamespace(routes=presets.sgtm("forget"))
    args = SimpleNamespace(train_sampling_strategy="sequential", dataloader_num_workers=0)
    run.callback(SimpleNamespace(routing=routing, args=args, processing_class=tokenizer))
    scored = run.rows_labeled("unlabeled")
    ends = [row["input_ids"][:-1].count(eos) + 1 for row in packed.select(scored)]
    run.relabel(scored, [[i % 2 == 0 for i in range(count)] for count in ends], start=20)
    assert len(run.found_rows) > 5
    for row in (run.rows[int(i)] for i in run.found_rows):
        assert row["input_ids"][0] == bos and row["labels"][0] == -100 and len(row["labels"]) == 8


TOPICS = ["bio", "cyber"]


def of_topics(separator=None, data: Dataset | None = None, **settings) -> SelfLabeledRows:
    labels = ["bio"] * 10 + ["cyber"] * 30 + ["core"] * 20 + ["unlabeled"] * 60
    data = data or Dataset.from_dict({"input_ids": [[i] for i in range(120)], "route_label": labels})
    config = SelfLabelConfig(labeled_first=0.2, **settings)
    return SelfLabeledRows(data, 400, config=config, separator=separator, regions=TOPICS, core="core")


def test_several_regions_part_the_share_of_forget_rows():
    run = of_topics(first_forget_share=0.5, forget_share=0.2)
    first = Counter(labels_of(run, 0, 80))
    assert first == {"bio": 10, "cyber": 30, "core": 40}
    names = ["bio"] * 15 + ["cyber"] * 5 + ["core"] * 40
    run.relabel(run.rows_labeled("unlabeled"), names, start=100)
    after = Counter(labels_of(run, 100, 400))  # 25 rows of biology, and 35 of the other topic
    assert after == {"bio": 25, "cyber": 35, "core": 240}
    truth = dict(zip(run.rows_labeled("unlabeled").tolist(), names, strict=True))
    taken = {row["input_ids"][0]: row["route_label"] for row in (run[i] for i in range(100, 400))}
    assert all(taken[number] == label for number, label in truth.items() if number in taken)


def test_several_regions_are_restored_and_cost_a_pass_each():
    first, second = of_topics(), of_topics()
    names = ["cyber", "core", "bio", "core"] * 15
    found = {"step": 9, "start": 100, "rows": first.rows_labeled("unlabeled").tolist(), "labels": names, "tokens": 7}
    first.apply_scoring(found)
    second.restore({"self_labels": [found]})
    assert [first[i] for i in range(400)] == [second[i] for i in range(400)]
    assert first.scored_tokens == 7 and first.forward_tokens == 3 * 7


def test_documents_of_several_regions_share_rows_with_their_own():
    ids = [[1, 1, 1, 0], [2, 2, 2, 0], [3, 3, 3, 0], [1, 0, 2, 0], [3, 0, 1, 0], [2, 0, 3, 0]]
    data = Dataset.from_dict({"input_ids": ids, "route_label": ["bio", "cyber", "core", *["unlabeled"] * 3]})
    run = of_topics(separator=0, data=data, forget_share=0.5)
    run.relabel(np.array([3, 4, 5]), [["bio", "cyber"], ["core", "bio"], ["cyber", "core"]], start=100)
    new = [run.rows[int(i)]["input_ids"] for i in run.found_rows]
    assert new == [[1, 0, 1, 0], [2, 0, 2, 0], [3, 0, 3, 0]]
    assert run.labels[run.found_rows].tolist() == ["bio", "cyber", "core"]


def test_settings_of_one_region_are_refused_for_several():
    with pytest.raises(ValueError, match="`robust_share` and `token_weights` are for one region.*set `robust`"):
        of_topics(robust_share=0.1)
    with pytest.raises(ValueError, match="`labeled_first` needs rows labeled bio, cyber and rows labeled otherwise"):
        of_topics(data=Dataset.from_dict({"input_ids": [[1]] * 2, "route_label": ["bio", "core"]}))
    routing = SimpleNamespace(routes=presets.gram(TOPICS), regions=["bio"])
    with pytest.raises(ValueError, match=r"`regions` names \['cyber'\], and the model has \['bio'\]"):
        of_topics().callback(SimpleNamespace(routing=routing))
    routing = SimpleNamespace(routes=presets.gram(["bio"]), regions=TOPICS)
    with pytest.raises(ValueError, match=r"need routes for 'bio', 'cyber', 'core' and 'unlabeled'; \['cyber'\] have"):
        of_topics().callback(SimpleNamespace(routing=routing))
