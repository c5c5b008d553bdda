"""Persona by subspace: a trait that some environments pay for, found by its direction, and learned in a region only.

    python recipes/grpo_persona.py
    python recipes/grpo_persona.py --config recipes/configs/experiment_persona.yaml

The first shows six arms at one seed in two minutes on one core, the second runs every arm at three seeds. Both end in a table
and a list of criteria. Every arm at every seed has a directory of its own under `output_dir`: a run that was stopped goes on.
"""

from experiments.persona import Experiment, Settings, run_experiment
from routed_peft.runs.command_line import parse_settings, run_recipe

if __name__ == "__main__":
    run_recipe(lambda: run_experiment(*parse_settings(Experiment, Settings)))
