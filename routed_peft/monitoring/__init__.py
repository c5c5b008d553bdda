"""Monitoring of regions while they train: growth by environment, alarms, incidents and rollback."""

from routed_peft.deprecation import renamed
from routed_peft.monitoring.alarms import Alarms, Cusum, MonitorConfig
from routed_peft.monitoring.growth import Growth
from routed_peft.monitoring.monitor import RegionMonitor
from routed_peft.monitoring.observation import Incident
from routed_peft.monitoring.probe import Effect
from routed_peft.monitoring.quarantine import apply_quarantine, rollback, run_with_rollback

__all__ = ["Alarms", "Cusum", "Effect", "Growth", "Incident", "MonitorConfig", "RegionMonitor", "apply_quarantine"]
__all__ += ["rollback", "run_with_rollback"]

__getattr__ = renamed(__name__, {"treated": "apply_quarantine"})
