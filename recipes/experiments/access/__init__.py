"""The experiment *access*: one run with a region per topic, and every subset of them switched on."""

from experiments.access.arms import ARMS, MAIN, Arm
from experiments.access.run import run_experiment
from experiments.access.settings import Experiment, Settings

__all__ = ["ARMS", "MAIN", "Arm", "Experiment", "Settings", "run_experiment"]
