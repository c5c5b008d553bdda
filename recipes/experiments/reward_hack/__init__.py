"""The experiment *reward hacking*: four graders, and one detector that sees a hack in one of them."""

from experiments.reward_hack.arms import ARMS, DEMO, MAIN, QUICK, Arm, grade, monitor
from experiments.reward_hack.run import run_experiment
from experiments.reward_hack.settings import Experiment, Settings

__all__ = ["ARMS", "DEMO", "MAIN", "QUICK", "Arm", "Experiment", "Settings", "grade", "monitor", "run_experiment"]
