"""Relearning attacks: attempts to bring removed knowledge back.

`register_attack` adds a method of fine-tuning or a kind of data.
"""

from routed_peft.data.loading import read_facts, read_texts
from routed_peft.deprecation import renamed
from routed_peft.evaluation.relearning.attacks import Attack, AttackMethod, register_attack
from routed_peft.evaluation.relearning.curves import Curve, Point, log_spaced
from routed_peft.evaluation.relearning.data import AttackData
from routed_peft.evaluation.relearning.run import SourceOptions, relearn_source
from routed_peft.evaluation.relearning.summary import read_summary, summarize, summary_tables
from routed_peft.evaluation.relearning.sweep import STEPS, RelearnOptions, relearn
from routed_peft.evaluation.text_loss import TextLoss

__all__ = ["STEPS", "Attack", "AttackData", "AttackMethod", "Curve", "Point", "RelearnOptions", "SourceOptions"]
__all__ += ["TextLoss", "log_spaced", "read_facts", "read_summary", "read_texts", "register_attack", "relearn"]
__all__ += ["relearn_source", "summarize", "summary_tables"]

__getattr__ = renamed(__name__, {"summarise": "summarize"})
