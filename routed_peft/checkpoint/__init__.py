"""Checkpoints that are safe by default: whoever loads a run plainly gets the model without its regions."""

from routed_peft.checkpoint.load import load_routed, load_weights
from routed_peft.checkpoint.save import save_routed

__all__ = ["load_routed", "load_weights", "save_routed"]
