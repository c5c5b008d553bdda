"""Training: a `transformers.Trainer` that routes."""

from routed_peft.runs.records import RunDirectory, RunRecorder
from routed_peft.training.arguments import RoutedArguments, RoutedTrainingArguments
from routed_peft.training.callbacks import SubspaceProjection
from routed_peft.training.mixin import RoutingMixin
from routed_peft.training.optimizer import tag_groups
from routed_peft.training.self_labels import SelfLabeledRows
from routed_peft.training.trainer import RoutedTrainer

__all__ = [
    "RoutedArguments",
    "RoutedTrainer",
    "RoutedTrainingArguments",
    "RoutingMixin",
    "RunDirectory",
    "RunRecorder",
    "SelfLabeledRows",
    "SubspaceProjection",
    "tag_groups",
]
