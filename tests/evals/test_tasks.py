import gzip
import json
import math
from pathlib import Path

import pytest
import yaml
from evaluation_parts import TEXTS, byte_tokenizer, tiny_llama, token_loss, write_jsonl

from routed_peft.tasks import path, utils

pytest.importorskip("lm_eval")
from lm_eval.tasks import TaskManager  # noqa: E402

DATA_TASKS = sorted(p.stem for p in Path(path()).glob("routed_*_*.yaml"))
GROUPS = {"routed_loss": 2, "routed_mc": 2, "routed_cloze": 4}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.mark.slow
def test_every_task_loads_with_packaged_data(tokenizer):
    manager = TaskManager(include_path=path(), include_defaults=False, metadata={"tokenizer": tokenizer, "limit": 3})
    assert sorted(manager.all_subtasks) == DATA_TASKS
    assert manager.all_groups == sorted([*GROUPS, "routed_wmdp"])
    loaded = manager.load(DATA_TASKS)["tasks"]
    for name in DATA_TASKS:
        assert len(loaded[name].test_docs()) == 3, name
    for group, size in GROUPS.items():
        assert len(manager.load(group)["tasks"]) == size


def test_the_groups_name_tasks_that_lm_eval_has():
    """lm-eval's own index takes 15 s to build; the files of the tasks named tell the same."""
    import lm_eval.tasks

    members = yaml.safe_load(Path(path(), "routed_wmdp.yaml").read_text())["task"]
    shelf = Path(lm_eval.tasks.__file__).parent
    files = [*shelf.glob("wmdp/*.yaml"), *shelf.glob("mmlu/default/_mmlu.yaml")]
    names = {config.get("task", "") if isinstance(config.get("task"), str) else "" for config in map(_plain, files)}
    assert set(members) <= names | {config.get("group") for config in map(_plain, files)}


def _plain(file):
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(file, resolve_func=False)


@pytest.mark.parametrize("side", ["forget", "retain", "adjacent"])
def test_packaged_questions_are_balanced_and_small(side):
    file = utils.PACKAGED / f"{side}_mc.jsonl"
    rows = utils.read_rows(file, "file")
    answers = [row["answer"] for row in rows]
    assert [answers.count(letter) for letter in range(4)] == [100] * 4
    assert all(len(set(row["choices"])) == 4 for row in rows)
    assert sum(p.stat().st_size for p in utils.PACKAGED.iterdir()) < 400_000


@pytest.mark.slow
def test_default_loss_text_is_held_out_and_on_its_side(tokenizer):
    from routed_peft.corpora import load_pair

    train = set(load_pair("biology", split="train")["text"])
    some = {"tokenizer": tokenizer, "limit": 300}
    tests = {side: utils.loss_documents(side, **some)["test"]["text"] for side in ("forget", "retain")}
    assert not set(tests["forget"]) & set(tests["retain"])
    for texts in tests.values():
        # a few glosses stand in the corpus more than once, word for word
        assert sum(text in train for text in texts) < 0.02 * len(texts)


def test_files_and_limit_come_from_metadata(tmp_path, tokenizer):
    file = write_jsonl(tmp_path / "f.jsonl", [{"text": text} for text in TEXTS])
    rows = utils.loss_documents("forget", tokenizer=tokenizer, forget_file=file, limit=2)["test"]
    assert rows["text"] == TEXTS[:2]
    assert rows["n_tokens"] == [len(tokenizer.encode(text)) for text in TEXTS[:2]]
    squeezed = tmp_path / "f.jsonl.gz"
    squeezed.write_bytes(gzip.compress(Path(file).read_bytes()))
    again = utils.loss_documents("forget", tokenizer=tokenizer, forget_file=str(squeezed))["test"]
    assert again["text"][:] == TEXTS


def test_tokens_are_counted_as_lm_eval_scores_them(tmp_path):
    from lm_eval.models.huggingface import HFLM

    texts = [*TEXTS, "<s>begun already"]
    for adds_bos in (False, True):
        tokenizer = byte_tokenizer(adds_bos)
        tokenizer.save_pretrained(tmp_path / str(adds_bos))
        for add_bos_token in (None, False, True):
            lm = HFLM(pretrained=tiny_llama(), tokenizer=tokenizer, add_bos_token=add_bos_token)
            metadata = {"pretrained": str(tmp_path / str(adds_bos))}
            metadata |= {} if add_bos_token is None else {"add_bos_token": add_bos_token}
            counted = utils.count_tokens(utils.load_tokenizer(metadata), texts, metadata)
            assert counted == [len(lm.tok_encode(text)) for text in texts]


@pytest.mark.slow
def test_stock_lm_eval_gives_the_loss_of_plain_torch(tmp_path, tokenizer):
    """No code of ours but the task files: unequal lengths, token-weighted."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model = tiny_llama()
    file = write_jsonl(tmp_path / "f.jsonl", [{"text": text} for text in TEXTS])
    manager = TaskManager(
        include_path=path(), include_defaults=False, metadata={"tokenizer": tokenizer, "forget_file": file}
    )
    results = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2),
        tasks=["routed_forget_loss"],
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=False,
    )["results"]["routed_forget_loss"]
    loss, n_tokens = token_loss(model.eval(), tokenizer, TEXTS)
    assert results["token_ce,none"] == pytest.approx(loss, rel=1e-6)
    n_bytes = sum(len(text.encode()) for text in TEXTS)
    assert results["bits_per_byte,none"] == pytest.approx(loss * n_tokens / n_bytes / math.log(2), rel=1e-6)
    unweighted = sum(token_loss(model, tokenizer, [text])[0] for text in TEXTS) / len(TEXTS)
    assert abs(unweighted - loss) > 1e-3


GOOD = {"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 1}


@pytest.mark.parametrize(
    "row",
    [
        {**GOOD, "choices": ["a", "b"]},
        {**GOOD, "answer": 4},
        {**GOOD, "answer": "B"},
        {**GOOD, "question": None},
        {"text": "no question"},
    ],
)
def test_a_bad_question_is_named(tmp_path, row):
    file = write_jsonl(tmp_path / "q.jsonl", [GOOD, row])
    with pytest.raises(ValueError, match=r"`retain_mc_file` .* in row 2"):
        utils.questions("retain", retain_mc_file=file)


@pytest.mark.parametrize("text", [None, "", "  ", 3])
def test_a_row_without_text_is_named(tmp_path, tokenizer, text):
    file = write_jsonl(tmp_path / "t.jsonl", [{"text": "fine"}, {"text": text}])
    with pytest.raises(ValueError, match=r"`forget_file` .* in row 2"):
        utils.loss_documents("forget", tokenizer=tokenizer, forget_file=file)


def test_bad_files_and_no_tokenizer(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\nnot json\n')
    (tmp_path / "list.jsonl").write_text(json.dumps(["a"]) + "\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    for name in ("missing", "bad", "list", "empty"):
        with pytest.raises(ValueError, match="`forget_file` must"):
            utils.loss_documents("forget", tokenizer="unused", forget_file=tmp_path / f"{name}.jsonl")
    file = write_jsonl(tmp_path / "t.jsonl", [{"text": "fine"}])
    with pytest.raises(ValueError, match="`tokenizer`"):
        utils.loss_documents("forget", forget_file=file)
