"""The experiment *style*: a way of speaking in a tenth of the data, half of it labeled, leaves with an adapter."""

from experiments.style.arms import ARMS, LABELS, MAIN, Arm
from experiments.style.run import run_experiment
from experiments.style.settings import Experiment, Settings

__all__ = ["ARMS", "LABELS", "MAIN", "Arm", "Experiment", "Settings", "run_experiment"]
