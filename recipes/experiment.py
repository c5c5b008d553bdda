"""Methods side by side, over shares of labels and seeds: trained at equal tokens, ablated, measured and attacked.

    python recipes/experiment.py --config recipes/configs/experiment_biology.yaml

A *cell* is one method at one share of labels and one seed. Every cell has a directory of its own under `cells_dir`, with the
settings it was made with; a cell with the same settings is never made twice, whichever experiments it is part of. A run that
was killed goes on with the next cell, and the same command may be started in as many processes as there is room for. The
numbers of all cells go to `summary_file`, from which `recipes/report.py` and the tables of the docs are made.
"""

from experiments.removal import Experiment, Settings, run_experiment
from routed_peft.runs.command_line import parse_settings, run_recipe


def main() -> None:
    experiment, settings = parse_settings(Experiment, Settings)
    run_experiment(experiment, settings)
    print(f"written to {experiment.summary_file}; `python recipes/report.py {experiment.summary_file}` draws it")


if __name__ == "__main__":
    run_recipe(main)
