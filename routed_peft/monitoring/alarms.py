"""Settings of a monitor, its CUSUM and hard-limit alarms on measured series, and the status of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from routed_peft.mistakes import check_numbers

OK, WARN, HALT = "ok", "warn", "halt"

METRICS = ("growth", "raw_contribution", "functional_size", "kl", "reward_gap", "weight_drift")
"""Metrics to watch, per region. All but growth and weight drift are maxima over environments."""


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
        numbers = [one.name for one in fields(self) if one.type in ("int", "float", "float | None")]
        check_numbers(self, *numbers, low=-math.inf)
        least = {"every": 1, "probe_rows": 1, "reward_every": 1, "calibration": 2, "patience": 1, "samples": 0}
        for name, minimum in {**least, "random_subspaces": 0}.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"`{name}` must be at least {minimum}, got {getattr(self, name)}")
        if self.slack < 0 or self.threshold <= 0:
            raise ValueError(f"`slack` must not be negative and `threshold` positive, got {self.slack} and "
                             f"{self.threshold}")  # fmt: skip
        if not 0 < self.blame <= 1:
            raise ValueError(f"`blame` is a share, above 0 and at most 1, got {self.blame}")
        if unknown := sorted(set(self.watch) - set(METRICS)):
            raise ValueError(f"`watch` has {unknown}; there are {list(METRICS)}")
        if self.action not in (actions := ("halt", "warn", "log")):
            raise ValueError(f"`action` must be one of {actions}, got {self.action!r}")

    def limit(self, metric: str) -> float | None:
        """Return the hard limit of a metric, if it has one."""
        return getattr(self, f"max_{metric}", None)


@dataclass
class Cusum:
    r"""A one-sided cumulative sum (Page, Biometrika 41, 1954), calibrated on its own first values.

    .. math:: S_t = \max(0, S_{t-1} + \min(z_t, h)), \qquad z_t = \frac{x_t - \mu_0}{\sigma_0} - k

    with mean and standard deviation of the first ``calibration`` values, slack ``k`` and threshold ``h``. No single value
    counts more than the threshold, so that one outlier alone raises no alarm. A value that is not finite counts as ``h``.
    ``level`` is S; ``mean`` and ``squares`` (of deviations from it) are of the ``count`` values calibrated on.

    >>> cusum = Cusum(calibration=4)
    >>> for x in [1.0, 3.0, 1.0, 3.0, 2.0, 4.0, 9.0, 9.0]:
    ...     cusum.update(x)
    >>> cusum.spread, cusum.level
    (1.15..., 11.2...)
    """

    calibration: int = 20
    slack: float = 0.5
    threshold: float = 5.0
    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    level: float = 0.0

    @property
    def spread(self) -> float:
        """The calibrated standard deviation, with a small lower bound."""
        deviation = math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else 0.0
        return max(deviation, 0.01 * abs(self.mean), 1e-6)  # a series may be almost constant while it is calibrated

    @property
    def alarm(self) -> bool:
        """Whether the sum is above the threshold."""
        return self.level > self.threshold

    def update(self, value: float) -> None:
        """Add the next value."""
        finite = math.isfinite(value)
        if self.count >= self.calibration:
            z = (value - self.mean) / self.spread - self.slack if finite else math.inf
            self.level = max(0.0, self.level + min(z, self.threshold))
        elif finite:  # Welford's running mean and variance
            self.count += 1
            before = value - self.mean
            self.mean += before / self.count
            self.squares += before * (value - self.mean)


@dataclass
class Series:
    """A watched number over the steps."""

    cusum: Cusum | None  # None if only the limit counts
    limit: float | None = None  # a value above it is an alarm at once
    value: float = 0.0  # the last one
    clean: bool = True  # the sum is 0 and the value within the limit
    clean_step: int = 0  # the last clean step, after which any trouble began
    streak: int = 0  # successive observations with an alarm

    def observe(self, step: int, value: float) -> None:
        """Add the value of a step."""
        self.value = value
        over = not math.isfinite(value) or (self.limit is not None and value > self.limit)
        if self.cusum is not None:
            self.cusum.update(value)
        self.streak = self.streak + 1 if over or (self.cusum and self.cusum.alarm) else 0
        self.clean = not over and not (self.cusum and self.cusum.level)
        if self.clean:
            self.clean_step = step


class Alarms:
    """All series of a run, by name ``region/metric``, and the status of the run.

    >>> alarms = Alarms(MonitorConfig(patience=2, max_kl=0.1))
    >>> for step in (10, 11, 12):
    ...     alarms.observe(step, {"forget/kl": 0.01 if step == 10 else 0.2})
    >>> alarms.status, alarms.onset_step
    ('halt', 10)
    """

    def __init__(self, config: MonitorConfig) -> None:
        self.config = config
        self.series: dict[str, Series] = {}

    def observe(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values of a step; a series without a value stays unchanged."""
        for name, value in values.items():
            if name not in self.series:
                self.series[name] = self._series(name, {"cusum": {"calibration": self.config.calibration}})
            self.series[name].observe(step, value)

    def _series(self, name: str, saved: Mapping[str, Any]) -> Series:
        metric, c = name.rpartition("/")[2], self.config
        watched = saved["cusum"] and metric in c.watch
        cusum = Cusum(**{**saved["cusum"], "slack": c.slack, "threshold": c.threshold}) if watched else None
        return Series(**{**saved, "cusum": cusum, "limit": c.limit(metric)})

    @property
    def status(self) -> str:
        """``"ok"``; ``"warn"`` with an alarm; ``"halt"`` with one that has lasted for ``patience`` observations."""
        longest = max((series.streak for series in self.series.values()), default=0)
        return HALT if longest >= self.config.patience else WARN if longest else OK

    @property
    def raised(self) -> dict[str, Series]:
        """The series with an alarm."""
        return {name: series for name, series in self.series.items() if series.streak}

    @property
    def onset_step(self) -> int:
        """The last step before the onset of anything that lasts: alarms, and sums on their way to one."""
        return min((series.clean_step for series in self.series.values() if not series.clean), default=0)

    @property
    def clean_step(self) -> int:
        """The last step at which every series was clean, for each as of its last measurement."""
        return min((series.clean_step for series in self.series.values()), default=0)

    def state(self) -> dict[str, Any]:
        """Return the state as plain data."""
        return {name: asdict(series) for name, series in self.series.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore a state from `state`; thresholds are those of the configuration."""
        self.series = {name: self._series(name, saved) for name, saved in state.items()}
