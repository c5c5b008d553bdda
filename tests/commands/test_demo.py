from __future__ import annotations

from pathlib import Path

import pytest
from cli_parts import call

from routed_peft import demo


@pytest.mark.parametrize(
    ("flags", "expected"),
    [([], (Path("demo-out"), False)), (["--quick", "--out", "mine"], (Path("mine"), True))],
)
def test_flags_reach_the_demo(monkeypatch, flags, expected):
    asked = []
    monkeypatch.setattr(demo, "run_demo", lambda *arguments: asked.append(arguments))
    assert call("demo", *flags).exit_code == 0
    assert asked == [expected]


def test_a_directory_in_use_is_refused_in_one_line(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    result = call("demo", "--out", tmp_path)
    assert result.exit_code != 0 and (tmp_path / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
