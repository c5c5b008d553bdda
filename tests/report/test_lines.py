from __future__ import annotations

from dataclasses import replace

import pytest
from matplotlib.figure import Figure
from report_parts import attacked_checkpoint

from routed_peft.evaluation.measures import Spread
from routed_peft.report.checkpoints import Checkpoint
from routed_peft.report.drawing import LIGHT, Line, Style, curve, line, plot
from routed_peft.report.reading import read_sources

BLUE = Style("blue")


def test_a_line_leaves_out_what_was_not_measured():
    found = line("mine", [(0.0, Spread(1.0, 0.5, 1.5, 2)), (1.0, None)], BLUE)
    assert found == Line("mine", [(0.0, 1.0)], BLUE, [(0.5, 1.5)])


def test_a_curve_says_where_no_attack_took_place(tmp_path):
    (source,) = read_sources([attacked_checkpoint(tmp_path, "rmu")])
    attack = Checkpoint(source).attacks["forget"]
    assert curve("rmu", attack, BLUE).name == "rmu"
    assert curve("rmu", replace(attack, verdict="diverged"), BLUE).name == "rmu (diverged)"


def test_a_broken_model_does_not_press_the_others_flat():
    lines = [Line("broken", [(0, 90.0), (1, 95.0)], BLUE), Line("fine", [(0, 5.0), (1, 4.0)], BLUE)]
    axes = Figure().subplots()
    plot(lines, "losses", x_label="steps", ticks={0: "0", 1: "1"}, ideal=6.0, level=5.5)(axes, LIGHT)
    assert axes.get_ylim()[1] == pytest.approx(6.0 + 0.4 * (6.0 - 4.0))
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "1"]
    assert any("broken ↑ 95.0" in text.get_text() for text in axes.texts)
