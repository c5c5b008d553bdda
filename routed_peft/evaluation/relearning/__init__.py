"""Is it really gone? Attacks that try to bring back what a model no longer knows."""

from routed_peft.data.loading import read_facts, read_texts
from routed_peft.evaluation.relearning.attacks import Attack
from routed_peft.evaluation.relearning.curves import Curve, Point, log_spaced
from routed_peft.evaluation.relearning.data import AttackData
from routed_peft.evaluation.relearning.run import relearn_source
from routed_peft.evaluation.relearning.summary import read_summary, summarise, summary_tables
from routed_peft.evaluation.relearning.sweep import STEPS, relearn
from routed_peft.evaluation.text_loss import TextLoss

__all__ = [
    "STEPS",
    "Attack",
    "AttackData",
    "Curve",
    "Point",
    "TextLoss",
    "log_spaced",
    "read_facts",
    "read_summary",
    "read_texts",
    "relearn",
    "relearn_source",
    "summarise",
    "summary_tables",
]
