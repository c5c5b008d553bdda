"""``routed-peft report``: a page about attacked checkpoints, which refuses experiments and knows none of their goals."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from places import ROOT
from report_parts import attacked_checkpoint, cells, summary, write
from typer.testing import CliRunner

from routed_peft.cli import app
from routed_peft.evaluation.measures import relearning_area
from routed_peft.report import write_report


def test_a_page_of_two_checkpoints(tmp_path):
    places = [attacked_checkpoint(tmp_path, "rmu"), attacked_checkpoint(tmp_path, "npo", None)]
    written = write_report(places, tmp_path / "out")
    assert [one.source.name for one in written.checkpoints] == ["rmu", "npo"]
    attack = written.checkpoints[0].attacks["forget"]
    assert [loss.mean for loss in attack.forget] == [5.0, 4.0, 2.5] and attack.forget[0].n == 2
    assert attack.recovery.at == pytest.approx(1 + 2 * (4 - 3.02) / 1.5) and not attack.interior
    assert attack.recovery_tokens.at == pytest.approx(100 * attack.recovery.at) and attack.area is None
    other = written.checkpoints[1].attacks["forget"]
    assert other.recovery is None and other.recovery_tokens is None
    page = written.page.read_text()
    assert "231 tokens" in page and "org/model" in page
    figures = {path.name for path in (tmp_path / "out" / "figures").iterdir()}
    assert figures == {"relearn-checkpoints.png", "relearn-checkpoints.svg"}


def test_the_area_needs_a_perfect_filter(tmp_path):
    place = attacked_checkpoint(tmp_path, "sgtm", 3.0, [6.0, 5.0, 4.5])
    (one,) = write_report([place], tmp_path / "out").checkpoints
    expected = relearning_area([0, 1, 3], [5.0, 4.0, 2.5], base=3.0, oracle=[6.0, 5.0, 4.5])
    assert one.attacks["forget"].area.mean == pytest.approx(expected)


@pytest.mark.slow
def test_the_table_shows_intervals_and_areas_where_summaries_hold_them(tmp_path):
    def heads_and_rows(*files):
        table = write_report(files, tmp_path / "out").page.read_text().split("<table>")[1].split("</table>")[0]
        lines = [re.findall(r"<t[hd].*?</t[hd]>", line, re.DOTALL) for line in table.split("<tr>")[1:]]
        return [[" ".join(re.sub(r"<[^>]+>", " ", one).split()) for one in line] for line in lines if len(line) > 1]

    plain = attacked_checkpoint(tmp_path, "rmu")
    known = attacked_checkpoint(tmp_path, "sgtm", 3.0, [6.0, 5.0, 4.5])
    about = json.loads(known.read_text())
    about["attacks"]["forget"]["envelope"][-1]["documents"] = [2.25, 2.75]
    write(known, about)
    head, row = heads_and_rows(plain)
    assert "area" not in head and row[head.index("other documents")] == "–", "bounds were not measured"
    head, first, second = heads_and_rows(plain, known)
    assert second[head.index("other documents")] == "2.25 to 2.75" and second[head.index("area")] == "0.41"
    assert first[head.index("area")] == "–" and len(head) == len(first) == len(second)
    older = json.loads(plain.read_text())
    for entry in older["attacks"]["forget"]["envelope"]:
        entry.pop("documents", None)
    assert heads_and_rows(write(plain, older))[1][3] == "–"


@pytest.mark.slow
def test_the_command_writes_the_page_and_names_it(tmp_path):
    attacked_checkpoint(tmp_path, "rmu")
    write(tmp_path / "biology.json", summary(cells()))  # of an experiment: passed over in a directory
    result = CliRunner().invoke(app, ["report", str(tmp_path), "--out", str(tmp_path / "out")])
    assert not result.exception, result.output
    assert "org/model under attack" in result.output
    assert result.output.rstrip().endswith(f"written to {tmp_path / 'out' / 'report.html'}")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "biology" not in page and not re.search(r"https?://|@import|url\(|<script|<link", page)
    assert not re.search(r"\b(target|goal|met|missed)\b", re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL))


def test_an_experiment_is_refused_in_one_line_that_names_its_command(tmp_path):
    file = ROOT / "results" / "biology.json"
    for place in (file, shutil.copytree(ROOT / "results", tmp_path / "results")):
        result = CliRunner().invoke(app, ["report", str(place), "--out", str(tmp_path / "out")])
        assert result.exit_code == 1 and result.output.count("\n") == 1
        assert result.output.startswith("routed-peft: ") and f"`python recipes/report.py {place}`" in result.output
    assert not (tmp_path / "out").exists()
