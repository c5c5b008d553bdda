"""The engine of cells: made once, known again by settings, restored, kept, killed, shared by processes."""

from __future__ import annotations

import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cell_parts
import pytest
import yaml
from cell_parts import NAMES, Toy, made, run
from places import ROOT
from rich.console import Console

from experiments.common import making
from experiments.common.cells import CellStore, agree, read_json, write_json


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(making, "PAUSE", 0.05)


def worker(place: Path, seconds: float) -> subprocess.Popen:
    path = os.pathsep.join([str(ROOT / "recipes"), str(ROOT)])
    command = [sys.executable, cell_parts.__file__, str(place), str(seconds)]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, start_new_session=True)


def test_every_cell_is_made_once_after_its_parent(tmp_path):
    summary = run(Toy(), tmp_path)
    assert made(tmp_path) == ["root", *NAMES]
    assert [(row["name"], row["value"], row["key"], row["settings"]) for row in summary["cells"]] == [
        (name, len(name), name, {"steps": 2}) for name in NAMES
    ]
    assert run(Toy(), tmp_path) == summary and not made(tmp_path)
    assert run(Toy(names=["two"]), tmp_path)["cells"] == [summary["cells"][1]] and not made(tmp_path)


def test_another_setting_is_another_cell_and_both_stay(tmp_path):
    run(Toy(), tmp_path)
    made(tmp_path)
    other = run(Toy(names=["one"], settings={"steps": 3}), tmp_path)
    assert made(tmp_path) == ["root", "one"] and other["cells"][0]["key"] == "one_2"
    run(Toy(), tmp_path)
    run(Toy(names=["one"], settings={"steps": 3}), tmp_path)
    assert not made(tmp_path)


def test_fields_that_one_side_lacks_do_not_count_unless_they_have_a_default(tmp_path):
    run(Toy(names=["one"]), tmp_path)
    made(tmp_path)
    run(Toy(names=["one"], settings={"steps": 2, "noise": 0.5}), tmp_path)
    assert not made(tmp_path), "nobody knows that there was no noise"
    later = {"settings": {"steps": 2, "noise": 0.5}, "defaults": {"noise": 0.0}}
    run(Toy(names=["one"], **later), tmp_path)
    assert made(tmp_path) == ["root", "one"]
    assert agree({"made_from": {"a": 1}}, {"made_from": {"a": 1, "b": 2}}) and not agree(
        {"a": {"b": 1}}, {"a": {"b": 2}}
    )


def test_a_cell_that_was_interrupted_is_made_anew_and_the_others_are_not(tmp_path):
    def stop(site, name):
        numbers = cell_parts.make(site, name)
        if name == "two":
            (site.folder / "half").touch()
            raise KeyboardInterrupt
        return numbers

    with pytest.raises(KeyboardInterrupt):
        run(Toy(make=stop), tmp_path, tmp_path / "summary.json")
    assert made(tmp_path) == ["root", "one", "two"]
    assert [row["name"] for row in read_json(tmp_path / "summary.json")["cells"]] == ["one"], "it says what there is"
    run(Toy(), tmp_path)
    assert made(tmp_path) == ["two", "three", "four"] and not (tmp_path / "two" / "half").exists()


@pytest.mark.slow
def test_processes_share_the_cells_of_one_command_and_one_may_be_killed(tmp_path):
    workers = [worker(tmp_path, 0.6) for _ in range(2)]
    deadline = time.monotonic() + 60
    while not (tmp_path / "one" / "numbers.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)
    os.killpg(workers[0].pid, signal.SIGKILL)  # within the next cell, or while the other makes it
    workers[0].wait()
    assert workers[1].wait(60) == 0
    log = made(tmp_path)
    assert {*log} == {"root", *NAMES} and len(log) <= len(NAMES) + 2, "none twice but for the one that was killed"
    assert [row["name"] for row in read_json(tmp_path / "summary.json")["cells"]] == [*NAMES]


@pytest.mark.slow
def test_one_command_may_start_several_processes(tmp_path):
    summary = run(Toy(seconds=8.0), tmp_path, processes=2)
    assert sorted(made(tmp_path)) == sorted(["root", *NAMES])
    assert [row["value"] for row in summary["cells"]] == [len(name) for name in NAMES]
    assert len({(tmp_path / name / "pid").read_text() for name in NAMES}) == 2, "the helper made some"


def test_numbers_are_restored_from_the_summary_where_the_same_settings_made_them(tmp_path):
    file = tmp_path / "summary.json"
    summary = run(Toy(attacks=["burn"]), tmp_path / "here", file)
    made(tmp_path / "here")
    assert run(Toy(attacks=["burn"]), tmp_path / "there", file) == summary and not made(tmp_path / "there")
    run(Toy(names=["one"], attacks=["burn", "freeze"]), tmp_path / "there", file)
    assert made(tmp_path / "there") == ["root", "one", "burn on one", "freeze on one"], "an attack needs the model"
    write_json(file, summary)
    run(Toy(settings={"steps": 3}), tmp_path / "else", file)
    assert made(tmp_path / "else") == ["root", *NAMES]


def test_rows_without_settings_are_known_by_those_of_their_summary(tmp_path):
    file = tmp_path / "summary.json"
    row = {"name": "one", "value": 7}
    write_json(file, {"settings": {"steps": 2, "gone": 1}, "cells": [row, {"name": "forgotten", "value": 1}]})
    (found,) = run(Toy(names=["one"]), tmp_path / "cells", file)["cells"]
    assert found["value"] == 7 and not made(tmp_path / "cells"), "a row of which the cell is gone goes as well"
    write_json(file, {"settings": {"steps": 3}, "cells": [row]})
    (found,) = run(Toy(names=["one"]), tmp_path / "more", file)["cells"]
    assert found["value"] == 3 and made(tmp_path / "more") == ["root", "one"]


def test_rows_that_were_not_asked_for_stay_unless_other_settings_made_them(tmp_path):
    file = tmp_path / "summary.json"
    before = run(Toy(names=["one", "two"]), tmp_path / "cells", file)["cells"]
    after = run(Toy(names=["three"]), tmp_path / "cells", file)["cells"]
    assert after[1:] == before and after[0]["name"] == "three"
    other = run(Toy(names=["four"], settings={"steps": 9}), tmp_path / "cells", file)["cells"]
    assert [row["name"] for row in other] == ["four"]
    run(Toy(names=["one"], attacks=["burn"]), tmp_path / "cells", file)
    with pytest.raises(ValueError, match=r"holds 1 rows that are not asked for, with `rate` 0.1 where 0.2"):
        run(Toy(names=["two"], attack_settings={"rate": 0.2}), tmp_path / "cells", file)


def test_a_model_that_is_made_again_is_attacked_again_unless_it_is_the_same(tmp_path):
    file, place = tmp_path / "summary.json", tmp_path / "cells"
    run(Toy(names=["one"], attacks=["burn"]), place, file)
    made(place)
    shutil.copy(file, tmp_path / "kept.json")
    (place / "one" / "attack-burn.json").unlink()
    run(Toy(names=["one"], attacks=["burn"]), place, file)
    assert not made(place), "as in the summary"
    shutil.copy(tmp_path / "kept.json", file)
    (place / "one" / "attack-burn.json").unlink()
    write_json(place / "one" / "numbers.json", {"value": 4})
    run(Toy(names=["one"], attacks=["burn"]), place, file)
    assert made(place) == ["burn on one"], "another model"


def test_attacks_with_other_settings_lie_side_by_side(tmp_path):
    store = CellStore(tmp_path)
    for rate in (0.1, 0.2, 0.1):
        run(Toy(names=["one"], attacks=["burn"], attack_settings={"rate": rate}), tmp_path)
    assert made(tmp_path) == ["root", "one", "burn on one", "burn on one"]
    files = {
        json.loads(file.read_text())["settings"]["rate"]: file.name for file in (tmp_path / "one").glob("attack-*")
    }
    assert files == {0.1: "attack-burn.json", 0.2: "attack-burn_2.json"}
    assert store.find(Toy(names=["two"]).cells[0]) is None


def test_a_cell_that_fails_is_named_at_the_end_and_the_others_are_made(tmp_path):
    def fail(site, name):
        if name == "two":
            raise ValueError("no room")
        return cell_parts.make(site, name)

    with pytest.raises(ValueError, match=r"1 of 4 cells failed; the others are in the summary:\n  two, two: no room"):
        run(Toy(make=fail), tmp_path, tmp_path / "summary.json")
    assert made(tmp_path) == ["root", "one", "three", "four"]
    assert [row["name"] for row in read_json(tmp_path / "summary.json")["cells"]] == ["one", "three", "four"]


def test_a_file_that_is_no_summary_is_refused_and_kept(tmp_path):
    file = tmp_path / "summary.json"
    write_json(file, {"rows": []})
    with pytest.raises(ValueError, match="is no summary of an experiment"):
        run(Toy(), tmp_path / "cells", file)
    assert read_json(file) == {"rows": []} and not made(tmp_path / "cells")


def test_numbers_that_json_does_not_have_are_null(tmp_path):
    write_json(tmp_path / "a.json", {"losses": (1.0, float("nan")), "rate": float("inf")})
    assert read_json(tmp_path / "a.json") == {"losses": [1.0, None], "rate": None}


@pytest.mark.parametrize("name", ["persona", "style", "reward_hack"])
def test_shipped_results_of_arms_are_restored_and_nothing_is_made(name, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("made again")

    package = importlib.import_module(f"experiments.{name}")
    for function in ("train_cell", "make_start"):
        monkeypatch.setattr(f"experiments.{name}.run.{function}", refuse)
    if name == "reward_hack":
        monkeypatch.setattr("experiments.reward_hack.report.write_report", lambda *args, **kwargs: None)
    file = tmp_path / "summary.json"
    shutil.copy(ROOT / "results" / f"{name}.json", file)
    asked = yaml.safe_load((ROOT / "recipes" / "configs" / f"experiment_{name}.yaml").read_text())
    asked |= {"summary_file": str(file), "output_dir": str(tmp_path / "out")}
    before = read_json(file)
    after = package.run_experiment(package.Experiment(**asked), package.Settings(), Console(file=io.StringIO()))
    for old, new in zip(before["cells"], after["cells"], strict=True):
        assert old.items() <= new.items() and new["key"] and new["settings"]
    assert [check["values"] for check in after["checks"]] == [check["values"] for check in before["checks"]]
