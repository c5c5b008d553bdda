"""Reward hacking: a hack that a detector sees in one environment only, routed into a region, and taken out everywhere.

    python recipes/grpo_reward_hack.py
    python recipes/grpo_reward_hack.py --quick
    python recipes/grpo_reward_hack.py --config recipes/configs/experiment_reward_hack.yaml

The first shows six arms at one seed in minutes on two cores, the second three arms, the third runs every arm at three
seeds. All end in a table, a list of criteria, a figure and a page (`report.html`) under `output_dir`. Every arm at every seed
has a directory of its own there: a run that was stopped goes on, and the three share what they have in common.
"""

from experiments.reward_hack import Experiment, Settings, run_experiment
from routed_peft.runs.command_line import parse_settings, run_recipe

if __name__ == "__main__":
    run_recipe(lambda: run_experiment(*parse_settings(Experiment, Settings)))
