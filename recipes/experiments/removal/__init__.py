"""Methods side by side, over shares of labels and seeds, at equal tokens: what the tables in the docs are made from."""

from experiments.removal.cells import Cell, Experiment, all_cells
from experiments.removal.methods import METHODS, Method
from experiments.removal.run import run_experiment

__all__ = ["METHODS", "Cell", "Experiment", "Method", "all_cells", "run_experiment"]
