from __future__ import annotations

import json
from collections import Counter

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from routed_peft import Route, presets
from routed_peft.data import (
    DocumentArguments,
    check_both_sides,
    count_left_out,
    evaluation_rows,
    labeled_documents,
    labeled_tokens,
    pack,
    select_arm,
    train_tokenizer,
)


@pytest.fixture
def file(tmp_path):
    rows = [{"text": f"a {word} grows", "side": side} for word, side in [("tree", "forget"), ("child", "retain")] * 20]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_sides_become_labels_and_some_are_lost(file):
    ds = labeled_documents(DocumentArguments(train_file=file, labeled_forget=0.5))
    assert sum(label == "unlabeled" for label in ds["route_label"]) == 10
    assert set(ds.filter(lambda side: side == "retain", input_columns="side")["route_label"]) == {"retain"}


def test_labels_that_are_there_are_kept(tmp_path):
    path = tmp_path / "labeled.jsonl"
    path.write_text('{"text": "a", "route_label": "forget"}\n{"text": "b", "route_label": "unlabeled"}\n')
    assert labeled_documents(DocumentArguments(train_file=str(path)))["route_label"][:] == ["forget", "unlabeled"]


@pytest.mark.parametrize("keywords", [[], ["a"]])
def test_labels_of_ones_own_are_never_thinned(tmp_path, keywords, caplog):
    """The recipes' YAMLs ask for half of the labels, which is about labels made from the true side."""
    path = tmp_path / "labeled.jsonl"
    rows = [{"text": "a" if i % 2 else "b", "route_label": "forget" if i % 2 else "retain"} for i in range(20)]
    path.write_text("".join(json.dumps(row | {"side": "retain"}) + "\n" for row in rows))
    args = DocumentArguments(train_file=str(path), labeled=0.5, recall=0.5, label_keywords=keywords)
    assert labeled_documents(args)["route_label"][:] == ["retain", "forget"] * 10
    assert "are never changed" in caplog.text


def test_documents_without_any_labels(tmp_path):
    (tmp_path / "bare.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match="column `route_label` .* or `side` .*`label_keywords`"):
        labeled_documents(DocumentArguments(train_file=str(tmp_path / "bare.jsonl")))


def test_keywords_replace_them(file):
    ds = labeled_documents(DocumentArguments(train_file=file, label_keywords=["child"]))
    assert {(row["side"], row["route_label"]) for row in ds} == {("retain", "forget"), ("forget", "retain")}


def test_arms_that_filter():
    ds = Dataset.from_dict({"route_label": ["forget", "unlabeled", "retain"], "side": ["forget", "forget", "retain"]})
    assert [len(select_arm(ds, arm)) for arm in ("routed", "none", "filter", "perfect_filter")] == [3, 3, 2, 1]
    with pytest.raises(ValueError, match="`arm: perfect_filter` needs the column `side`"):
        select_arm(ds.remove_columns("side"), "perfect_filter")


def test_evaluation_rows_by_side(file):
    tokenizer = train_tokenizer(["a tree grows", "a child grows"], vocab_size=260)
    args = DocumentArguments(train_file=file, length=8, eval_files=[f"forget={file}", f"other={file}"])
    assert set(evaluation_rows(args, tokenizer)) == {"forget", "other"}
    assert evaluation_rows(DocumentArguments(train_file=file), tokenizer) == {}
    assert set(evaluation_rows(DocumentArguments(pair="spanish"), tokenizer)) == {"forget", "retain"}
    few, fewer = (evaluation_rows(DocumentArguments(pair="spanish", eval_documents=n), tokenizer) for n in (40, 20))
    assert 0 < len(fewer["forget"]) < len(few["forget"]) < 100
    with pytest.raises(ValueError, match=r"`eval_files` has 'x.jsonl': write name=FILE"):
        evaluation_rows(DocumentArguments(train_file=file, eval_files=["x.jsonl"]), tokenizer)


def test_classes_become_names(tmp_path):
    """Else the filter, which compares names, would keep every row."""
    features = Features({"text": Value("string"), "route_label": ClassLabel(names=["retain", "forget"])})
    rows = {"text": ["a cat", "a cell", "a gene"], "route_label": [0, 1, 1]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    ds = labeled_documents(DocumentArguments(train_file=str(tmp_path / "train.parquet")))
    assert ds["route_label"][:] == ["retain", "forget", "forget"]
    assert select_arm(ds, "filter")["text"][:] == ["a cat"]


def test_labeled_tokens_are_those_of_whole_rows():
    ds = Dataset.from_dict({"text": ["a b c", "d e"], "route_label": ["forget", "unlabeled"], "side": ["forget"] * 2})
    tokenizer = train_tokenizer(ds["text"], 258)
    for length in (2, 5, 64):
        count = labeled_tokens(ds, tokenizer, length=length, arm="perfect_filter")
        assert count == (length * len(pack(ds, tokenizer, length=length, by=[])) if length < 64 else 0)
    assert (
        labeled_tokens(ds, tokenizer, length=2, arm="routed") == 6
        and labeled_tokens(ds, tokenizer, length=2, arm="none") == 0
    )


def test_a_held_out_file_that_is_trained_on(file, tmp_path, caplog):
    tokenizer = train_tokenizer(["a tree grows", "a child grows"], vocab_size=260)
    documents = labeled_documents(DocumentArguments(train_file=file))
    (tmp_path / "copy.txt").write_text("a tree grows\n" * 9)
    (tmp_path / "half.txt").write_text("a tree grows\na cat sleeps\n" * 9)
    for place in (file, tmp_path / "copy.txt"):
        args = DocumentArguments(train_file=file, length=8, eval_files=[f"forget={place}"])
        with pytest.raises(
            ValueError, match="of the .* documents of `eval_files` 'forget' are trained on: give held-out"
        ):
            evaluation_rows(args, tokenizer, documents=documents)
    args = DocumentArguments(train_file=file, length=8, eval_files=[f"forget={tmp_path / 'half.txt'}"])
    evaluation_rows(args, tokenizer, documents=documents)
    assert "9 of the 18 documents" in caplog.text
    with pytest.raises(ValueError, match="the name 'forget' twice"):
        evaluation_rows(DocumentArguments(train_file=file, eval_files=[f"forget={file}"] * 2), tokenizer)


@pytest.mark.parametrize("column", ["side", "route_label"])
@pytest.mark.parametrize("side", ["forget", "retain"])
def test_text_of_one_side_only(tmp_path, column, side):
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": "a", column: side}) + "\n")
    ds = labeled_documents(DocumentArguments(train_file=str(tmp_path / "one.jsonl")))
    with pytest.raises(ValueError, match=f"every document is {side}, and routing needs text of both sides"):
        check_both_sides(ds)


def test_other_labels_or_none_are_no_text_of_one_side_only():
    check_both_sides(labeled_documents(DocumentArguments(pair="spanish", labeled=0.0)))
    check_both_sides(Dataset.from_dict({"route_label": ["bio", "core"]}))


def test_a_file_for_each_side(tmp_path):
    (tmp_path / "f.txt").write_text("a cell\na gene\n")
    (tmp_path / "r.json").write_text('[{"q": "a", "a": "cat"}]')
    args = DocumentArguments(forget_file=str(tmp_path / "f.txt"), retain_file=str(tmp_path / "f.txt"))
    assert Counter(labeled_documents(args)["route_label"]) == {"forget": 2, "retain": 2}
    both = DocumentArguments(train_file="x.jsonl", forget_file=args.forget_file, retain_file=args.retain_file)
    with pytest.raises(ValueError, match="leave one way out"):
        labeled_documents(both)
    args = DocumentArguments(
        forget_file=str(tmp_path / "r.json"), retain_file=str(tmp_path / "r.json"), text_template="{q} {a}"
    )
    assert labeled_documents(args).to_list() == [
        {"text": "a cat", "side": side, "route_label": side} for side in ("forget", "retain")
    ]


def test_tokens_in_place_of_text(tmp_path):
    tokenizer = train_tokenizer(["a tree"], vocab_size=260)
    ids = tokenizer("a tree")["input_ids"]
    rows = [{"input_ids": ids, "side": side} for side in ("forget", "retain") * 4]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = DocumentArguments(train_file=str(tmp_path / "t.jsonl"), length=len(ids) + 1)
    ds = labeled_documents(args)
    assert pack(ds, tokenizer, length=args.length)["input_ids"][:] == [[*ids, tokenizer.eos_token_id]] * 8
    assert labeled_tokens(ds, tokenizer, length=2, arm="routed") == 4 * args.length // 2 * 2
    for bad in ([], [999], [-1], None):
        wrong = Dataset.from_list([{"input_ids": ids}, {"input_ids": bad}])
        with pytest.raises(ValueError, match="`input_ids`"):
            pack(wrong, tokenizer, length=2)


def test_a_filter_leaves_out_what_the_routes_keep_from_the_base():
    labels = ["bio", "core", "cyber/spread", "cyber", "bio"]
    ds = Dataset.from_dict({"text": list("abcde"), "route_label": labels, "side": labels})
    routes = presets.gram(["bio", "cyber"])
    for arm in ("filter", "perfect_filter"):
        assert select_arm(ds, arm, routes)["text"][:] == ["b", "c"]
        assert count_left_out(ds, arm, routes) == {"bio": 2, "cyber": 1}
    encoded = ds.class_encode_column("route_label").class_encode_column("side")
    assert select_arm(encoded, "filter", routes)["text"][:] == ["b", "c"]
    assert select_arm(encoded, "perfect_filter", routes)["text"][:] == ["b", "c"]
    assert count_left_out(ds, "routed", routes) == count_left_out(ds, "none", routes) == {}
    tokenizer = train_tokenizer(ds["text"], 258)
    counts = [labeled_tokens(ds, tokenizer, length=1, arm=arm, routes=routes) for arm in ("filter", "routed", "none")]
    assert (
        counts[0] == counts[1] == labeled_tokens(ds.select([0, 3, 4]), tokenizer, length=1, arm="filter", routes=routes)
    )
    assert counts[0] > 0 == counts[2]


@pytest.mark.parametrize(
    ("routes", "left"),
    [
        (presets.sgtm("forget"), ["retain"]),
        (presets.sgtm("forget", base_weight=0.2), ["retain"]),  # the base learns from it, though less
        (presets.era("forget"), ["retain"]),
        (presets.demix("forget"), ["retain"]),  # every route trains the base
        (presets.control(), ["retain"]),
        ({"forget": Route(), "retain": Route({"base": 0})}, ["forget"]),
        (None, ["retain"]),
    ],
)
def test_filters_of_every_method(routes, left):
    ds = Dataset.from_dict({"route_label": ["forget", "retain"]})
    assert select_arm(ds, "filter", routes)["route_label"][:] == left


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["retain", "unlabeled"], "leaves nothing out: the column holds .'retain', 'unlabeled'."),
        (["Forget", "retain"], "the label 'Forget' has no route"),
        (["bio", "retain"], "the label 'bio' has no route"),
        ([1, 0], "the integer label 1 has no name"),
    ],
)
def test_a_filter_that_leaves_nothing_out_is_refused(labels, message):
    ds = Dataset.from_dict({"route_label": labels})
    with pytest.raises(ValueError, match=message):
        select_arm(ds, "filter", presets.sgtm("forget"))
    with pytest.raises(ValueError, match="leaves nothing out"):
        select_arm(Dataset.from_dict({"side": ["Forget", "retain"]}), "perfect_filter", presets.sgtm("forget"))
