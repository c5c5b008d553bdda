from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from routed_peft.mistakes import check_choices, check_numbers, explain


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("got 1,\nexpected 2"), "got 1, expected 2"),
        (OSError(), "OSError"),
        (ValueError("a name \udcff of bytes"), "a name \\udcff of bytes"),
        (KeyError("size"), "unexpected KeyError: 'size' (`--debug` shows where)"),
        (ModuleNotFoundError("no trl", name="trl.rewards"), 'no trl (pip install "routed_peft[trl]")'),
    ],
)
def test_an_error_is_one_line(error, line):
    assert explain(error) == line


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf"), "0.5", True, [0.5]])
def test_a_share_is_a_number_from_0_to_1(value):
    with pytest.raises(ValueError, match="`share` must be a number from 0 to 1, got"):
        check_numbers(SimpleNamespace(share=value), "share", high=1)
    for fine in (0, 0.5, 1, None):
        check_numbers(SimpleNamespace(share=fine), "share", high=1)


def test_a_choice_is_one_of_those_in_the_metadata():
    @dataclass
    class Settings:
        arm: str = field(default="routed", metadata={"choices": ["routed", "none"]})
        other: str = ""

    check_choices(Settings("none"))
    with pytest.raises(ValueError, match="`arm` must be one of routed, none, got 'Routed'"):
        check_choices(Settings("Routed"))
