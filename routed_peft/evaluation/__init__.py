"""Evaluation of models with and without their regions."""

from routed_peft.evaluation.harness import evaluate, evaluate_configurations, results_frame, results_table
from routed_peft.evaluation.scale import ScaleChoice, choose_scale
from routed_peft.evaluation.source import evaluate_source, load_source
from routed_peft.evaluation.subsets import TopicLoss, subset_losses

__all__ = ["ScaleChoice", "choose_scale", "evaluate", "evaluate_configurations", "evaluate_source", "load_source"]
__all__ += ["TopicLoss", "results_frame", "results_table", "subset_losses"]
