from __future__ import annotations

import base64
import contextlib
import io
import json
import math
import re
import runpy
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure
from places import ROOT
from report_parts import attacked_checkpoint, cell, cells, curve, summary, write

from experiments.report import write_report
from experiments.report.aggregate import aggregate
from experiments.report.caveats import caveats
from experiments.report.costs import costs
from experiments.report.figures import figures
from experiments.report.lines import STYLES
from experiments.report.methods import CARDS
from experiments.report.points import offsets
from experiments.report.reading import read_sources
from experiments.report.targets import targets
from experiments.report.verdicts import sentences
from routed_peft.evaluation.measures import Crossing, Spread
from routed_peft.report.drawing import DARK, LIGHT

COMMAND = runpy.run_path(str(ROOT / "recipes" / "report.py"))["main"]
RIGHT = (1.0, 1.0)


def routed(rows, labeled=0.5):
    result = aggregate(rows).get("routed", labeled, RIGHT)
    assert result is not None
    return result


def attacked(seed, *forget, status="attack", steps=None):
    curves = [curve(10.0**-i, list(losses), status=status) for i, losses in enumerate(forget, 2)]
    for one in curves:
        one["steps"] = steps or one["steps"]
    return cell("routed", forget[0][0], 3.5, 0.5, seed, attacks={"forget": curves})


def test_losses_removal_and_retain_tax_are_compared_within_a_seed():
    rows = [
        *cells(0),
        *[row | {"seed": 1} for row in cells() if row["method"] != "filter"],
        cell("routed", 6.0, 3.0, 0.5, seed=7),
    ]
    result = routed(rows)
    assert result.forget == Spread(pytest.approx(16 / 3), 5.0, 6.0, 3) and result.retain.n == 3
    assert result.removed == Spread(pytest.approx(2 / 3), pytest.approx(2 / 3), pytest.approx(2 / 3), 2), (
        "seed 7 has no ends"
    )
    assert result.retain_tax_same_labels == Spread(pytest.approx(0.1), pytest.approx(0.1), pytest.approx(0.1), 1), (
        "seed 1 has no filter"
    )
    assert aggregate(rows).get("control").retain_tax_same_labels.mean == pytest.approx(0.2), (
        "there is only one filter to compare with"
    )
    assert aggregate([*rows, cell("filter", 3.2, 3.4, 0.1)]).get("control").retain_tax_same_labels is None


def test_a_removal_that_cannot_be_told_is_none():
    rows = [row | {"forget_loss": 2.0} if row["method"] == "perfect_filter" else row for row in cells()]
    assert routed(rows).removed is None
    assert routed([row for row in cells() if row["method"] == "routed"]).retain_tax_same_labels is None


def test_an_attack_is_its_worst_case_over_rates_and_earlier_steps():
    attack = routed(cells()).attacks["forget"]
    assert attack.steps == (0, 1, 3) and [loss.mean for loss in attack.forget] == [5.0, 3.8, 3.5]
    assert attack.retain.mean == 4.0, "of the model at rate 1e-3 and step 3"
    assert attack.useful.mean == 3.8, "at step 3 retain loss rose by more than 5 %"
    assert attack.verdict == "attack" and attack.interior and attack.best_rates == (1e-3,)
    assert attack.learning_rates == (3e-4, 1e-3, 1e-2, 3e-2)
    assert attack.recovery == Crossing(3, ">") and attack.recovery_by_seed == (Crossing(3, ">"),)
    assert [one.mean for one in attack.removed] == pytest.approx([2 / 3, 0.9 / 2.1, 0.7 / 1.2])
    assert attack.area.mean == pytest.approx((4.025 - 3.0) / (5.0 - 3.0)), (
        "steps 0, 1 and 3 are evenly spaced in log(1 + s)"
    )


def test_steps_to_recover_are_interpolated_to_within_the_tolerance():
    found = aggregate(cells())
    assert found.get("filter", 0.5, RIGHT).attacks["forget"].recovery.at == pytest.approx(2.2)
    assert found.get("no_routing").attacks["forget"].recovery == Crossing(0)
    assert found.get("perfect_filter").attacks["forget"].area.mean == 1.0
    assert found.get("no_routing").attacks["forget"].area.mean == pytest.approx(-0.05), "it has learnt, too"


def test_every_seed_has_an_attacker_of_its_own():
    """Grids extend themselves seed by seed, so a rate may be missing for one of them."""
    one, two = attacked(0, [5.0, 4.0, 3.0]), attacked(1, [6.0, 5.0, 4.5], [6.0, 3.0, 3.5])
    attack = routed([one, two]).attacks["forget"]
    assert [(loss.mean, loss.min, loss.max) for loss in attack.forget] == [(5.5, 5, 6), (3.5, 3, 4), (3.0, 3, 3)]
    assert attack.best_rates == (1e-3, 1e-2) and not attack.interior
    assert attack.recovery is None and attack.area is None and attack.removed == (None, None, None)


def test_what_lowers_no_loss_is_no_attack_and_what_diverges_is_no_robustness():
    nothing = attacked(0, [5.0, 5.5, 5.2], status="no attack")
    broken = attacked(0, [5.0, math.nan, math.nan], status="diverged")
    assert routed([nothing]).attacks["forget"].verdict == "no attack"
    assert routed([broken]).attacks["forget"].verdict == "diverged"
    on_the_way = attacked(0, [5.0, 4.0, 9.0], status="diverged")
    assert routed([on_the_way]).attacks["forget"].verdict == "attack", "the attacker would have stopped there"
    some = routed([nothing, attacked(1, [5.0, 4.0, 4.0])])
    assert (
        some.attacks["forget"].verdict == "attack in 1 of 2 seeds, no attack in 1" and some.attacks["forget"].attacked
    )
    after = [target for target in targets(aggregate([*cells()[:4], broken])) if "attack" in target.wanted]
    assert after and all(target.met is None for target in after), "nothing is told by an attack that diverged"


def test_an_attack_that_fails_in_some_seeds_meets_no_target():
    """The mean over seeds is then higher than what the attacker reaches: it can show that a target is missed, but not met."""

    def robust(*routed_models):
        rows = [row | {"seed": seed} for seed in range(len(routed_models)) for row in cells()[:4]]
        found = {t.kind: t for t in targets(aggregate([*rows, *routed_models]))}
        return found["robust"].met, found["filter"].met, found["robust"].measured

    held, fallen = (attacked(0, [6.0, 5.5, 5.5]), attacked(0, [6.0, 3.0, 2.5]))
    broken = [attacked(seed, [6.0, math.nan, math.nan], status="diverged") for seed in (1, 2)]
    assert robust(held, held | {"seed": 1}, held | {"seed": 2}) == (True, True, "5.50 ‡ against 4.00 ‡")
    assert robust(held, *broken) == (None, None, "5.83 (5.50–6.00) ‡ against 4.00 ‡")
    assert robust(fallen, fallen | {"seed": 1}, broken[1]) == (False, None, "3.67 (2.50–6.00) ‡ against 4.00 ‡")


def test_an_attack_is_measured_against_the_model_before_it_was_perturbed():
    worse = attacked(0, [5.4, 5.3, 5.2]) | {"forget_loss": 5.0}
    assert routed([worse]).attacks["forget"].verdict == "no attack", "the model had 5.0 before"
    hardly = attacked(0, [5.0, 4.99, 4.99])
    assert routed([hardly]).attacks["forget"].verdict == "no attack", "a hundredth of a nat is none"


def test_the_dotted_line_is_the_loss_on_what_is_scored():
    rows = cells()
    for row in rows:
        row["attacks"] = {"facts": [curve(1e-3, [1.0, 0.9, 0.8] if row["method"] == "no_routing" else [4.0, 3.0, 2.5])]}
    assert {one.attacks["facts"].reference for one in aggregate(rows).results.values()} == {1.0}, (
        "not 3.0, of other text"
    )


def test_cells_must_be_attacked_at_the_same_steps():
    with pytest.raises(ValueError, match="'forget' was measured at different steps"):
        aggregate([attacked(0, [5.0, 4.0, 3.0]), attacked(1, [5.0, 4.0, 3.0], steps=[0, 2, 4])])


def test_the_worst_attack_is_the_one_that_ends_lowest():
    row = attacked(0, [5.0, 4.0, 3.0])
    row["attacks"]["mixed"] = [curve(1e-3, [5.0, 4.0, 2.0])]
    assert routed([row]).worst.forget[-1].mean == 2.0


def test_what_one_attack_spared_is_not_the_more_robust():
    rows = cells()
    rows[0]["attacks"]["mixed"] = [curve(1e-3, [3.0, 2.5, 2.4])]
    found = aggregate(rows)
    assert found.get("no_routing").worst.forget[-1].mean == 2.4
    assert found.get("perfect_filter").worst is None, "not attacked in every way"


def test_facts_are_compared_with_facts():
    """An attack that scores other text has a reference of its own, and is not the worst case on held-out documents."""
    rows = cells()
    for row in rows:
        row["attacks"]["facts"] = [curve(1e-3, [2.0, 1.5, 1.0] if row["method"] == "no_routing" else [4.0, 3.0, 2.5])]
    found = aggregate(rows)
    assert found.get("no_routing").attacks["facts"].recovery == Crossing(0)
    assert found.get("filter", 0.5, RIGHT).attacks["facts"].recovery.relation == ">", "back at text's 3.0, not at 2.0"
    worst = found.get("filter", 0.5, RIGHT).worst
    assert worst == found.get("filter", 0.5, RIGHT).attacks["forget"]


def test_targets_are_met_or_missed_by_the_numbers():
    verdicts = {target.wanted: target for target in targets(aggregate(cells()))}
    removed = verdicts["50 % of the labels: at least 95 % removed"]
    assert removed.met is False and removed.measured == "66.7 %" and removed.verdict == "missed, on 1 seed only"
    assert [target.met for target in verdicts.values() if target.kind == "tax"] == [False]
    above = verdicts[
        "50 % of the labels: forget loss after the worst attack above that of the filter with the same labels"
    ]
    assert above.met is True and above.measured == "3.50 against 2.90 ‡"
    assert (
        verdicts["50 % of the labels: forget loss after the worst attack within 5 % of the perfect filter’s"].met
        is False
    )
    on = verdicts["50 % of the labels: with its region on, at most 0.10 nats above no routing on both sides"]
    assert on.met is True and on.measured == "forget +0.05, retain +0.05"
    placebo = verdicts["no routing, extra units ablated (placebo): removes less than 10 % of what routing removes"]
    assert placebo.met is False and placebo.measured == "12 %"
    rows = [*cells(labeled=1.0), cell("rmu", 5.0, 3.6, 1.0, attacks={"forget": [curve(1e-3, [5.0, 2.9, 2.8])]})]
    steps = {target.wanted: target for target in targets(aggregate(rows)) if "steps to recover" in target.wanted}
    assert [target.met for target in steps.values()] == [None, True], "bounds against a bound tell nothing"
    assert (
        steps["all labels, attack “forget”: at least 3 × the steps to recover of RMU"].measured == "> 3 against 0.943"
    )


def test_targets_of_a_variant_are_told_where_there_is_nothing_else():
    rows = [row | {"method": row["method"].replace("routed", "routed:by_document=true")} for row in cells()]
    assert [t.met for t in targets(aggregate(rows)) if t.kind == "tax"] == [False]


def test_steps_half_way_back_tell_where_no_attack_recovers():
    """No routing has 3, the perfect filter 6 before any attack: half of the way back is 4.5 for every model."""
    found = aggregate(cells(labeled=1.0))
    half = {name: found.get(name, 1.0, RIGHT) or found.get(name) for name in ("routed", "perfect_filter")}
    assert half["routed"].attacks["forget"].halfway.at == pytest.approx(0.5 / 1.2)
    assert half["perfect_filter"].attacks["forget"].halfway == Crossing(2)
    assert aggregate(cells()[:1]).get("no_routing").attacks["forget"].halfway is None, (
        "nobody says what the other end is"
    )


def test_what_was_not_removed_is_not_recovered():
    """A share of nothing is no number: no routing's own loss, measured twice, differs in the last digits."""
    rows = [row | {"forget_loss": 3.0 + 1e-8} if row["method"] == "control" else row for row in cells()]
    found = aggregate(rows)
    assert found.get("control").attacks["forget"].share_relearned is None
    assert routed(rows).attacks["forget"].share_relearned.mean == pytest.approx((5.0 - 3.5) / (5.0 - 3.0))


def test_sentences_say_what_came_out():
    (sentence,) = sentences(aggregate(cells()))
    assert sentence.startswith("With 50 % of the labels, routing and ablating removed 67 %")
    assert (
        "filter with the same labels: 17 %" in sentence
        and "retain tax against the filter with the same labels is +0.10" in sentence
    )
    assert "After the worst attack the forget loss is 3.50 (filter: 2.90 ‡; perfect filter: 4.00 ‡)." in sentence
    (sentence,) = sentences(aggregate(cells()[:4]))
    assert "No routed model" in sentence and "“filter, same labels” removed most, 17 %" in sentence
    assert "No comparison" in sentences(aggregate(cells()[:1]))[0]


def test_sentences_tell_of_a_variant_where_there_is_nothing_else():
    rows = [row | {"method": "routed:by_document=true"} if row["method"] == "routed" else row for row in cells()]
    (sentence,) = sentences(aggregate(rows))
    assert sentence.startswith("With 50 % of the labels, routing and ablating removed 67 %")
    assert any(target.kind == "placebo" for target in targets(aggregate(rows)))


def test_a_base_that_never_knew_the_forget_side_is_said_to():
    rows = [row | {"forget_loss": 6.5} if row["method"] == "no_routing" else row for row in cells()]
    (sentence,) = sentences(aggregate(rows))
    assert sentence.startswith(
        "Nothing can be removed here: the model without routing, forget loss 6.50, knows no more"
    )
    removed = next(target for target in targets(aggregate(rows)) if target.kind == "removed")
    assert (removed.met, removed.measured, removed.verdict) == (None, "–", "cannot be told")


def test_caveats_follow_from_what_is_missing():
    text = " ".join(caveats(aggregate(cells())))
    assert "more than 1 seed;" in text and "missing: an output-based method" in text
    assert (
        "1 of 5 attacks lowered no loss" in text and "In 3 of 4 attacks the best learning rate lies at the edge" in text
    )
    whole = [row for seed in range(3) for row in cells(seed)]
    assert "seed;" not in " ".join(caveats(aggregate(whole)))
    assert "1 of 5 rows have fewer seeds" in " ".join(caveats(aggregate(whole[:-1])))
    assert "Nothing was attacked" in " ".join(caveats(aggregate([cell("filter", 3.0, 3.0, 0.5)])))
    assert "test documents" not in text
    sampled = [cell("filter", 3.0, 3.0, 0.5) | {"forget_loss_interval": [2.9, 3.2]}]
    assert "move a forget loss by up to 0.15 nats" in " ".join(caveats(aggregate(sampled)))


def test_costs_are_read_off_the_filters_of_the_experiment():
    def row(method, forget, retain, sides, flops, labeled=None, **more):
        ledger = {"flops": flops, "serial_steps": 10, "tokens": 100, "labeled_forget_tokens": 7}
        tokens = dict(zip(("forget", "retain"), sides, strict=True))
        return cell(method, forget, retain, labeled, tokens_by_side=tokens, ledger=ledger, **more)

    u = {"unlabeled_tokens_by_side": {"forget": 150, "retain": 100}}
    rows = [
        row("no_routing", 3.0, 3.6, (400, 100), 100),
        row("filter", 4.0, 3.4, (200, 200), 100, 0.5),
        row("filter", 5.0, 3.3, (100, 300), 100, 0.75),
        row("perfect_filter", 6.0, 3.2, (0, 400), 100),
        row("routed", 4.5, 3.5, (200, 200), 125, 0.5, region_activity_ratio=[2.0, None, 4.0], **u),
        row("sgtm", 5.5, 3.1, (200, 200), 100, 0.5, **u),
        row("demix", 5.5, 3.1, (200, 200), 100, 0.5),
        row("era", 4.5, 3.5, (200, 200), 100, 0.9),
    ]
    found = aggregate(rows)
    routed_costs, sgtm, era, demix, filtered = (
        costs(found, found.get(m, s, (1.0, 1.0)))
        for m, s in [("routed", 0.5), ("sgtm", 0.5), ("era", 0.9), ("demix", 0.5), ("filter", 0.5)]
    )
    assert routed_costs.compute.mean == 1.25 and routed_costs.serial_steps == 10 and routed_costs.labeled == 7
    assert routed_costs.activity.mean == 3.0
    assert routed_costs.penalty.at == pytest.approx(1 - 2**0.5 / 2), (
        "the retain loss of plain training on 141 tokens, not 200"
    )
    assert routed_costs.leakage.at == pytest.approx(100 * 2**0.5 / 150), (
        "as if 141 of the 150 unlabelled tokens had been let through"
    )
    assert filtered.leakage == Crossing(1.0) and demix.leakage is None, "it is not known how many it was trained on"
    assert routed_costs.absorption.mean == pytest.approx(0.25) and filtered.absorption.mean == 0 and routed_costs.is_known
    assert str(sgtm.leakage) == f"< {100 / 150:.4g}" and sgtm.penalty.relation == "<", (
        "beyond what filters tell: a bound"
    )
    assert era.leakage is None and era.absorption is None, "no filter has these labels"
    assert not costs(aggregate(cells()[:1]), aggregate(cells()[:1]).get("no_routing")).is_known


def test_only_figures_with_data_are_drawn():
    def keys(rows):
        return [figure.key for figure in figures(aggregate(rows), {})]

    plain = [{key: value for key, value in row.items() if key != "attacks"} for row in cells()]
    assert keys(plain) == ["tradeoff"] and keys(cells()) == ["tradeoff", "relearning"]
    assert keys([*cells(), *cells(labeled=0.1)[3:]]) == ["tradeoff", "labels", "relearning"]
    wrong = [row | {"recall": 0.9, "precision": 0.8} for row in plain[3:]]
    assert keys([*plain, *wrong]) == ["tradeoff", "wrong_labels"]


def test_without_labels_there_is_nothing_to_compare():
    """At a share of 0 every method is no routing or its placebo: no panel, and no line for what was run at no other share."""
    rows = [*cells(), *cells(labeled=0.0)[3:], cell("era", 3.2, 3.6, 0.0)]
    drawn = {figure.key: figure for figure in figures(aggregate(rows), {})}
    assert [len(drawn[key].panels) for key in ("tradeoff", "relearning")] == [1, 1]
    axes = Figure().subplots()
    drawn["labels"].panels[0].draw(axes, LIGHT)
    names = " ".join(text.get_text() for text in axes.texts)
    assert CARDS["routed"].label in names and CARDS["era"].label not in names


def test_every_method_has_a_card_a_style_and_colors_for_both_modes():
    from experiments.removal import METHODS

    assert {name.partition("-")[0] for name in METHODS} <= CARDS.keys() and CARDS.keys() == STYLES.keys()
    assert {style.color for style in STYLES.values()} <= LIGHT.colors.keys() == DARK.colors.keys()
    assert len({(style.color, style.dashes, style.marker) for style in STYLES.values()}) == len(STYLES)
    assert len({card.label for card in CARDS.values()}) == len(CARDS)


def test_names_beside_points_do_not_cover_each_other():
    spots = [(100.0, 100.0), (104.0, 101.0), (98.0, 97.0)]
    names = ["perfect filter", "routed", "filter"]
    places = [(x + dx, y + dy) for (x, y), (dx, dy) in zip(spots, offsets(spots, names), strict=True)]
    boxes = [(x - 2.5 * len(n), y - 5.5, x + 2.5 * len(n), y + 5.5) for (x, y), n in zip(places, names, strict=True)]
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


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


def test_the_command_says_what_is_wrong_in_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"^recipes/report.py: .* holds no summary of an experiment or of relearning"):
        COMMAND([str(tmp_path)])


def test_numbers_do_not_depend_on_the_order_of_cells():
    rows = [row for seed in (0, 1) for row in cells(seed)]
    one, other = routed(rows), routed(rows[::-1])
    assert one.removed == other.removed and one.attacks == other.attacks
    assert json.dumps(one.forget.as_dict()) == json.dumps(other.forget.as_dict())
    assert replace(one, cells={}) == replace(other, cells={})


def undone(alpha, after, between=4.0, seed=0):
    attacks = {"forget": [curve(1e-3, [5.0, between, after])]}
    return cell(f"undo-{alpha}", 5.0, 3.6, 0.5, seed, attacks=attacks)


def test_undo_must_hold_out_longer_with_more_noise_and_like_the_oracle_when_distilled_afresh():
    rows = [*cells(), undone("0.2", 3.0), undone("0.8", 3.4), undone("1", 3.9)]
    found = {
        target.wanted: target
        for target in targets(aggregate(rows))
        if "UNDO" in target.wanted or "afresh" in target.wanted
    }
    rises, fresh = found.values()
    assert rises.met and rises.measured == "3.00 ‡ 3.40 ‡ 3.90 ‡"
    assert fresh.met is None and fresh.measured == "> 3 against > 3", "neither recovers, so it cannot be told"
    rows = [*cells(), undone("0.2", 3.0), undone("0.8", 2.9), undone("1", 2.9, between=2.95)]
    rises, fresh = (t for t in targets(aggregate(rows)) if "UNDO" in t.wanted or "afresh" in t.wanted)
    assert rises.met is False and fresh.met is False, "it recovers before the oracle would"
    none = {"forget": [curve(1e-3, [5.0, 5.1, 5.2], status="diverged")]}
    rows = [*cells(), undone("0.2", 3.0), cell("undo-1", 5.0, 3.6, 0.5, attacks=none)]
    rises, fresh = (t for t in targets(aggregate(rows)) if "UNDO" in t.wanted or "afresh" in t.wanted)
    assert rises.met is None and fresh.met is None, "an attack that diverged says nothing of robustness"
