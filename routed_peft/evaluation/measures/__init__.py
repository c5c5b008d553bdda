"""Formulas over losses, each with its unit and its source."""

from routed_peft.evaluation.measures.activity import Activity, region_activity
from routed_peft.evaluation.measures.crossing import Crossing, crossing
from routed_peft.evaluation.measures.removal import (
    absorption,
    compute_penalty,
    leakage,
    recovered,
    removed,
    retain_tax,
    tax,
    tokens_of_plain,
    way,
)
from routed_peft.evaluation.measures.robustness import (
    WorstCase,
    relearning_area,
    share_relearned,
    to_recover,
    within_utility,
    worst_case,
)
from routed_peft.evaluation.measures.statistics import Spread, bootstrap

__all__ = ["Activity", "Crossing", "Spread", "WorstCase", "absorption", "bootstrap", "compute_penalty", "crossing"]
__all__ += ["leakage", "recovered", "region_activity", "relearning_area", "removed", "retain_tax", "share_relearned"]
__all__ += ["tax", "to_recover", "tokens_of_plain", "way", "within_utility", "worst_case"]
