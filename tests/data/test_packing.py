from __future__ import annotations

from collections import Counter

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from routed_peft.data import check_route_columns, pack, train_tokenizer
from routed_peft.data.beginnings import begin_tokens, document_tokens

TOKENIZER = train_tokenizer(["x"], vocab_size=258)  # one token a byte
LETTERS = {
    ("forget", "forget"): "a",
    ("retain", "forget"): "b",
    ("retain", "retain"): "c",
    ("unlabeled", "retain"): "d",
}


def documents(lengths):
    rows = [
        {"text": LETTERS[key] * length, "route_label": key[0], "side": key[1]}
        for key, sizes in lengths.items()
        for length in sizes
    ]
    return Dataset.from_list(rows)


sizes = st.lists(st.integers(1, 9), min_size=6, max_size=20)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.fixed_dictionaries({key: sizes for key in LETTERS}), length=st.integers(1, 11), seed=st.integers(0, 5)
)
def test_nothing_is_lost_but_tails_and_labels_never_mix(lengths, length, seed):
    rows = pack(documents(lengths), TOKENIZER, length=length, seed=seed)
    counts = Counter((row["route_label"], row["side"]) for row in rows)
    kept: Counter[tuple[str, str]] = Counter()
    for row in rows:
        key = row["route_label"], row["side"]
        letter, eos = TOKENIZER.convert_tokens_to_ids(LETTERS[key]), TOKENIZER.eos_token_id
        assert len(row["input_ids"]) == length
        assert set(row["input_ids"]) <= {letter, eos}, "a row mixes labels"
        kept[key] += row["input_ids"].count(letter)
    for key, documents_of in lengths.items():
        total = sum(documents_of) + len(documents_of)
        assert counts[key] == total // length
        assert sum(documents_of) - kept[key] <= total % length


def test_every_document_is_followed_by_an_end_of_sequence_token():
    ds = Dataset.from_dict({"text": ["ab", "c", "def"], "route_label": ["retain"] * 3})
    (row,) = pack(ds, TOKENIZER, length=9)["input_ids"]
    text = TOKENIZER.decode(row)
    assert text.endswith("<eos>") and sorted(text.split("<eos>")) == ["", "ab", "c", "def"]


def test_the_seed_decides_the_order_of_documents_and_rows():
    ds = documents({("forget", "forget"): [3] * 40, ("retain", "retain"): [3] * 40})
    ds = ds.remove_columns("text").add_column("text", [chr(33 + i) * 3 for i in range(80)])
    first, again, other = (pack(ds, TOKENIZER, length=8, seed=seed) for seed in (1, 1, 2))
    assert first["input_ids"][:] == again["input_ids"][:] != other["input_ids"][:]
    labels = first["route_label"][:]
    assert labels != sorted(labels) and Counter(labels) == {"forget": 20, "retain": 20}


def test_columns_are_kept_with_their_features_and_others_dropped():
    features = Features(
        {"text": Value("string"), "route_label": ClassLabel(names=["retain", "forget"]), "id": Value("int64")}
    )
    ds = Dataset.from_dict({"text": ["aaa", "bbb"], "route_label": [1, 0], "id": [1, 2]}, features=features)
    rows = pack(ds, TOKENIZER, length=2)
    assert rows.column_names == ["input_ids", "route_label"] and rows.features["route_label"] == features["route_label"]
    assert check_route_columns(rows, {"forget": ..., "retain": ...}) == {"forget": 2, "retain": 2}
    assert pack(ds, TOKENIZER, length=2, by=["id"]).column_names == ["input_ids", "id"]
    assert pack(ds.select_columns(["text"]), TOKENIZER, length=8).column_names == ["input_ids"]


def test_a_small_group_within_a_label_is_a_tail():
    ds = documents({("retain", "forget"): [1], ("retain", "retain"): [9]})
    assert pack(ds, TOKENIZER, length=5)["side"][:] == ["retain", "retain"]


ONE = Dataset.from_dict({"text": ["aaaa", "b"], "route_label": ["retain", "forget"]})
BAD = {
    "a label without a row": (ONE, {"length": 5}, r"`route_label` in \['forget'\] do not fill one row of 5"),
    "nothing fills a row": (ONE.select_columns(["text"]), {"length": 50}, "the documents of the dataset do not fill"),
    "length": (ONE, {"length": 0}, "`length` of at least 1"),
    "by": (ONE, {"length": 2, "by": ["side"]}, r"lacks the columns \['side'\]"),
    "text": (ONE, {"length": 2, "column": "body"}, r"lacks the columns \['body'\]"),
    "null label": (Dataset.from_dict({"text": ["a"] * 2, "route_label": ["x", None]}), {"length": 1}, "nulls"),
    "null text": (Dataset.from_dict({"text": ["a", None]}), {"length": 1}, "`text` has nulls"),
    "token labels": (ONE.add_column("route_labels", [["a"]] * 2), {"length": 1}, r"cannot carry \['route_labels'\]"),
    "no rows": (ONE.select([]), {"length": 1}, "no rows"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_raises(case):
    ds, arguments, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        pack(ds, TOKENIZER, **arguments)


def test_a_row_that_mixes_keeps_what_each_of_its_tokens_is():
    texts = ["a", "b b b b b b", "c c c c c c", "d"]
    ds = Dataset.from_dict({"text": texts, "side": ["retain", "forget", "retain", "forget"], "route_label": ["x"] * 4})
    tokenizer = train_tokenizer(texts, vocab_size=262)
    rows = pack(ds, tokenizer, length=4, by=["route_label"], per_token=["side"])
    same = pack(ds.remove_columns("side"), tokenizer, length=4, by=["route_label"])
    assert rows["input_ids"][:] == same["input_ids"][:] and rows.column_names == ["input_ids", "route_label", "side"]
    letters = {"forget": "bd", "retain": "ac"}
    seen = set()
    for row in rows:
        for token, side in zip(row["input_ids"], row["side"], strict=True):
            word = tokenizer.decode([token]).strip()
            seen.add((side, word in letters[side] if word in {*"abcd"} else None))
    assert seen == {("forget", True), ("retain", True), ("forget", None), ("retain", None)}


def beginning_tokenizer(template="<bos> $A", **special):
    """A tokenizer of one token a byte that begins texts, as Gemma's and Llama's do."""
    tokenizer = train_tokenizer(["x"], vocab_size=258)
    tokenizer.add_special_tokens({"bos_token": "<bos>", "additional_special_tokens": ["<go>"]} | special)
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<bos>", "<eos>", "<go>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=ids)
    return tokenizer


TEMPLATES = {"<bos> $A": ["<bos>"], "<bos> $A <eos>": ["<bos>"], "<go> <bos> $A": ["<go>", "<bos>"], "$A <eos>": []}


@pytest.mark.parametrize("template", TEMPLATES)
def test_documents_begin_as_the_tokenizer_begins_them(template):
    tokenizer = beginning_tokenizer(template)
    begin = tokenizer.convert_tokens_to_ids(TEMPLATES[template])
    assert begin_tokens(tokenizer) == begin
    spelled = "".join(TEMPLATES[template]) + "ab"
    assert document_tokens(tokenizer, ["ab", spelled]) == [tokenizer.encode("ab", add_special_tokens=False)] * 2
    (row,) = pack(Dataset.from_dict({"text": [spelled]}), tokenizer, length=len(begin) + 3)
    assert row["input_ids"] == [*begin, *tokenizer.encode("ab", add_special_tokens=False), tokenizer.eos_token_id]


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=3, max_size=12), length=st.integers(4, 12), two=st.booleans())
def test_every_row_begins_and_no_beginning_has_a_loss(lengths, length, two):
    tokenizer = beginning_tokenizer("<go> <bos> $A" if two else "<bos> $A")
    begin, eos = begin_tokens(tokenizer), tokenizer.eos_token_id
    ds = Dataset.from_dict({"text": [chr(97 + i) * n for i, n in enumerate(lengths)], "of": list(range(len(lengths)))})
    if sum(lengths) < 3 * length:
        return
    rows = pack(ds, tokenizer, length=length, per_token=["of"])
    seen = Counter()
    for row in rows:
        ids, labels = row["input_ids"], row["labels"]
        assert len(ids) == len(labels) == len(row["of"]) == length and ids[: len(begin)] == begin
        assert all(label in (-100, token) and (label == -100 or token not in begin)
                   for token, label in zip(ids, labels, strict=True))  # fmt: skip
        assert -100 not in [label for token, label in zip(ids[len(begin) + 1 :], labels[len(begin) + 1 :], strict=True)
                            if token not in begin]  # fmt: skip
        real = [(token, of) for token, of in zip(ids, row["of"], strict=True) if token not in (*begin, eos)]
        assert all(tokenizer.decode([token]) == chr(97 + of) for token, of in real)
        seen.update(token for token, _ in real)
    for i, n in enumerate(lengths):
        assert seen[tokenizer.convert_tokens_to_ids(chr(97 + i))] <= n, "a token is in two rows"
    lost = sum(lengths) - sum(seen.values())
    assert lost <= length, "only the tail is dropped"


def test_the_first_token_of_a_document_is_predicted_from_its_beginning():
    tokenizer = beginning_tokenizer()
    a, bos, eos = tokenizer.convert_tokens_to_ids(["a", "<bos>", "<eos>"])
    rows = pack(Dataset.from_dict({"text": ["aaaaaa"] * 2}), tokenizer, length=4)
    found = sorted(zip(map(tuple, rows["input_ids"]), map(tuple, rows["labels"]), strict=True))
    begins, goes_on, ends = (bos, a, a, a), (-100, -100, a, a), (bos, a, a, eos)
    assert found == sorted(
        [
            (begins, (-100, a, a, a)),
            (begins, goes_on),
            ((bos, eos, bos, a), (-100, -100, -100, a)),
            (begins, goes_on),
            (ends, (-100, -100, a, eos)),
        ]
    )


def test_a_row_must_have_room_for_more_than_its_beginning():
    with pytest.raises(ValueError, match="begins texts with '<bos>', so `length` must be at least 3"):
        pack(ONE, beginning_tokenizer(), length=2)
