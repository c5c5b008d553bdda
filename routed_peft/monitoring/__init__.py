"""Monitoring: what regions learn while they learn it, from whom, and what to do when they learn too much."""

from routed_peft.monitoring.alarms import Alarms, Cusum
from routed_peft.monitoring.config import MonitorConfig
from routed_peft.monitoring.growth import Growth
from routed_peft.monitoring.incidents import Incident
from routed_peft.monitoring.monitor import RegionMonitor
from routed_peft.monitoring.probe import Effect
from routed_peft.monitoring.quarantine import treated
from routed_peft.monitoring.rollback import rollback, run_with_rollback

__all__ = [
    "Alarms",
    "Cusum",
    "Effect",
    "Growth",
    "Incident",
    "MonitorConfig",
    "RegionMonitor",
    "rollback",
    "run_with_rollback",
    "treated",
]
