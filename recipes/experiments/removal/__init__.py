"""The experiment *removal*: methods side by side, over shares of labels and seeds, at equal tokens."""

from experiments.removal.cells import Experiment, MethodCell, all_cells
from experiments.removal.methods import METHODS, Method
from experiments.removal.run import run_experiment
from experiments.removal.settings import Settings

__all__ = ["METHODS", "Experiment", "Method", "MethodCell", "Settings", "all_cells", "run_experiment"]
