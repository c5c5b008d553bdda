"""Colors, dashes and markers of the methods in figures."""

from __future__ import annotations

from dataclasses import replace

from experiments.report.methods import UNDO, VARIANT
from routed_peft.report.drawing import Style

STYLES = {
    "no_routing": Style("grey"),
    "control": Style("grey", ":", "s", 1.5),
    "random_units": Style("grey", "--", "D", 1.5),
    "filter": Style("orange"),
    "filter_equal_retain": Style("orange", ":", "^", 1.5),
    "classifier_filter": Style("orange", "--", "s"),
    "classifier_filter_balanced": Style("orange", "--", "D"),
    "classifier_filter_overrule": Style("orange", "-.", "v"),
    "era": Style("sky", ":", "x", 1.5),
    "era_coherent": Style("sky", ":", "^"),
    "demix": Style("sky", "-.", "D"),
    "sgtm": Style("sky", "--", "s"),
    "routed": Style("blue", width=2.8),
    "routed_undo": Style("blue", "--", "v"),
    "perfect_filter": Style("green"),
    "gradient_ascent": Style("purple", ":", "o"),
    "graddiff": Style("purple"),
    "npo": Style("purple", "--", "s"),
    "simnpo": Style("purple", ":", "^"),
    "rmu": Style("purple", "-.", "D"),
    "maxent": Style("purple", "-", "v", 1.2),
    "undo": Style("sky"),
}


def style(method: str) -> Style:
    """Return the style of a method; unknown methods look alike, and are told apart by their names."""
    base, _, changes = method.partition(VARIANT)
    if changes:
        return replace(style(base), dashes=":", marker="d", width=1.5)
    return STYLES.get("undo" if method.startswith(UNDO) else method, Style("purple", "--", "X"))
