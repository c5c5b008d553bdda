"""The experiment *style*: a way of speaking in a tenth of the data, half of it labelled, leaves with an adapter."""

from routed_peft.style.arms import ARMS, LABELS, MAIN, Arm
from routed_peft.style.run import run_experiment
from routed_peft.style.settings import Experiment, Settings

__all__ = ["ARMS", "LABELS", "MAIN", "Arm", "Experiment", "Settings", "run_experiment"]
