"""Bad inputs of the command line: each ends in one line, none in a traceback."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_parts import call
from evaluation_parts import byte_tokenizer, tiny_llama, write_jsonl

from routed_peft import ablate

GONE = object()
ODD = [GONE, None, -3, 1.5, "x", "[/x]", "\ud800", [], {}, [1], [None], {"a": 1}, True, float("nan"), 10**30]
RAW = [b"", b"[]", b"null", b"\xff\xfe", b"{", b'{"a": 1}', b'"x"', b"[" * 5000, b"NaN"]


def places(data: Any, before: tuple = ()) -> Iterator[tuple]:
    """Yield the path to every entry of an object that is up to three levels deep, and to the first item of a list."""
    items = data.items() if isinstance(data, dict) else enumerate(data[:1]) if isinstance(data, list) else ()
    for key, value in items:
        yield (*before, key)
        if len(before) < 2:
            yield from places(value, (*before, key))


def changed(data: Any, place: tuple, value: Any) -> Any:
    data = copy.deepcopy(data)
    inner = data
    for key in place[:-1]:
        inner = inner[key]
    if value is GONE:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return data


def fails_in_one_line(*arguments: object) -> str:
    """Run a command; assert that it succeeds, names problems, or ends in one line that expects the mistake."""
    result = call(*arguments)
    told = f"{arguments}: {result.output[-2000:]} {result.exception!r}"
    assert result.exception is None or isinstance(result.exception, SystemExit), told
    assert "Traceback" not in result.output and "unexpected " not in result.stderr, told
    if result.exit_code == 1:
        lines = [line for line in result.stderr.splitlines() if line.startswith(("routed-peft: ", "problem: "))]
        assert lines, told
    return result.stderr


@pytest.fixture(scope="module")
def plain(run, tmp_path_factory) -> Path:
    return ablate(run, tmp_path_factory.mktemp("plain") / "plain")


@pytest.mark.slow
@pytest.mark.parametrize("file", ["routing.json", "bio/region.json", "bio/adapter_config.json", "ablation.json"])
def test_odd_values_in_every_entry_of_a_record(run, plain, tmp_path, file):
    source = shutil.copytree(plain if file == "ablation.json" else run, tmp_path / "source")
    data, count = json.loads((source / file).read_text()), 0
    for place in places(data):
        for value in ODD:
            (source / file).write_text(json.dumps(changed(data, place, value)))
            fails_in_one_line("inspect", source)
            count += 1
    assert count > 50


@pytest.mark.slow
@pytest.mark.parametrize("content", RAW)
@pytest.mark.parametrize("file", ["routing.json", "bio/region.json", "bio/adapter_config.json", "config.json",
                                  "model.safetensors", "bio/adapter_model.safetensors", "tokenizer.json"])  # fmt: skip
def test_a_file_that_is_something_else(run, tmp_path, file, content):
    source = shutil.copytree(run, tmp_path / "source")
    (source / file).write_bytes(content)
    assert fails_in_one_line("inspect", source), "it is noticed"
    fails_in_one_line("ablate", source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_a_plain_checkpoint_with_a_file_that_is_something_else(plain, tmp_path, file):
    pytest.importorskip("lm_eval")
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "a b c d"}\n')
    for content in RAW:
        source = shutil.copytree(plain, tmp_path / "source", dirs_exist_ok=True)
        (source / "ablation.json").unlink()
        (source / file).write_bytes(content)
        fails_in_one_line("undo", source, tmp_path / "out", "--text", text, "--steps", 1, "--length", 4, "--cpu")
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_a_file_for_a_directory_and_a_directory_for_a_file(run, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    nested = shutil.copytree(run, tmp_path / "nested")
    (nested / "config.json").unlink()
    (nested / "config.json").mkdir()
    for command in (
        ["inspect", tmp_path / "file"],
        ["inspect", tmp_path / "folder"],
        ["inspect", nested],
        ["inspect", "x" * 5000],
        ["inspect", "a\udcffb"],
        ["inspect", "\0"],
        ["inspect", ""],
        ["ablate", nested, tmp_path / "out"],
        ["ablate", run, tmp_path / "file"],
        ["ablate", run, tmp_path / "file" / "below"],
        ["ablate", run, tmp_path / "out", "--keep", "[/x]"],
        ["ablate", run, tmp_path / "out", "--keep", "\udcff"],
        ["report", tmp_path / "file"],
        ["report", tmp_path / "folder"],
        ["report", tmp_path / "folder", "--out", tmp_path / "file"],
    ):
        assert fails_in_one_line(*command), command
    assert (tmp_path / "file").read_text() == "x" and not (tmp_path / "out").exists()


def test_names_with_markup_and_lone_surrogates_are_shown_as_they_are(run, tmp_path):
    source = shutil.copytree(run, tmp_path / "[/x]")
    data = json.loads((source / "routing.json").read_text())
    data["routes"]["[/bold]"] = data["routes"]["\ud800"] = {"weights": {}, "ablated": []}
    data["versions"]["[/red]"] = "1"
    (source / "routing.json").write_text(json.dumps(data))
    result = call("inspect", source)
    assert result.exception is None and "[/bold]" in result.output and "[/red]" in result.output


TEXTS: dict[str, bytes] = {
    "empty": b"",
    "blank": b"\n\n",
    "cut": b'{"text": "a',
    "list": b"[1, 2]\n",
    "number": b"3\n",
    "null": b'{"text": null}\n',
    "nested": b'{"text": {"a": 1}}\n',
    "mixed": b'{"text": "a"}\n{"text": 3}\n',
    "other": b'{"body": "a"}\n',
    "bytes": b"\xff\xfe\x00",
    "surrogate": b'{"text": "a \\ud800 b"}\n' * 40,
    "deep": b"[" * 3000 + b"\n",
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for name, content in TEXTS.items():
        (folder / f"{name}.jsonl").write_bytes(content)
    (folder / "good.jsonl").write_text('{"text": "the table and the chair by the river"}\n' * 8)
    (folder / "folder").mkdir()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TEXTS, "folder", "nowhere"])
def test_text_that_cannot_be_read(plain, texts, tmp_path, name):
    file, good = texts / (name if name == "folder" else f"{name}.jsonl"), texts / "good.jsonl"
    tests = ["--forget-test", good, "--retain-test", good, "--out", tmp_path / "attacked", "--seeds", 1, "--steps", "0,1",
             "--learning-rate", "1e-3", "--extensions", 0]  # fmt: skip
    fails_in_one_line("relearn", plain, "--forget-train", file, *tests)
    fails_in_one_line("undo", plain, tmp_path / "undone", "--text", file, "--cpu", "--steps", 1, "--length", 8)
    if name not in ("surrogate",):
        assert not (tmp_path / "attacked").exists() and not (tmp_path / "undone").exists()


@pytest.mark.parametrize(
    "more",
    [
        ["--alpha", "nan"], ["--alpha", "-1"], ["--beta", "inf"], ["--tolerance", "nan"], ["--tolerance", "-1"],
        ["--learning-rate", "nan"], ["--learning-rate", "-1"], ["--learning-rate", "inf"], ["--seed", "-1"],
        ["--seed", str(10**20)], ["--steps", "0"], ["--length", "1"], ["--topk", "0"], ["--length", str(10**9)],
        ["--batch-size", "-1"], ["--revision", "x"], ["--steps", "a"],
    ],
)  # fmt: skip
def test_settings_of_undo_out_of_range(plain, texts, tmp_path, more):
    assert fails_in_one_line("undo", plain, tmp_path / "out", "--text", texts / "good.jsonl", "--cpu", *more)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "more",
    [
        ["--learning-rate", "nan"], ["--learning-rate", "-1"], ["--learning-rate", "a"], ["--learning-rate", ","],
        ["--steps", "-1"], ["--steps", "5,1,1"], ["--steps", "x"], ["--steps", ""], ["--attack", "nothing"],
        ["--attack", ""], ["--attack", "few-shot-0"], ["--attack", "few-shot-x"], ["--seeds", "0"], ["--device", "cuda:9"],
        ["--device", "nowhere"], ["--device", "meta"], ["--regions", "[/x]"], ["--reference", "./nowhere"],
        ["--reference-loss", "nan"], ["--reference-loss", "-1"], ["--oracle", "nowhere"], ["--limit", "0"],
        ["--attack", "facts"], ["--attack", "mixed"], ["--revision", "x"],
    ],
)  # fmt: skip
def test_settings_of_relearn_out_of_range(plain, texts, tmp_path, more):
    good = texts / "good.jsonl"
    files = ["--forget-train", good, "--forget-test", good, "--retain-test", good, "--out", tmp_path / "out"]
    assert fails_in_one_line("relearn", plain, *files, *more)


@pytest.mark.parametrize(
    "more",
    [
        ["--device", "cuda:9"], ["--device", "x"], ["--regions", ""], ["--regions", "+"], ["--regions", "[/x]"],
        pytest.param(["--tasks", "[/x]"], marks=pytest.mark.slow),  # looked for in all of lm-eval's files
        ["--tasks", ""], ["--metadata", "pair=[/x]"], ["--metadata", "limit=nan"],
        ["--metadata", "=1"], ["--forget-file", "nowhere"], ["--retain-file", "."], ["--out", "."], ["--dtype", "x"],
        ["--metadata", "forget_file=[/x]"], ["--limit", "-1"], ["--metadata", "tokenizer=nowhere"],
    ],
)  # fmt: skip
def test_settings_of_evaluate_out_of_range(run, more):
    pytest.importorskip("lm_eval")
    assert fails_in_one_line("evaluate", run, *more)


@pytest.mark.slow
def test_a_tokenizer_with_more_entries_than_the_model(texts, tmp_path):
    pytest.importorskip("lm_eval")
    narrow, good, out = tmp_path / "narrow", texts / "good.jsonl", tmp_path / "out"
    tiny_llama(vocab_size=260).save_pretrained(narrow)
    byte_tokenizer().save_pretrained(narrow)
    write_jsonl(tmp_path / "bytes.jsonl", [{"text": "~ ! ~"}])  # tokens that it has
    attack = ["--forget-test", tmp_path / "bytes.jsonl", "--retain-test", tmp_path / "bytes.jsonl", "--out", out]
    for command in (
        ["evaluate", narrow, "--tasks", "routed_loss", "--forget-file", good, "--retain-file", good],
        ["evaluate", narrow, "--tasks", "routed_mc"],
        ["undo", narrow, out, "--text", good, "--length", 8, "--cpu", "--topk", 4],
        ["relearn", narrow, "--forget-train", good, *attack],
    ):
        assert "own tokenizer" in fails_in_one_line(*command), command
        assert not list(out.rglob("*.safetensors")) and not (out / "metrics.jsonl").exists()
