"""First lines of modules, which no linter reads."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from places import ROOT

QUESTION = re.compile(r"(What|Which|How|Who|Whose|Whether|When|Where|Why)\b")
FILES = sorted(path for folder in ("routed_peft", "recipes", "evals") for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_module_docstring_opens_with_a_question(path: Path):
    opening = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]
    assert opening, f"{name_of(path)} needs a docstring"
    assert not QUESTION.match(opening), f"{name_of(path)}: open with a noun phrase or an imperative, not {opening!r}"
