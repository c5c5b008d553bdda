"""Training: a `transformers.Trainer` that routes."""

from routed_peft.runs.recorder import RunRecorder
from routed_peft.runs.records import RunDirectory
from routed_peft.training.arguments import RoutedArguments, RoutedTrainingArguments
from routed_peft.training.callbacks import SubspaceProjection
from routed_peft.training.changing_dataset import ChangingDataset
from routed_peft.training.mixin import RoutingMixin
from routed_peft.training.optimizer import tag_groups
from routed_peft.training.region_schedule import RegionSchedule
from routed_peft.training.self_label_config import SelfLabelConfig
from routed_peft.training.self_labels import SelfLabeledRows
from routed_peft.training.trainer import RoutedTrainer

__all__ = ["ChangingDataset", "RegionSchedule", "RoutedArguments", "RoutedTrainer", "RoutedTrainingArguments"]
__all__ += ["RoutingMixin", "RunDirectory", "RunRecorder", "SelfLabelConfig", "SelfLabeledRows", "SubspaceProjection"]
__all__ += ["tag_groups"]
