"""One run, every model: a region per topic, all subsets of them, beside models that were trained apart.

    python recipes/access.py
    python recipes/access.py --config recipes/configs/experiment_access.yaml

The first runs every arm at one seed, the second at three. Both end in a table and a list of criteria. Every arm at every
seed has a directory of its own under `output_dir`: a run that was stopped goes on.
"""

from experiments.access import Experiment, Settings, run_experiment
from routed_peft.runs.command_line import parse_settings, run_recipe

if __name__ == "__main__":
    run_recipe(lambda: run_experiment(*parse_settings(Experiment, Settings)))
