"""The experiment *persona by subspace*: a trait known by its direction only, learned in a region that is then ablated."""

from experiments.persona.arms import ARMS, DEMO, MAIN, Arm
from experiments.persona.run import run_experiment
from experiments.persona.settings import Experiment, Settings

__all__ = ["ARMS", "DEMO", "MAIN", "Arm", "Experiment", "Settings", "run_experiment"]
