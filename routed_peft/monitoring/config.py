"""`MonitorConfig`: how often a run is looked at, what is an alarm, and what an alarm does."""

from __future__ import annotations

from dataclasses import dataclass, field

METRICS = ("growth", "raw_contribution", "functional_size", "kl", "reward_gap", "weight_drift")
"""What can be watched, per region; all but growth and weight drift is the largest over environments."""

ACTIONS = ("halt", "warn", "log")


@dataclass
class MonitorConfig:
    """Settings of a `RegionMonitor`; plain data, so that a YAML can hold them.

    The thresholds are starting values, which no literature fixes: calibrate them on a run whose environments are believed
    to be secure. Those of KL and functional size lie above what a region does that merely drifts (``docs/monitoring.md``).
    A region that is *meant* to fill, with labelled data say, will set them off: use ``action="log"`` there.

    Attributes:
        every: optimizer steps from one observation to the next; in state "warn" every step is observed.
        probe_rows: rows per process and observation for the extra forward passes that measure KL and functional size.
        reward_every: steps between measurements of the reward gap, where the monitor is given a reward.
        watch: metrics with a CUSUM, out of `METRICS`. KL and
            functional size start from nothing and rise in every training, so a limit suits them better.
        calibration: observations from which mean and spread of a series are taken; it cannot raise a CUSUM alarm before.
        slack: what a CUSUM forgives, in calibrated standard deviations.
        threshold: a CUSUM above this is an alarm.
        max_kl: KL(full ‖ ablated) in nats per token, in any environment, above which there is an alarm; None: no limit.
        max_functional_size: RMS of a region's output over that of its layers' output, likewise.
        max_reward_gap: mean reward full less ablated, likewise.
        max_weight_drift: how far the base has moved along a region's subspace, likewise: the leak that projection prevents.
        patience: successive observations of one alarm that halt the run; fewer warn.
        action: "halt", "warn" (alarms save a checkpoint and are looked into at every step, but nothing halts) or "log".
        blame: an incident names the fewest environments that make up this share of all positive contributions.
        exempt: environments that raise no alarm and are named in no incident: those whose rewards nothing fools, and those that
            are meant to fill a region. They are measured all the same.
        samples: rows per environment that an incident shows.
        by_layer: log sizes and contributions of every layer as well.
        random_subspaces: random subspaces beside which a subspace region's energy share is logged.

    Raises:
        ValueError: on values out of range.

    Example:
        >>> MonitorConfig(patience=0)
        Traceback (most recent call last):
        ...
        ValueError: `patience` must be at least 1, got 0
    """

    every: int = 20
    probe_rows: int = 4
    reward_every: int = 100
    watch: list[str] = field(default_factory=lambda: ["growth", "raw_contribution", "reward_gap"])
    calibration: int = 20
    slack: float = 0.5
    threshold: float = 5.0
    max_kl: float | None = 1.0
    max_functional_size: float | None = 0.5
    max_reward_gap: float | None = 0.1
    max_weight_drift: float | None = 0.01
    patience: int = 3
    action: str = "halt"
    blame: float = 0.5
    exempt: list[str] = field(default_factory=list)
    samples: int = 3
    by_layer: bool = False
    random_subspaces: int = 3

    def __post_init__(self) -> None:
        least = {"every": 1, "probe_rows": 1, "reward_every": 1, "calibration": 2, "patience": 1, "samples": 0}
        for name, minimum in {**least, "random_subspaces": 0}.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"`{name}` must be at least {minimum}, got {getattr(self, name)}")
        if self.slack < 0 or self.threshold <= 0:
            raise ValueError(
                f"`slack` must not be negative and `threshold` positive, got {self.slack} and {self.threshold}"
            )
        if not 0 < self.blame <= 1:
            raise ValueError(f"`blame` is a share, above 0 and at most 1, got {self.blame}")
        if unknown := sorted(set(self.watch) - set(METRICS)):
            raise ValueError(f"`watch` has {unknown}; there are {list(METRICS)}")
        if self.action not in ACTIONS:
            raise ValueError(f"`action` must be one of {ACTIONS}, got {self.action!r}")

    def limit(self, metric: str) -> float | None:
        """Return the hard limit of a metric, if it has one."""
        value: float | None = getattr(self, f"max_{metric}", None)
        return value
