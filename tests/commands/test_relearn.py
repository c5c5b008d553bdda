"""Flags of `routed-peft relearn`: the attacks, grid, data and options that they ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cli_parts import call
from evaluation_parts import write_jsonl
from typer.testing import Result

from routed_peft.evaluation import relearning


@pytest.fixture
def texts(tmp_path) -> list[object]:
    """The flags of the three files that every attack needs."""
    names = ("forget-train", "forget-test", "retain-test")
    files = [write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i}"} for i in range(3)]) for name in names]
    return [part for name, file in zip(names, files, strict=True) for part in (f"--{name}", file)]


@pytest.fixture
def asked(monkeypatch) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(
        relearning, "relearn_source", lambda src, data, **more: calls.append({"src": src, "data": data, **more})
    )
    monkeypatch.setattr(relearning, "summary_tables", lambda summary: [])
    return calls


def run(texts: list[object], *flags: object) -> Result:
    return call("relearn", "model", *texts, "--out", "out", *flags)


def test_defaults(texts, asked):
    assert run(texts).output.endswith("written to out\n")
    (found,) = asked
    assert (found["src"], found["out"], list(found["seeds"])) == ("model", Path("out"), [0, 1, 2])
    assert [attack.name for attack in found["attacks"]] == ["forget"] and found["learning_rates"] is None
    assert found["steps"] == relearning.log_spaced(500) and found["options"].extensions == 2
    assert (found["options"].regions, found["options"].reference, found["options"].oracle) == (None, None, None)
    assert found["data"].forget_train == ["forget-train 0", "forget-train 1", "forget-train 2"]
    assert found["data"].forget_test[0] == "forget-test 0" and found["data"].retain_test[0] == "retain-test 0"


def test_every_flag_reaches_the_attack(texts, asked, tmp_path):
    more = write_jsonl(tmp_path / "more.jsonl", [{"text": "more"}])
    result = run(
        texts, "--attack", "lora+few-shot-2", "--attack", "int4", "--learning-rate", "1e-3,0.01", "--steps", "0,3,9", "--seeds",
        2, "--extensions", 0, "--reference-loss", 3.5, "--regions", "bio+cyber", "--batch-size", 5, "--length", 33, "--limit",
        2, "--retain-train", more, "--unrelated-train", more, "--facts", more, "--revision", "v1", "--oracle", tmp_path,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    (found,) = asked
    assert [(a.name, a.method, a.documents, a.bits) for a in found["attacks"]] == [
        ("lora+few-shot-2", "lora", 2, None), ("int4", "none", None, 4),
    ]  # fmt: skip
    assert {(a.batch_size, a.length) for a in found["attacks"]} == {(5, 33)}
    assert (found["learning_rates"], found["steps"], list(found["seeds"])) == ([1e-3, 0.01], [0, 3, 9], [0, 1])
    options, data = found["options"], found["data"]
    assert (options.extensions, options.reference, options.revision, options.oracle) == (0, 3.5, "v1", tmp_path)
    assert list(options.regions) == ["bio", "cyber"]
    assert len(data.forget_train) == 3 and len(data.forget_test) == len(data.retain_test) == 2, "the limit is on scores"
    assert list(data.retain_train) == list(data.unrelated_train) == ["more"] and len(data.facts) == 1


def test_one_number_of_steps_is_the_last_of_a_log_spaced_grid(texts, asked):
    assert run(texts, "--steps", 7).exit_code == 0
    assert asked[0]["steps"] == [0, 1, 2, 5, 7]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--reference", "org/model", "--reference-loss", 3], "`--reference` and `--reference-loss` say the same"),
        (["--steps", "0,x"], "`--steps` takes numbers from 0, joined by commas, got 'x'"),
        (["--steps", "0,-3"], "`--steps` takes numbers from 0, joined by commas, got '-3'"),
        (["--learning-rate", "1e-3;1e-2"], "`--learning-rate` takes numbers from 0"),
        (["--learning-rate", "nan"], "`--learning-rate` takes numbers from 0"),
        (["--attack", "forgett"], "`forgett` is no part of an attack"),
    ],
)
def test_mistakes_are_told_before_anything_is_attacked(texts, asked, flags, message):
    result = run(texts, *flags)
    assert result.exit_code != 0 and not asked
    assert message in str(result.exception) + " ".join(result.output.split())
