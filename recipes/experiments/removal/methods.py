"""The methods that are compared, each in a few words over the demo and `routed_peft.unlearning`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from experiments.removal.settings import DEMO_ARMS, MethodArm
from routed_peft.data import FORGET, RETAIN, UNLABELED
from routed_peft.training.benefit import benefit_threshold


@dataclass(frozen=True)
class Method:
    """One way to make a model.

    Attributes:
        arm: how it is trained.
        settings: what differs from the experiment's own.
        labels: whether it looks at labels.
        relabel: changes the labels of the training documents first.
        equal_retain: whether it is trained until it has seen as much retain text as teaches the base of the routed arm.
        parent: the method from whose trained model this one is made.
        change: what is done to the parent's model: "ablate" its region, "random" units as many as the region has, a method
            of `routed_peft.unlearning`, "undo", or "cohere" (`experiments.common.coherence`).
        unlearning: what its `routed_peft.unlearning.UnlearningArguments` say besides the method.
        rates: learning rates of unlearning that are tried to begin with.
        noise: alpha and beta of UNDO.
    """

    arm: MethodArm
    settings: dict[str, Any] = field(default_factory=dict)
    labels: bool = True
    relabel: Callable[[Dataset], Dataset] | None = None
    equal_retain: bool = False
    parent: str | None = None
    change: str | None = None
    unlearning: dict[str, Any] = field(default_factory=dict)
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    noise: tuple[float, float] = (0.0, 0.0)

    @property
    def plain(self) -> str:
        """Name of the directory of its plain checkpoint."""
        return "changed" if self.parent else self.arm.plain


def tfidf_labels(ds: Dataset) -> Dataset:
    """Label every unlabeled document by a classifier of words and word pairs that was trained on the labeled ones."""
    return _tfidf(ds)


def tfidf_balanced(ds: Dataset) -> Dataset:
    """The same, with the threshold of self-labels, `benefit_threshold`: of scores that labeled documents get from others."""
    return _tfidf(ds, "balanced")


def tfidf_overrule(ds: Dataset) -> Dataset:
    """Label every document, labeled ones by a classifier that was not trained on them, and with medians for the threshold."""
    return _tfidf(ds, "median", overrule=True)


def _tfidf(ds: Dataset, threshold: str | None = None, overrule: bool = False) -> Dataset:
    texts, labels = ds["text"][:], np.array(ds["route_label"][:])
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict

    features = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True).fit_transform(texts)
    known = np.flatnonzero(labels != UNLABELED)
    classifier = LogisticRegression(C=10, max_iter=1000).fit(features[known], labels[known])
    towards, _ = classifier.classes_  # forget: names are sorted, and scores are those of the second
    assert towards == FORGET
    scores, above = -classifier.decision_function(features), 0.0
    if threshold is not None:
        held_out = -cross_val_predict(classifier, features[known], labels[known], cv=5, method="decision_function")
        forget, retain = (torch.from_numpy(held_out[labels[known] == side]) for side in (FORGET, RETAIN))
        above = benefit_threshold(forget, retain, threshold)
        if overrule:
            scores[known] = held_out
    found = np.where(scores > above, FORGET, RETAIN)
    given = found if overrule else np.where(labels == UNLABELED, found, labels)
    return ds.remove_columns("route_label").add_column("route_label", given.tolist())


PLAIN = {
    "labeled_first": 0.0, "first_forget_share": 0.5, "self_labels": False, "threshold": "midpoint", "score_again_at": None,
    "forget_share": None, "robust_share": 0.0, "overrule": False, "frequency_weights": False, "by_document": False,
}  # fmt: skip
UNLEARNING_STEPS = 100
EXTENSIONS = 4
"""Most learning rates that are tried beyond those of a method."""
ALLOWED_RISE = 0.05
"""Share by which unlearning may raise the validation loss on retain text; its learning rate is chosen under that limit."""
COHERENCE_STEPS = 41
"""After ablation, in ERA; as published."""
COHERENCE_RATES = (5e-5, 3e-4)
"""The published rate, and the published share of the peak rate of training, which is higher here: the better one counts."""
ALPHAS = (0.0, 0.2, 0.4, 0.6, 0.8)
UNLEARNING: dict[
    str, tuple[dict[str, Any], tuple[float, ...]]
] = {  # name -> weights, as in recipes/configs/unlearn_*.yaml, and rates up to what harms retain text too much
    "graddiff": ({"alpha": 5.0}, (3e-5, 1e-4, 3e-4, 1e-3)),
    "gradient_ascent": ({}, (1e-5, 3e-5, 1e-4, 3e-4)),
    "npo": ({"beta": 0.02, "retain_loss": "kl"}, (3e-4, 1e-3, 3e-3, 1e-2)),
    "simnpo": ({"beta": 0.5}, (1e-4, 3e-4, 1e-3, 3e-3)),
    "rmu": ({"alpha": 10.0}, (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
    "maxent": ({"retain_loss": "ce"}, (1e-4, 3e-4, 1e-3)),
}

METHODS = {
    "no_routing": Method(DEMO_ARMS["no_routing"], labels=False),
    "perfect_filter": Method(DEMO_ARMS["perfect_filter"], labels=False),
    "filter": Method(DEMO_ARMS["filter"]),
    "filter_equal_retain": Method(DEMO_ARMS["filter"], equal_retain=True),
    "classifier_filter": Method(DEMO_ARMS["filter"], relabel=tfidf_labels),
    "classifier_filter_balanced": Method(DEMO_ARMS["filter"], relabel=tfidf_balanced),
    "classifier_filter_overrule": Method(DEMO_ARMS["filter"], relabel=tfidf_overrule),
    "routed": Method(DEMO_ARMS["routed"]),
    "sgtm": Method(DEMO_ARMS["routed"], PLAIN),
    "era": Method(replace(DEMO_ARMS["routed"], era=True), PLAIN),
    "era_coherent": Method(replace(DEMO_ARMS["routed"], era=True), PLAIN, parent="era", change="cohere"),
    "demix": Method(replace(DEMO_ARMS["routed"], demix=True), PLAIN),
    "control": Method(DEMO_ARMS["no_routing"], labels=False, parent="no_routing", change="ablate"),
    "random_units": Method(DEMO_ARMS["no_routing"], labels=False, parent="no_routing", change="random"),
} | {
    name: Method(DEMO_ARMS["no_routing"], parent="no_routing", change=name, unlearning=weights, rates=rates)
    for name, (weights, rates) in UNLEARNING.items()
}
METHODS |= {
    f"undo-{alpha:g}": Method(DEMO_ARMS["no_routing"], parent="maxent", change="undo", noise=(alpha, 0.1))
    for alpha in ALPHAS
}
METHODS["undo-1"] = Method(DEMO_ARMS["no_routing"], parent="maxent", change="undo", noise=(1.0, 1.0))
METHODS["routed_undo"] = Method(DEMO_ARMS["no_routing"], parent="routed", change="undo", noise=(0.6, 0.1))
"""The methods by name."""
