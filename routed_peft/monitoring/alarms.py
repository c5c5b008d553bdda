"""CUSUM and hard-limit alarms on measured series, and the status of a run that follows from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from routed_peft.monitoring.config import MonitorConfig

OK, WARN, HALT = "ok", "warn", "halt"

_LEAST_SPREAD = 1e-6
_LEAST_RELATIVE_SPREAD = 0.01  # of the mean: a series may be almost constant while it is calibrated


@dataclass
class Cusum:
    r"""A one-sided cumulative sum (Page, Biometrika 41, 1954), calibrated on its own first values.

    .. math:: S_t = \max(0, S_{t-1} + \min(z_t, h)), \qquad z_t = \frac{x_t - \mu_0}{\sigma_0} - k

    with mean and standard deviation of the first ``calibration`` values, slack ``k`` and threshold ``h``. No single value
    counts more than the threshold, so that one outlier alone raises no alarm. A value that is not finite counts as ``h``.

    ``level`` is S, and above ``threshold`` an alarm. ``mean`` and ``squares`` (of deviations from it) are of the ``count``
    values calibrated on.

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
        calibrated = min(self.count, self.calibration)
        deviation = math.sqrt(self.squares / (calibrated - 1)) if calibrated > 1 else 0.0
        return max(deviation, _LEAST_RELATIVE_SPREAD * abs(self.mean), _LEAST_SPREAD)

    @property
    def alarm(self) -> bool:
        """Whether the sum is above the threshold."""
        return self.level > self.threshold

    def update(self, value: float) -> None:
        """Add the next value."""
        finite = math.isfinite(value)
        if self.count < self.calibration:
            if finite:  # Welford's running mean and variance
                self.count += 1
                before = value - self.mean
                self.mean += before / self.count
                self.squares += before * (value - self.mean)
            return
        z = (value - self.mean) / self.spread - self.slack if finite else math.inf
        self.level = max(0.0, self.level + min(z, self.threshold))


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
        level = 0.0
        if self.cusum is not None:
            self.cusum.update(value)
            level = self.cusum.level
        alarm = over or (self.cusum is not None and self.cusum.alarm)
        self.streak = self.streak + 1 if alarm else 0
        self.clean = not over and level == 0
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
            metric, c = name.rpartition("/")[2], self.config
            if name not in self.series:
                cusum = Cusum(c.calibration, c.slack, c.threshold) if metric in c.watch else None
                self.series[name] = Series(cusum, c.limit(metric))
            self.series[name].observe(step, value)

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
        self.series = {}
        for name, saved in state.items():
            metric, c = name.rpartition("/")[2], self.config
            own = {"slack": c.slack, "threshold": c.threshold}
            cusum = Cusum(**{**saved["cusum"], **own}) if saved["cusum"] and metric in c.watch else None
            self.series[name] = Series(**{**saved, "cusum": cusum, "limit": c.limit(metric)})
