"""Settings of the demo: four arms, and the numbers that they share."""

from __future__ import annotations

from dataclasses import dataclass

from routed_peft.training.self_label_config import SelfLabelConfig, setting


@dataclass(frozen=True)
class DemoSettings(SelfLabelConfig):
    """Settings of the demo, the same for every arm; those of `SelfLabelConfig` matter to the routed arm alone.

    Attributes:
        pair: forget and retain text, a key of `routed_peft.corpora.PAIRS`.
        documents: number of training documents of each side; None for all.
        labeled: share of the documents of each side that carry a label.
        recall: share of the labeled forget documents that are labeled forget (`routed_peft.data.simulate_labels`).
        precision: share of the documents labeled forget that are.
        self_labels: whether the region then labels the unlabeled rows, in the routed arm (`SelfLabeledRows`).
        base_weight: gradient weight of forget rows on the base, in the routed arm. A little above 0 lets them teach it what
            both sides share, at the price of a little of what they do not.
        frequency_weights: whether forget rows teach the base, in the routed arm, as far as their tokens are as common in retain
            text (`routed_peft.data.token_frequency_weights`), and at ``base_weight`` otherwise; with self-labels only.
        mixed_rows: whether rows mix the sides of documents that have the same label, or none. By default they do not, as a page
            of a longer text does not: then the truth has sorted unlabeled text into rows.
        by_document: whether the region is asked about documents and not about rows, in the routed arm; with ``mixed_rows``.
        region_learning_rate: peak learning rate of the region, in the routed arm; None for ``learning_rate``.
        evaluations: how often the validation losses are taken during training.
        validation_rows: packed rows per side for that.
        limit: documents per side and questions per task, in the final measurements.
        relearn_documents: forget documents that the attacker has.
        relearn_steps: steps at which the attacker's model is measured; the last one ends the attack.
        relearn_learning_rates: all are tried, and the worst case counts.
        relearn_limit: test documents for that.
    """

    pair: str = "biology"
    steps: int = 500
    batch_size: int = 16
    length: int = 128
    documents: int | None = None
    vocab_size: int = 2048
    layers: int = 4
    hidden_size: int = 128
    intermediate_size: int = 384
    heads: int = 4
    region_size: int = 64
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    weight_decay: float = 0.1
    labeled: float = 0.5
    recall: float = 1.0
    precision: float = 1.0
    self_labels: bool = True
    robust_share: float = setting("robust_share", 0.05)
    base_weight: float = 0.0
    frequency_weights: bool = False
    mixed_rows: bool = False
    by_document: bool = False
    region_learning_rate: float | None = None
    seed: int = 0
    evaluations: int = 10
    validation_rows: int = 32
    limit: int = 200
    relearn_documents: int = 16
    relearn_steps: tuple[int, ...] = (0, 5, 10, 20)
    relearn_learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    relearn_limit: int = 100

    def __post_init__(self) -> None:
        if self.self_labels:
            super().__post_init__()

    @classmethod
    def quick(cls) -> DemoSettings:
        """Return the settings of ``--quick``: fewer documents, tokens and questions, the same model and attack.

        >>> DemoSettings.quick().steps < DemoSettings().steps
        True
        """
        return cls(
            steps=160,
            batch_size=8,
            documents=8000,
            warmup_steps=20,
            evaluations=4,
            validation_rows=16,
            limit=50,
            relearn_steps=(0, 5, 20),
            relearn_learning_rates=(3e-4, 1e-3),
            relearn_limit=30,
        )

    @property
    def tokens(self) -> int:
        """Training tokens per arm."""
        return self.steps * self.batch_size * self.length


@dataclass(frozen=True)
class Arm:
    """A way to train.

    Attributes:
        key: name of its directory, and in files.
        name: name for readers.
        about: its treatment of forget data.
        drop: column in which the value "forget" keeps a row out of training.
        routed: whether gradients are routed; otherwise the region's units are ordinary parameters.
        era: whether they are routed as published for ERA (arXiv 2410.04332): masks at activations, by token frequency.
        demix: whether either side has an expert of its own, in place of most of the MLP (`routed_peft.presets.demix`).
    """

    key: str
    name: str
    about: str
    drop: str | None = None
    routed: bool = False
    era: bool = False
    demix: bool = False

    @property
    def plain(self) -> str:
        """Name of the directory of its plain checkpoint."""
        return "ablated" if self.routed else "plain"


ARMS = (
    Arm("no_routing", "no routing", "trains on everything, and removes nothing"),
    Arm("filter", "filter, same labels", "leaves out what is labeled forget", drop="route_label"),
    Arm("routed", "routed", "sends what is labeled forget to the region, then ablates the region", routed=True),
    Arm("perfect_filter", "perfect filter", "leaves out all true forget data: the ideal, out of reach", drop="side"),
)
"""The arms, in the order in which they are trained and shown."""
