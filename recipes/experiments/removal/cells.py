"""Cells of the experiment: each is one method at one share of labels and one seed, made once for all experiments."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from experiments.removal.methods import ALLOWED_RISE, EXTENSIONS, METHODS, UNLEARNING, UNLEARNING_STEPS, Method
from experiments.removal.settings import Settings
from experiments.report.methods import VARIANT, base_of
from routed_peft.evaluation.relearning import Attack
from routed_peft.evaluation.relearning.curves import check_grid
from routed_peft.mistakes import option
from routed_peft.training.self_label_config import SETTING_NAMES

ROUTING = (*SETTING_NAMES, "self_labels", "base_weight", "frequency_weights", "by_document", "region_learning_rate")
"""Settings that mean something to routed arms alone."""
VARIABLE = (*ROUTING, "region_size")
"""Settings in which a routed arm may differ from the others of an experiment."""
DEFAULTS = {"overrule": False, "first_forget_share": 0.5, "threshold": "midpoint", "score_again_at": None,
            "frequency_weights": False, "mixed_rows": False, "by_document": False, "attack_split": "validation"}  # fmt: skip
"""Values of settings that were added later, for cells and summaries from before."""
SPLITS = ("validation", "train")
LABELS = ("labeled", "recall", "precision")
ATTACKING = ("relearn_documents", "relearn_steps", "relearn_learning_rates", "relearn_limit")


@dataclass
class Experiment:
    """Methods, labels, seeds and attacks to be compared; the rest is `Settings`."""

    summary_file: str = field(metadata={"help": "JSON with the numbers of every cell."})
    cells_dir: str = option("runs/cells", "Where every cell has its directory.")
    methods: list[str] = option(["no_routing", "filter", "routed", "perfect_filter"], f"Of {', '.join(METHODS)}; with other "
        "settings of routing as in routed:forget_share=0.2,robust_share=0.1.")  # fmt: skip
    seeds: list[int] = option([0, 1, 2], "Of labels, order and weights.")
    labeled_shares: list[float] = option([0.5], "Shares of the documents of either side that carry a label.")
    attacks: list[str] = option([], "Relearning attacks on every model, such as few-shot-16, forget, mixed; or none.")
    attack_rates: list[float] = option([3e-4, 1e-3, 3e-3], "Learning rates tried; the worst case counts.")
    attack_steps: list[int] = option([0, 1, 2, 5, 10, 20, 40, 80], "Steps at which attacks are measured.")
    attack_split: str = option("validation", "Whose documents attackers have: validation, which no model saw, or "
        "train, which models without a filter were trained on.")  # fmt: skip
    extensions: int = option(1, "Rates added beyond either end while the best is there.")
    label_quality: list[str] = option(["1/1"], "RECALL/PRECISION of the labels, such as 0.9/0.8.")

    collect: bool = option(False, "Make nothing: write the summary of the cells that are there.")

    def __post_init__(self) -> None:
        self.attacks = [name for name in self.attacks if name != "none"]  # a list on the command line cannot be empty
        if self.attack_split not in SPLITS:
            raise ValueError(f"`attack_split` must be one of {', '.join(SPLITS)}, got {self.attack_split!r}")
        for name in self.attacks:  # now, and not when the first model has been trained
            Attack.parse(name)
        check_grid(self.attack_rates, self.seeds, steps=self.attack_steps, names=("attack_rates", "attack_steps"))
        for quality in self.label_quality:
            parse_quality(quality)


def parse_quality(text: str) -> tuple[float, float]:
    """Read RECALL/PRECISION.

    >>> parse_quality("0.9/0.8")
    (0.9, 0.8)
    """
    try:
        recall, precision = map(float, text.split("/"))
    except ValueError:
        raise ValueError(f"`label_quality` takes RECALL/PRECISION, such as 0.9/0.8, got {text!r}") from None
    return recall, precision


@dataclass(frozen=True)
class MethodCell:
    """One method at one share of labels and one seed.

    Attributes:
        shown: the method that was asked for.
        name: the method by which it is made: another where none or all of the labels are there, see `twin`.
        method: that one.
        settings: the experiment's, with neutral values where the method does not look.
        labels: share, recall and precision of the labels that were asked for; nothing where ``shown`` looks at none.
    """

    shown: str
    name: str
    method: Method
    settings: Settings
    labels: dict[str, float]

    @classmethod
    def from_method(cls, shown: str, settings: Settings) -> MethodCell:
        """Return the cell of a method, or of a variant of it, under an experiment's settings."""
        asked, _, changes = shown.partition(VARIANT)
        changed = variant(changes)
        settings = replace(settings, labeled=float(settings.labeled), **changed)
        name, plain = twin(asked, settings), Settings()
        method = METHODS[name]
        neutral = {key: getattr(plain, key) for key in irrelevant(method)}
        if fixed := sorted({*irrelevant(METHODS[asked]), *METHODS[asked].settings} & set(changed)):
            raise ValueError(f"`methods`: {shown!r} changes `{fixed[0]}`, which {asked!r} does not go by")
        labels = {key: getattr(settings, key) for key in LABELS} if METHODS[asked].labels else {}
        return cls(shown, name, method, replace(settings, **(neutral | method.settings)), labels)

    @property
    def parent(self) -> MethodCell | None:
        """The cell whose model this one's is made from."""
        return MethodCell.from_method(self.method.parent, self.settings) if self.method.parent else None

    @property
    def directory(self) -> str:
        """Name of its directory; settings tell directories of one name apart."""
        share = f"-{self.settings.labeled:g}" if self.method.labels else ""
        return f"{self.settings.pair}-{self.name}{share}-{self.settings.seed}"

    @property
    def row(self) -> dict[str, Any]:
        """Fields that identify it in a summary."""
        return {"method": self.shown, "seed": self.settings.seed} | {name: self.labels.get(name) for name in LABELS}

    def depends_on(self) -> dict[str, Any]:
        """Return all that its model depends on, as data that JSON can hold."""
        left_out, method, parent = irrelevant(self.method), self.method, self.parent
        about: dict[str, Any] = {key: v for key, v in asdict(self.settings).items() if key not in left_out}
        about["method"] = self.name
        if method.relabel:
            about["relabel"] = method.relabel.__name__
        if method.change in UNLEARNING:
            about["unlearning"] = {"weights": method.unlearning, "rates": method.rates, "steps": UNLEARNING_STEPS,
                                   "extensions": EXTENSIONS, "allowed_rise": ALLOWED_RISE}  # fmt: skip
        if parent and (parent.method.change is not None or parent.method.arm.routed):  # else settings tell it all
            about["made_from"] = parent.depends_on()
        return about


def variant(changes: str) -> dict[str, Any]:
    """Read the settings by which a method differs from the experiment: NAME=VALUE, by commas.

    Raises:
        ValueError: for a setting that is not one of routing or the size of its region, or a value that JSON cannot read.

    Example:
        >>> variant("forget_share=0.2,self_labels=false"), variant("")
        ({'forget_share': 0.2, 'self_labels': False}, {})
    """
    found = {}
    for change in filter(None, changes.split(",")):
        name, _, value = change.partition("=")
        try:
            found[name] = json.loads(value)
        except ValueError:
            raise ValueError(
                f"`methods`: a variant is NAME=VALUE with a number, true, false, null or text in double quotes, "
                f"got {change!r}"
            ) from None
        if name not in VARIABLE:
            raise ValueError(f"`methods`: a variant changes one of {', '.join(VARIABLE)}, got {change!r}")
    return found


def twin(name: str, settings: Settings) -> str:
    """Return the method that makes the same model without looking at labels, where there is one.

    With all labels, and right ones, filtering by them is the perfect filter, and a classifier has nothing to add. Without
    any, there is nothing to filter or to unlearn, and all rows train base and region alike, whichever way labeled ones
    would have been routed.

    Raises:
        ValueError: for UNDO without labels, which has nothing to start from.

    Example:
        >>> none, all = Settings(labeled=0.0), Settings(labeled=1.0)
        >>> twin("filter", none), twin("routed", none), twin("npo", none), twin("filter", all), twin("routed", all)
        ('no_routing', 'control', 'no_routing', 'perfect_filter', 'routed')
    """
    method = METHODS[name]
    if name in ("filter", "classifier_filter", "classifier_filter_balanced") and all(
        getattr(settings, label) == 1 for label in LABELS
    ):
        return "perfect_filter"
    if not method.labels or settings.labeled > 0:
        return name
    if method.change == "undo":
        raise ValueError(
            f"`methods` has {name!r} and `labeled_shares` has 0: without labels nothing was unlearned before"
        )
    return "control" if method.arm.routed else "no_routing"


def adds_nothing(name: str, settings: Settings) -> bool:
    """Return whether a method's cell would repeat another's and be no measurement of it.

    Without labels nothing is unlearned, found by a classifier, or made longer; with all of them a classifier finds nothing.

    >>> adds_nothing("npo", Settings(labeled=0.0)), adds_nothing("routed", Settings(labeled=0.0))
    (True, False)
    """
    method = METHODS[name]
    derived = method.change is not None or method.relabel is not None or method.equal_retain
    if settings.labeled == 0:
        return method.labels and derived
    return method.relabel is not None and twin(name, settings) == "perfect_filter"


def irrelevant(method: Method) -> list[str]:
    """Return the settings that change nothing about a method's model."""
    routed = method.arm.routed or (method.parent is not None and METHODS[method.parent].arm.routed)
    return [
        *ATTACKING,
        *(() if routed or method.equal_retain else ROUTING),
        *(() if method.labels else (*LABELS, "mixed_rows")),
    ]


def all_cells(experiment: Experiment, settings: Settings) -> list[MethodCell]:
    """Return the cells of an experiment, those of a seed together, each once."""
    if unknown := [name for name in experiment.methods if base_of(name) not in METHODS]:
        raise ValueError(f"`methods` has {unknown}; the methods are {list(METHODS)}")
    cells: dict[str, MethodCell] = {}
    for seed in experiment.seeds:
        for quality in experiment.label_quality:
            recall, precision = parse_quality(quality)
            for labeled in experiment.labeled_shares:
                here = replace(settings, seed=seed, labeled=labeled, recall=recall, precision=precision)
                for name in experiment.methods:
                    if len({*experiment.labeled_shares}) > 1 and adds_nothing(base_of(name), here):
                        continue
                    cell = MethodCell.from_method(name, here)
                    cells.setdefault(json.dumps([name, cell.depends_on()], sort_keys=True), cell)
    return list(cells.values())
