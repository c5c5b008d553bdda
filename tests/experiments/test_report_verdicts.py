from __future__ import annotations

import re
from dataclasses import replace

import pytest
from report_parts import cell, cells, curve, summary, write

from experiments.report import write_report
from experiments.report.aggregate import aggregate
from experiments.report.caveats import caveats
from experiments.report.costs import costs
from experiments.report.methods import CARDS
from experiments.report.sections import Section
from experiments.report.targets import targets
from experiments.report.verdicts import sentences
from routed_peft.evaluation.measures import Crossing, Spread

RIGHT = (1.0, 1.0)


def with_longer_filter():
    """The filter at equal retain text is at 3.3, the perfect filter at 3.3, routing at 3.5."""
    return [*cells(), cell("filter_equal_retain", 3.25, 3.36, 0.5)]


def of_kind(rows, kind):
    return [target for target in targets(aggregate(rows)) if target.kind == kind]


def text_of(rows, tmp_path, **settings):
    written = write_report([write(tmp_path / "mine.json", summary(rows, **settings))], tmp_path / "out")
    return " ".join(re.sub(r"<[^>]+>", " ", written.page.read_text()).split())


def table_of(rows, tmp_path, head):
    """Return the rows of the first table with a heading, as lists of what stands in its cells."""
    written = write_report([write(tmp_path / "mine.json", summary(rows))], tmp_path / "out")
    table = next(one for one in re.findall(r"<table.*?</table>", written.page.read_text(), re.DOTALL) if head in one)
    lines = [re.findall(r"<t[hd].*?</t[hd]>", line, re.DOTALL) for line in re.findall(r"<tr.*?</tr>", table, re.DOTALL)]
    return [[" ".join(re.sub(r"<[^>]+>", " ", one).split()) for one in line] for line in lines]


def test_the_price_is_told_against_every_filter_and_beside_the_strongest_rival():
    rows = [*with_longer_filter(), cell("classifier_filter", 5.5, 3.3, 0.5)]
    (sentence,) = sentences(aggregate(rows))
    assert "gained" not in sentence and "filter by a TF-IDF classifier of these labels: 83 %" in sentence
    balanced = cell("classifier_filter_balanced", 6.0, 3.32, 0.5, attacks={"forget": [curve(1e-3, [6.0, 5.0, 3.7])]})
    (sentence,) = sentences(aggregate([*rows, balanced]))
    assert "balanced threshold: 100 %)" in sentence and "of these labels" not in sentence
    assert "is +0.10 nats per token at equal tokens in all (classifier: −0.08)" in sentence
    assert "and +0.14 nats per token at equal retain text (classifier: −0.04)." in sentence
    assert "Its retain tax against the perfect filter is +0.20 nats per token (classifier: +0.02)." in sentence
    assert "(filter: 2.90 ‡; classifier: 3.70 ‡; perfect filter: 4.00 ‡)" in sentence
    (sentence,) = sentences(aggregate(cells()))
    assert "equal retain text" not in sentence and "classifier" not in sentence


def test_a_retain_tax_below_zero_is_no_gain():
    rows = [row | {"retain_loss": 3.37} if row["method"] == "routed" else row for row in cells()]
    (sentence,) = sentences(aggregate(rows))
    assert "is −0.03 nats per token at equal tokens in all." in sentence and "perfect filter is +0.07" in sentence


def test_the_retain_tax_at_equal_retain_text_has_a_target_of_its_own():
    (target,) = of_kind(with_longer_filter(), "equal")
    assert "retain tax at most 0.05 nats" in target.wanted and "at equal retain text" in target.wanted
    assert (target.met, target.measured) == (False, "0.14") and not of_kind(cells(), "equal")


def test_tables_tell_the_retain_tax_against_the_perfect_filter(tmp_path):
    head, *lines = table_of(with_longer_filter(), tmp_path, "forget loss")
    place = head.index("… perfect filter")
    told = {line[0]: line[place] for line in lines}
    assert told["routed with self-labels, ablated"] == "0.20" and told["perfect filter"] == "–"
    assert head[place - 1] == "… equal retain text" and lines[0][head.index("relearned")] == "2.80 ‡"


@pytest.mark.parametrize("oracle", [3.0, 3.015])
def test_where_the_base_knows_nothing_no_attack_tells_of_robustness(oracle):
    rows = [row | {"forget_loss": oracle} if row["method"] == "perfect_filter" else row for row in cells(labeled=1.0)]
    rows[1]["attacks"]["forget"] = [curve(1e-3, [oracle, 2.9, 2.8])]
    undone = [cell(f"undo-{a}", 3.0, 3.6, 1.0, attacks={"forget": [curve(1e-3, [3.0, 2.9, 2.8 + a])]}) for a in (0, 1)]
    found = aggregate([*rows, *undone])
    assert not found.removable and aggregate(cells()).removable and aggregate(cells()[2:]).removable
    told = [(t.kind, t.met) for t in targets(found) if t.kind in ("robust", "filter", "steps", "alpha", "removed")]
    assert {kind for kind, _ in told} >= {"robust", "steps", "alpha"} and {met for _, met in told} == {None}
    (sentence,) = sentences(found)
    assert sentence.startswith("Nothing can be removed here")


def test_where_neither_has_lost_anything_steps_to_recover_tell_nothing():
    rows = [row for row in cells(labeled=1.0) if row["method"] != "routed"]
    same = {"forget": [curve(1e-3, [3.0, 2.9, 2.8])]}
    rows += [cell("routed", 3.0, 3.5, 1.0, attacks=same), cell("rmu", 3.0, 3.5, 1.0, attacks=same)]
    (target,) = [target for target in of_kind(rows, "steps") if "RMU" in target.wanted]
    assert (target.measured, target.met, target.verdict) == ("0 against 0", None, "cannot be told")


def test_a_target_that_rests_on_the_edge_of_a_grid_says_so(tmp_path):
    edge = {"forget": [curve(1e-3, [5.0, 4.5, 4.2])]}
    rows = [row | {"attacks": edge} if row["method"] == "routed" else row for row in cells()]
    (robust,), (above,) = of_kind(rows, "robust"), of_kind(rows, "filter")
    assert robust.met and robust.edge and robust.measured == "4.20 ‡ against 4.00 ‡"
    assert robust.verdict == "met ‡, on 1 seed only" and replace(robust, met=False, seeds=3).verdict == "missed ‡"
    assert above.verdict == "met ‡, on 1 seed only"
    (inside,) = of_kind(cells(), "filter")
    assert not inside.edge and inside.verdict == "met, on 1 seed only", "of our own attack"
    all_labels = [row | {"attacks": edge} if row["method"] == "routed" else row for row in cells(labeled=1.0)]
    all_labels.append(cell("rmu", 5.0, 3.6, 1.0, attacks={"forget": [curve(1e-3, [5.0, 2.9, 2.8])]}))
    assert any(target.verdict.startswith("met ‡") for target in of_kind(all_labels, "steps"))
    text = text_of(rows, tmp_path)
    assert "met ‡, on 1 seed only" in text and "A target is “met ‡” where" in text
    assert "A target is “met ‡” where" not in text_of(cells(), tmp_path), "but only where there is one"
    assert "4.20 ‡" in sentences(aggregate(rows))[0]


def with_tokens(rows):
    """Plain models of 0, 200 and 400 forget tokens; the cells of the filter with all labels are the perfect filter's."""
    tokens = {"no_routing": 400, "perfect_filter": 0, "filter": 200, "routed": 200}
    for row in rows:
        sides = {"forget": tokens.get(row["method"], 0), "retain": 300}
        row |= {"tokens_by_side": sides, "ledger": {"flops": 1.0, "serial_steps": 1, "labeled_forget_tokens": 1}}
        row |= {"unlabeled_tokens_by_side": {"forget": 150, "retain": 100}}
    return rows


def test_leakage_that_is_no_more_than_a_bound_above_one_is_not_told(tmp_path):
    rows = with_tokens(cells())
    found = aggregate(rows)
    routed = found.get("routed", 0.5, RIGHT)
    assert costs(found, routed).leakage is None, "< 200 of 150 tokens"
    few = with_tokens(cells())
    few[-1]["unlabeled_tokens_by_side"]["forget"] = 400
    found = aggregate(few)
    assert costs(found, found.get("routed", 0.5, RIGHT)).leakage == Crossing(0.5, "<")
    text = text_of(rows, tmp_path)
    assert "< 133 %" not in text and "do not tell, not even that it is below 100 %" in text


def test_the_activity_of_a_region_is_told_by_layer(tmp_path):
    rows = [row for seed in range(2) for row in with_tokens(cells(seed))]
    for row in rows:
        if row["method"] == "routed":
            row["region_activity_ratio"] = [2.0 + row["seed"], None, 4.0]
    found = aggregate(rows)
    cost = costs(found, found.get("routed", 0.5, RIGHT))
    assert cost.layers == (Spread(2.5, 2.0, 3.0, 2), None, Spread(4.0, 4.0, 4.0, 2))
    assert "layers: 2.50, –, 4.00" in text_of(rows, tmp_path)
    assert costs(found, found.get("filter", 0.5, RIGHT)).layers == ()


def test_tokens_by_label_are_those_that_the_method_saw(tmp_path):
    labels = {"targets_by_label": {"forget": 0, "retain": 300_000, "unlabeled": 810_000}}
    rows = [row | labels for row in with_tokens([*cells(), *cells(labeled=1.0)[3:]])]
    for row in rows:
        all_labels = row["method"] == "filter" and row["labeled"] == 1
        row["key"] = f"biology-{'perfect_filter' if all_labels else row['method']}-1-0-00000000"
    head, *lines = table_of(rows, tmp_path, "millions")
    place = head.index("unlabeled")
    told = {(line[0], line[1]): line[place - 2 : place + 1] for line in lines}
    assert told["filter, same labels", "50 %"] == ["0.00", "0.30", "0.81"]
    assert told["filter, same labels", "100 %"] == ["–"] * 3, "the perfect filter's cell, with half of the labels"
    assert told["no routing", "–"] == told["perfect filter", "–"] == ["–"] * 3, "they look at none"
    assert aggregate(cells()).get("routed", 0.5, RIGHT).tokens_by_label == {"forget": 250_000}, (
        "older cells have no key"
    )


def test_the_page_says_how_many_documents_attackers_have(tmp_path):
    file = write(tmp_path / "mine.json", summary(cells(), pair="arithmetic", limit=20))
    (section,) = write_report([file], tmp_path / "out").sections
    assert isinstance(section, Section) and int(section.attacker_documents) > 16
    text = " ".join((tmp_path / "out" / "report.html").read_text().split())
    assert f"on all {section.attacker_documents}forget documents of the validation split" in text
    assert "on all forget documents of the validation split" in text_of(cells(), tmp_path), (
        "it does not say which are scored"
    )


def test_the_last_step_of_an_attack_comes_first(tmp_path):
    (head, *lines) = table_of(cells(), tmp_path, "after<br>")
    assert head[1:4] == ["after 3 steps", "retain after", "best rate"] and head[-2:] == ["after 0", "1"]
    (routed,) = [line for line in lines if line[0].startswith("routed")]
    assert routed[1:4] == ["3.50 58 %", "4.00", "0.001"] and routed[-2:] == ["5.00 67 %", "3.80 43 %"]


def test_every_card_says_where_its_method_comes_from():
    assert all(card.source for card in CARDS.values())


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
