"""`MonitorConfig`: intervals, thresholds and actions of a `RegionMonitor`."""

from __future__ import annotations

from dataclasses import dataclass, field

METRICS = ("growth", "raw_contribution", "functional_size", "kl", "reward_gap", "weight_drift")
"""Metrics to watch, per region. All but growth and weight drift are maxima over environments."""

ACTIONS = ("halt", "warn", "log")


@dataclass
class MonitorConfig:
    """Settings of a `RegionMonitor`, as plain data for a YAML.

    The thresholds are starting values without a basis in literature. Calibrate them on a run with environments that are
    believed to be secure. Those of KL and functional size are above the values of a merely drifting region
    (``docs/monitoring.md``). A region that is *meant* to fill, say from labeled data, exceeds them: use ``action="log"``.

    Attributes:
        every: optimizer steps from one observation to the next; in state "warn" every step is observed.
        probe_rows: rows per process and observation for the extra forward passes that measure KL and functional size.
        reward_every: steps between measurements of the reward gap, where the monitor is given a reward.
        watch: metrics with a CUSUM, out of `METRICS`. KL and functional size start at 0 and rise in every training, so a
            limit suits them better.
        calibration: observations for mean and spread of a series; it can raise no CUSUM alarm before.
        slack: of a CUSUM, in calibrated standard deviations.
        threshold: a CUSUM above this is an alarm.
        max_kl: limit of KL(full ‖ ablated), in nats per token, in any environment; a larger value is an alarm. None: no limit.
        max_functional_size: likewise, of the RMS of a region's output over that of its layers' output.
        max_reward_gap: likewise, of the mean reward full minus ablated.
        max_weight_drift: likewise, of the base's movement along a region's subspace: the leak that projection prevents.
        patience: successive observations of one alarm that halt the run; fewer warn.
        action: "halt"; "warn" (alarms save a checkpoint, and every step is observed, but nothing halts); or "log".
        blame: an incident names the fewest environments with this share of all positive contributions.
        exempt: environments that raise no alarm and are named in no incident, such as those with secure rewards, and those
            meant to fill a region. They are measured all the same.
        samples: rows per environment in an incident.
        by_layer: log sizes and contributions of every layer as well.
        random_subspaces: number of random subspaces to compare with a subspace region's energy share.
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
            got = f"{self.slack} and {self.threshold}"
            raise ValueError(f"`slack` must not be negative and `threshold` positive, got {got}")
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
