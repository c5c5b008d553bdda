from __future__ import annotations

import base64
import importlib.util
import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from demo_parts import TINY
from markupsafe import escape
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from routed_peft.checkpoint import load_routed
from routed_peft.demo import ARMS, run_demo
from routed_peft.evaluation.measures import removed
from routed_peft.report.numbers import number, share


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("demo") / "out"
    screen = io.StringIO()
    verbosity = transformers_logging.get_verbosity()
    summary = run_demo(out, settings=TINY, console=Console(file=screen, width=90))
    assert transformers_logging.get_verbosity() == verbosity
    return out, summary, screen.getvalue()


@pytest.mark.slow
def test_it_writes_what_it_promises(demo):
    out, summary, _ = demo
    assert {path.name for path in out.iterdir()} == {
        "report.html",
        "curves.png",
        "summary.json",
        "metrics.jsonl",
        "run.json",
        "data",
        *(arm.key for arm in ARMS),
    }
    assert json.loads((out / "summary.json").read_text()) == summary
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    about = json.loads((out / "run.json").read_text())
    assert about["seeds"] == {"seed": 0} and about["versions"]["torch"] and about["config"]["steps"] == TINY.steps


@pytest.mark.slow
def test_the_ablated_checkpoint_is_plain_and_lacks_the_region(demo):
    out, _, _ = demo
    plain = AutoModelForCausalLM.from_pretrained(out / "routed" / "ablated")
    assert plain.config.intermediate_size == TINY.intermediate_size
    ids = AutoTokenizer.from_pretrained(out / "routed" / "ablated")("a cell", return_tensors="pt")["input_ids"]
    run = load_routed(out / "routed" / "run")
    assert torch.equal(plain(ids).logits, run(ids).logits)
    for key in ("no_routing", "filter", "perfect_filter"):  # the others keep their extra units: same size in use
        kept = AutoModelForCausalLM.from_pretrained(out / key / "plain")
        assert kept.config.intermediate_size == TINY.intermediate_size + TINY.region_size


@pytest.mark.slow
def test_numbers_of_the_summary_follow_from_its_models(demo):
    _, summary, _ = demo
    models = summary["models"]
    assert set(models) == {"no_routing", "placebo", "filter", "routed_on", "routed", "perfect_filter"}
    assert summary["retain_tax_same_labels"] == models["routed"]["retain_loss"] - models["filter"]["retain_loss"]
    assert summary["retain_tax"] == models["routed"]["retain_loss"] - models["perfect_filter"]["retain_loss"]
    expected = removed(*(models[key]["forget_loss"] for key in ("routed", "no_routing", "perfect_filter")))
    assert summary["removed"] == (None if math.isnan(expected) else expected)
    assert models["routed"]["forget_loss"] != models["routed_on"]["forget_loss"]
    assert models["no_routing"]["forget_loss"] != models["placebo"]["forget_loss"]
    assert len({arm["tokens"] for arm in summary["arms"].values()}) == 1
    for arm in summary["arms"].values():
        assert sum(arm["tokens_by_side"].values()) == arm["tokens"] == TINY.tokens
    assert summary["arms"]["perfect_filter"]["tokens_by_side"]["forget"] == 0
    assert summary["arms"]["filter"]["tokens_by_side"]["forget"] > 0
    assert summary["arms"]["filter"]["targets_by_label"]["forget"] == 0


@pytest.mark.slow
def test_points_cover_both_phases_and_both_states_of_the_region(demo):
    out, summary, _ = demo
    points = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    training = {(p["arm"], p["split"], p["ablated"], p["step"]) for p in points if p["phase"] == "training"}
    for arm in ARMS:
        for split in ("forget", "retain"):
            for ablated in (False, True) if arm.routed else (False,):
                assert {(arm.key, split, ablated, step) for step in (10, 20)} <= training
    attacks = [p for p in points if p["phase"] == "relearning"]
    assert len(attacks) == 4 * 2 * 3
    for arm in ARMS:
        for step in (0, 1, 3):
            losses = [p["loss"] for p in attacks if p["arm"] == arm.key and p["step"] <= step]
            assert summary["models"][arm.key]["relearned"][str(step)] == min(losses)


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag not in ("meta", "br", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.slow
def test_the_report_needs_nothing_else(demo):
    page = (demo[0] / "report.html").read_text()
    links = Links()
    links.feed(page)
    assert not links.open
    assert links.found and all(link.startswith("data:image/svg+xml;base64,") for link in links.found)
    assert not re.search(r"https?://|@import|url\(|<script|<link", page)
    assert "prefers-color-scheme" in page and 'name="viewport"' in page
    for link in links.found:  # nor do the pictures
        svg = base64.b64decode(link.split(",", 1)[1]).decode()
        assert not re.search(r'(href|src)="(?!#)', svg)


@pytest.mark.slow
def test_the_report_holds_the_numbers_of_the_summary(demo):
    out, summary, _ = demo
    page = " ".join((out / "report.html").read_text().split())
    for numbers in summary["models"].values():
        for name, value in numbers.items():
            if name == "relearned":
                assert all(f"<td>{number(loss)}</td>" in page for loss in value.values())
            else:
                assert (number(value) if "loss" in name or "byte" in name else share(value)) in page, name
    assert escape(summary["verdict"]) in page and share(summary["removed"]) in page
    assert number(summary["retain_tax_same_labels"]) in page and number(summary["retain_tax"]) in page
    assert "one seed" in page and "(perfect filter − no routing)" in page


@pytest.mark.slow
def test_the_terminal_ends_with_table_verdict_and_path(demo):
    out, summary, text = demo
    last = text[text.index("held-out loss") :]
    assert f"{summary['models']['routed']['forget_loss']:.2f}" in last and "perfect filter" in last
    assert summary["verdict"] in " ".join(last.split())
    assert "one seed" in last
    assert last.rstrip().endswith(f"Report: {out / 'report.html'}")
    assert "Loading weights" not in text and "Warning" not in text


def test_it_refuses_an_occupied_directory_and_leaves_it_alone(tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ValueError, match="`out` .* must be absent or an empty directory"):
        run_demo(tmp_path, settings=TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_without_lm_eval_it_says_so_before_it_writes(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    with pytest.raises(ImportError, match=r"routed_peft\[eval\]"):
        run_demo(tmp_path / "out", settings=TINY)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_interrupted_it_leaves_no_report(tmp_path):
    class Interrupting(Console):
        def print(self, *objects, **options):
            if str(objects[:1]).startswith("('no routing:"):
                raise KeyboardInterrupt
            super().print(*objects, **options)

    small = replace(TINY, steps=2, evaluations=1, warmup_steps=0, relearn_steps=(0, 1), relearn_learning_rates=(1e-3,))
    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path / "out", settings=small, console=Interrupting(file=io.StringIO()))
    assert not {"report.html", "summary.json", "curves.png"} & {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize(
    "wrong",
    [{"steps": -1}, {"batch_size": 0}, {"learning_rate": float("nan")}, {"heads": 3}, {"labeled": 2}, {"limit": 0}],
)
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=f"`({'|'.join(wrong)}|hidden_size)` must be"):
        replace(TINY, **wrong)
