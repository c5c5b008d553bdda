"""Unlearning after training: output-based baselines, UNDO, and their cost.

`register_forget_loss` adds a baseline.
"""

from routed_peft.deprecation import renamed
from routed_peft.unlearning.arguments import METHODS, UndoArguments, UnlearningArguments
from routed_peft.unlearning.data import PairedRows, ShuffledRows
from routed_peft.unlearning.distillation import DistillationTrainer, StopAtTeacher, check_tokenizers
from routed_peft.unlearning.forget_losses import ForgetLoss, Outputs, register_forget_loss
from routed_peft.unlearning.teacher_cache import TeacherCache
from routed_peft.unlearning.token_trainer import mean_loss
from routed_peft.unlearning.trainer import UnlearningTrainer, unlearn
from routed_peft.unlearning.undo import UNLEARNED, UndoRecord, read_cost, save_student, undo
from routed_peft.unlearning.weight_noise import add_noise, shrink_perturb

__all__ = ["METHODS", "UNLEARNED", "DistillationTrainer", "ForgetLoss", "Outputs", "PairedRows", "ShuffledRows"]
__all__ += ["StopAtTeacher", "TeacherCache", "UndoArguments", "UndoRecord", "UnlearningArguments"]
__all__ += ["UnlearningTrainer", "add_noise", "check_tokenizers", "mean_loss", "read_cost", "register_forget_loss"]
__all__ += ["save_student", "shrink_perturb", "undo", "unlearn"]

__getattr__ = renamed(__name__, {"Run": "ShuffledRows", "save_undone": "save_student", "spent": "read_cost"})
