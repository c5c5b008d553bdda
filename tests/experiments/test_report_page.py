from __future__ import annotations

import base64
import contextlib
import io
import math
import re
import runpy
from html.parser import HTMLParser

import pytest
from places import ROOT
from report_parts import attacked_checkpoint, cell, cells, curve, summary, write

from experiments.report import write_report
from experiments.report.reading import read_sources

COMMAND = runpy.run_path(str(ROOT / "recipes" / "report.py"))["main"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    rows = [row for seed in (0, 1) for row in [*cells(seed), *cells(seed, 0.1)[3:]]]
    rows += [cell("mine <b>", 4.0, 3.6, 0.5, attacks={"forget": [curve(1e-3, [4.0, 3.9, 3.8])]})]
    about = summary(rows) | {"command": "python recipes/experiment.py --config x.yaml", "versions": {"torch": "2.13.0"}}
    write(folder / "biology.json", about)
    write(folder / "step_time.json", {"sizes": {}})
    attacked_checkpoint(folder, "attacked")
    screen = io.StringIO()
    with contextlib.redirect_stdout(screen):
        COMMAND([str(folder), "--out", str(folder / "out")])
    return folder, (folder / "out" / "report.html").read_text(), screen.getvalue()


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found: list[str] = []
        self.anchors: set[str] = set()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        self.anchors |= {f"#{value}" for name, value in attrs if name == "id"}
        if tag not in ("meta", "br", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_needs_nothing_else(report):
    _, page, _ = report
    links = Links()
    links.feed(page)
    assert not links.open
    inside = [link for link in links.found if not link.startswith("data:image/svg+xml;base64,")]
    assert set(inside) <= links.anchors and len(links.found) > len(inside)
    assert not re.search(r"https?://|@import|url\(|<script|<link", page)
    assert "prefers-color-scheme" in page and 'name="viewport"' in page and "<b>" in page and "mine <b>" not in page
    for link in set(links.found) - set(inside):
        svg = base64.b64decode(link.split(",", 1)[1]).decode()
        assert not re.search(r'(href|src)="(?!#)', svg)


def test_the_page_holds_numbers_provenance_cards_and_caveats(report):
    _, page, _ = report
    text = " ".join(re.sub(r"<[^>]+>", " ", page).split())
    for expected in (
        "routing and ablating removed 67 %",
        "All methods, measured alike: 50 % of the documents labeled",
        "3.50 58 % 4.00 0.001 &gt; 3 0.417 75 % 0.51 3.80 5.00 67 % 3.80 43 %",
        "0 where it lies from the first step on at the loss that the model which was never unlearned had before any attack",
        "python recipes/experiment.py --config x.yaml",
        "torch 2.13.0",
        "seeds 0, 1:",
        "self_labels True",
        "50 % 0.50 1.00 0.25",
        "arXiv 2512.05648",
        "met, on 2 seeds only",
        "What this does not show",
        "are spared rows that mix sides",
        "org/model",
        "routed-peft relearn org/model",
        "No description is known of this method.",
        "(no attack)",
    ):
        assert expected in text, expected


def test_figures_lie_beside_the_page_and_the_terminal_names_it(report):
    folder, _, screen = report
    names = {path.name for path in (folder / "out" / "figures").iterdir()}
    figures = ("biology-tradeoff", "biology-labels", "biology-relearning", "relearn-checkpoints")
    assert names == {f"{figure}.{format}" for figure in figures for format in ("png", "svg")}
    assert (folder / "out" / "figures" / "biology-labels.png").read_bytes().startswith(b"\x89PNG")
    assert "routed, self-labels" in screen and "perfect filter" in screen and "org/model under attack" in screen
    assert screen.rstrip().endswith(f"written to {folder / 'out' / 'report.html'}")


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "does not exist"),
        ("{", "is not JSON"),
        ({"sizes": {}}, "is no summary of an experiment or of relearning"),
        ([1], "is no summary of an experiment or of relearning"),
        (summary(cells()) | {"format": 2}, "has the format 2, this version of routed_peft reads 1"),
        ({"kind": "relearning", "format": 0}, "has the format 0"),
        (summary([]), "has no finished cell yet"),
        (summary([{"method": "filter", "seed": 0}]), "cell 1 of .* lacks labeled, recall, precision, forget_loss"),
        (summary([*cells(), cell("filter", 3.0, 3.0, 0.5)]), "cell 6 of .* repeats an earlier cell"),
        (summary([cell("filter", math.nan, 3.0, 0.5)]), "has the `forget_loss` nan"),
        (summary([cell("filter", 3.0, 3.0, 0.5, attacks={"forget": [{"steps": []}]})]), "attack 'forget' of cell 1"),
    ],
)
def test_a_file_that_is_no_summary_is_refused_and_nothing_is_written(tmp_path, content, message):
    file = tmp_path / "summary.json"
    if content is not None:
        write(file, content)
    with pytest.raises(ValueError, match=message) as error:
        write_report([file], tmp_path / "out")
    assert str(file) in str(error.value) and not (tmp_path / "out").exists()


def test_a_directory_stands_for_all_summaries_in_it(tmp_path):
    with pytest.raises(ValueError, match="holds no summary"):
        read_sources([tmp_path])
    write(tmp_path / "other.json", {"a": 1})
    (tmp_path / "tsconfig.json").write_text("{ // no JSON")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(ValueError, match="holds no summary"):
        read_sources([tmp_path])
    write(tmp_path / "b" / "summary.json", summary(cells()))
    write(tmp_path / "a.json", summary(cells()))
    assert [source.name for source in read_sources([tmp_path, tmp_path / "a.json"])] == ["a", "b"], "each once"
    with pytest.raises(ValueError, match="at least one summary"):
        read_sources([])
    write(tmp_path / "old.json", summary(cells()) | {"format": 0})
    with pytest.raises(ValueError, match=r"old\.json' has the format 0"):
        read_sources([tmp_path])


def test_the_command_says_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="holds no summary of an experiment or of relearning"):
        COMMAND([str(tmp_path)])
