from __future__ import annotations

from matplotlib.figure import Figure
from report_parts import cell, cells

from experiments.report.aggregate import aggregate
from experiments.report.figures import figures
from experiments.report.lines import STYLES
from experiments.report.methods import CARDS
from experiments.report.points import offsets
from routed_peft.report.drawing import DARK, LIGHT


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
