"""What an experiment consists of: cells, each one method at one share of labels and one seed, made once for all experiments."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace

from routed_peft.demo.settings import DemoSettings
from routed_peft.experiment.methods import METHODS, Method

NUMBERS = "numbers.json"
ROUTING = (  # settings that mean something to routed arms alone
    "labeled_first", "self_labels", "forget_share", "robust_share", "base_weight", "region_learning_rate",
)  # fmt: skip
LABELS = ("labeled", "recall", "precision")
ATTACKING = ("relearn_documents", "relearn_steps", "relearn_learning_rates", "relearn_limit")


@dataclass
class Experiment:
    """What is compared; the rest is `DemoSettings`."""

    summary_file: str = field(metadata={"help": "JSON with the numbers of every cell."})
    cells_dir: str = field(default="runs/cells", metadata={"help": "Where every cell has its directory."})
    methods: list[str] = field(
        default_factory=lambda: ["no_routing", "filter", "routed", "perfect_filter"],
        metadata={"help": f"Of {', '.join(METHODS)}."},
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Of labels, order and weights."})
    labeled_shares: list[float] = field(
        default_factory=lambda: [0.5], metadata={"help": "Shares of the documents of either side that carry a label."}
    )
    attacks: list[str] = field(
        default_factory=list,
        metadata={"help": "Relearning attacks on every model, such as few-shot-16, forget, mixed; or none."},
    )
    attack_rates: list[float] = field(
        default_factory=lambda: [3e-4, 1e-3, 3e-3], metadata={"help": "Learning rates tried; the worst case counts."}
    )
    attack_steps: list[int] = field(
        default_factory=lambda: [0, 1, 2, 5, 10, 20, 40, 80], metadata={"help": "Steps at which attacks are measured."}
    )
    extensions: int = field(default=1, metadata={"help": "Rates added beyond either end while the best is there."})
    label_quality: list[str] = field(
        default_factory=lambda: ["1/1"], metadata={"help": "RECALL/PRECISION of the labels, such as 0.9/0.8."}
    )

    def __post_init__(self) -> None:
        self.attacks = [name for name in self.attacks if name != "none"]  # a list on the command line cannot be empty


@dataclass(frozen=True)
class Cell:
    """One method at one share of labels and one seed; `settings` has what it depends on."""

    name: str
    method: Method
    settings: DemoSettings

    @classmethod
    def of(cls, name: str, settings: DemoSettings) -> Cell:
        """Return the cell of a method under an experiment's settings."""
        method, plain = METHODS[name], DemoSettings()
        neutral = {key: getattr(plain, key) for key in irrelevant(method)}
        return cls(name, method, replace(settings, **(neutral | method.settings)))

    @property
    def key(self) -> str:
        """Name of its directory: where all labels are there and right, the filter by labels is the perfect filter."""
        if self.name == "filter" and all(getattr(self.settings, name) == 1 for name in LABELS):
            return Cell.of("perfect_filter", self.settings).key
        relevant = {key: value for key, value in asdict(self.settings).items() if key not in irrelevant(self.method)}
        about = json.dumps([self.name, relevant], sort_keys=True)
        share = f"-{self.settings.labeled:g}" if self.method.labels else ""
        digest = hashlib.sha256(about.encode()).hexdigest()[:8]
        return f"{self.settings.pair}-{self.name}{share}-{self.settings.seed}-{digest}"


def irrelevant(method: Method) -> list[str]:
    """Return the settings that change nothing about a method's model."""
    return [
        *ATTACKING,
        *(() if method.arm.routed or method.equal_retain else ROUTING),
        *(() if method.labels else LABELS),
    ]


def all_cells(experiment: Experiment, settings: DemoSettings) -> list[Cell]:
    """Return the cells of an experiment, those of a seed together, each once."""
    if unknown := [name for name in experiment.methods if name not in METHODS]:
        raise ValueError(f"`methods` has {unknown}; the methods are {list(METHODS)}")
    cells: dict[tuple[str, str], Cell] = {}
    for seed in experiment.seeds:
        for quality in experiment.label_quality:
            recall, precision = (float(number) for number in quality.split("/"))
            for labeled in experiment.labeled_shares:
                here = replace(settings, seed=seed, labeled=labeled, recall=recall, precision=precision)
                for name in experiment.methods:
                    cell = Cell.of(name, here)
                    cells.setdefault((cell.key, name), cell)
    return list(cells.values())
