"""Names, descriptions and sources of the methods that a report knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

Family = Literal["reference", "placebo", "filter", "routing", "output"]


@dataclass(frozen=True)
class Card:
    """A method, for readers.

    Attributes:
        name: in tables and figures.
        family: decides its color: what others are measured against, placebos, filters, routing, or unlearning by outputs.
        about: one paragraph.
        source: where it comes from; empty where the method is not known.
        short: name in figures, where it must be short.
    """

    name: str
    family: Family
    about: str
    source: str = ""
    short: str = ""

    @property
    def label(self) -> str:
        """Name in figures."""
        return self.short or self.name


_GRADIENT_ROUTING = "gradient routing, arXiv 2410.04332"
_OWN = "this library’s own (docs/design.md §8)"
_BY_OUTPUTS = (
    " Starts from the model that was trained on everything; sees the rows that are labeled, as many of either side. The "
    "learning rate is the one that does most on validation text while retain loss rises by at most 5 %."
)

CARDS: dict[str, Card] = {
    "no_routing": Card(
        "no routing",
        "reference",
        "Trains on everything and removes nothing: the model that was never unlearned. Removed: 0 %.",
        "ordinary training; why it stands here: docs/design.md §8",
    ),
    "control": Card(
        "no routing, extra units ablated (placebo)",
        "placebo",
        "The same region beside the same model, trained without routing, then ablated. What it loses is what ablation costs "
        "when nothing was put into the region.",
        f"the control of {_GRADIENT_ROUTING}",
        "placebo: extra units",
    ),
    "random_units": Card(
        "no routing, random units ablated (placebo)",
        "placebo",
        "As many units as the region has, drawn at random from every MLP of the unrouted model and silenced. The region is "
        "special only as far as it beats this.",
        _OWN,
        short="placebo: random units",
    ),
    "gradient_ascent": Card(
        "gradient ascent",
        "output",
        "Gradient ascent on forget rows alone." + _BY_OUTPUTS,
        "Jang et al., arXiv 2210.01504",
    ),
    "graddiff": Card(
        "GradDiff",
        "output",
        "Gradient ascent on forget rows together with ordinary training on retain rows." + _BY_OUTPUTS,
        "Liu et al., arXiv 2203.12817; name and form after TOFU, arXiv 2401.06121",
    ),
    "npo": Card(
        "NPO",
        "output",
        "Negative preference optimization: lowers the probability of forget rows below that of the model before, with a "
        "gradient that fades as it succeeds." + _BY_OUTPUTS,
        "Zhang et al., arXiv 2404.05868",
    ),
    "simnpo": Card(
        "SimNPO",
        "output",
        "NPO without a reference model, by the mean log-probability of a row's tokens." + _BY_OUTPUTS,
        "Fan et al., arXiv 2410.07163",
    ),
    "rmu": Card(
        "RMU",
        "output",
        "Representation misdirection: pushes a middle layer's activations on forget rows towards one fixed random direction, "
        "and holds those on retain rows where they were." + _BY_OUTPUTS,
        "Li et al., arXiv 2403.03218, section 4",
    ),
    "maxent": Card(
        "MaxEnt",
        "output",
        "Makes predictions on forget rows uniform; ordinary training on retain rows." + _BY_OUTPUTS,
        "the usual teacher of UNDO, arXiv 2506.06278",
    ),
    "undo": Card(
        "UNDO",
        "output",
        "Starts from the model unlearned by MaxEnt. Every weight moves the share alpha of the way to its initialization; then "
        "the model learns to put out what it put out before, on all training text and without labels, until its retain loss "
        "is within 5 % of the teacher's. Alpha 1 distils into a fresh model.",
        "arXiv 2506.06278",
    ),
    "routed_undo": Card(
        "routed, ablated, then UNDO",
        "routing",
        "The ablated model is the teacher of UNDO at alpha 0.6.",
        "this library; UNDO, arXiv 2506.06278",
        "routed + UNDO",
    ),
    "filter": Card(
        "filter, same labels",
        "filter",
        "Leaves out all that is labeled forget, and trains on the rest: the usual method with these labels. The retain tax "
        "for the same labels is measured against it.",
        f"the baseline of {_GRADIENT_ROUTING}, and SGTM, arXiv 2512.05648",
    ),
    "filter_equal_retain": Card(
        "filter, same labels, longer: as much retain text as routed",
        "filter",
        "The same filter, trained until it has seen as much retain text as teaches the base of the routed model, however many "
        "tokens that takes. Against it the retain tax does not depend on who saw more retain text.",
        _OWN,
        short="filter, equal retain text",
    ),
    "classifier_filter": Card(
        "filter by a TF-IDF classifier of these labels",
        "filter",
        "A logistic regression on words and word pairs, fitted to the labeled documents, labels the others; what it "
        "calls forget is left out. The obvious rival where the two sides differ in their words.",
        f"{_OWN}; the classifier is scikit-learn’s",
        short="filter by classifier",
    ),
    "classifier_filter_balanced": Card(
        "filter by a TF-IDF classifier, balanced threshold",
        "filter",
        "The same, with a threshold as many standard deviations from the mean score of either side (of labeled documents, by "
        "five folds), which is how self-labels choose theirs: more retain text is lost, and less forget text kept.",
        f"{_OWN}; the classifier is scikit-learn’s",
        short="classifier, balanced",
    ),
    "classifier_filter_overrule": Card(
        "filter by a TF-IDF classifier that may overrule labels",
        "filter",
        "Each labeled document is labeled anew, too, by a classifier that was fitted to the others (five folds), and the "
        "threshold goes by medians, as that of self-labels which overrule: the obvious rival where labels may be wrong.",
        f"{_OWN}; the classifier is scikit-learn’s",
        short="classifier may overrule",
    ),
    "demix": Card(
        "DEMix, forget expert dropped",
        "routing",
        "Either side has an expert in place of most of the MLP. Labeled rows are seen without the other side's, unlabeled "
        "rows teach both, and the forget expert is dropped. The negative control for absorption: nothing sends unlabeled "
        "forget data to it.",
        "arXiv 2108.05036",
        "DEMix",
    ),
    "era": Card(
        "ERA without its fine-tuning for coherence",
        "routing",
        "Expand, Route, Ablate. On rows labeled forget the gradient at the activations of the base's MLPs has the weight "
        "−0.75, weighed by how much a token belongs to the forget side; unlabeled rows train everything. Without the "
        "paper's fine-tuning for coherence after ablation.",
        f"{_GRADIENT_ROUTING}, section 4.2",
        "ERA, only ablated",
    ),
    "era_coherent": Card(
        "ERA",
        "routing",
        "The former, and then up to 41 steps on 64 rows labeled retain as one batch, at two learning rates; the weights "
        "with the lowest loss on other rows labeled retain are kept.",
        f"{_GRADIENT_ROUTING}, section 4.2 and its appendix",
        "ERA",
    ),
    "sgtm": Card(
        "SGTM’s routes, ablated",
        "routing",
        "Selective gradient masking. Rows labeled forget teach only the region, rows labeled retain are seen without it, "
        "unlabeled rows teach both and are absorbed by whichever side knows them already. The paper’s region has an attention "
        "head beside MLP units; here it is extra MLP units alone. Rows come in their natural shares, without a start on "
        "labeled ones.",
        "SGTM, arXiv 2512.05648, section 3",
        "SGTM",
    ),
    "routed": Card(
        "routed with self-labels, ablated",
        "routing",
        "SGTM's routes, after a start on labeled rows only; then the region itself labels every unlabeled row, by how much "
        "the loss falls with the region on. The rest of the run takes few forget rows, which teach the base nothing, and a few "
        "retain rows with the region on.",
        "this library, upon SGTM (arXiv 2512.05648) and the robustness term of GRAM (arXiv 2607.08077)",
        "routed, self-labels",
    ),
    "perfect_filter": Card(
        "perfect filter",
        "reference",
        "Leaves out every row that truly is forget data: the ideal, for which all labels would have to be known. "
        "Removed: 100 %.",
        "data filtering as usual, with labels that nobody has; why it stands here: docs/design.md §8",
    ),
}
"""By the key that summaries use, in the order of tables."""


UNDO = "undo-"
"""What the keys of UNDO's methods begin with; then comes alpha."""
VARIANT = ":"
"""What stands between a method's key and the settings by which a variant of it differs."""
NAMED = {'overrule=true,first_forget_share=0.5,threshold="median",score_again_at=0.4': "may overrule labels"}
"""Settings that belong together, and their name for readers."""


def variant_name(changes: str) -> str:
    """Write the settings of a variant for readers, or their name where they have one.

    >>> variant_name('forget_share=0.2,by_document=true,threshold="median"')
    'forget share=0.2, by document, threshold=median'
    >>> variant_name(next(iter(NAMED)))
    'may overrule labels'
    """
    return NAMED.get(changes) or changes.replace("=true", "").replace("_", " ").replace(",", ", ").replace('"', "")


def base_of(method: str) -> str:
    """Return the method of which this is a variant, or itself.

    >>> base_of("routed:forget_share=0.2"), base_of("filter")
    ('routed', 'filter')
    """
    return method.partition(VARIANT)[0]


def card(method: str, settings: Mapping[str, Any] | None = None) -> Card:
    """Return the card of a method; one that says so where the method is not known.

    Args:
        method: key.
        settings: of the experiment: they tell whether what is routed finds labels by itself.

    Example:
        >>> card("rmu").name, card("undo-0.6").name, card("mine").name, card("routed", {"self_labels": False}).name
        ('RMU', 'UNDO, alpha 0.6', 'mine', 'routed, ablated')
        >>> card("routed:forget_share=0.2").name
        'routed with self-labels, ablated, forget share=0.2'
    """
    base, _, changes = method.partition(VARIANT)
    if changes:
        own, written = card(base, settings), variant_name(changes)
        return replace(own, name=f"{own.name}, {written}", short=written)
    if method == "routed" and settings is not None and not settings.get("self_labels", True):
        about = "SGTM's routes, with a share of labeled rows as the settings say; the region is ablated."
        return replace(
            CARDS["routed"], name="routed, ablated", short="routed", about=about, source=CARDS["sgtm"].source
        )
    if method.startswith(UNDO):
        undo, alpha = CARDS["undo"], method.removeprefix(UNDO)
        return replace(undo, name=f"{undo.name}, alpha {alpha}", short=f"UNDO {alpha}")
    return CARDS.get(method) or Card(method, "output", "No description is known of this method.")


def in_order(methods: list[str]) -> list[str]:
    """Sort methods as tables show them: known ones first, the others as they came.

    >>> in_order(["mine", "filter", "undo-1", "undo-0", "no_routing"])
    ['no_routing', 'undo-0', 'undo-1', 'filter', 'mine']
    """
    known = list(CARDS)

    def place(method: str) -> tuple[int, str]:
        undo = method.startswith(UNDO)
        key, _, changes = method.partition(VARIANT)
        key = "undo" if undo else key
        return (known.index(key) if key in known else len(known), method if undo else changes)

    return sorted(methods, key=place)
