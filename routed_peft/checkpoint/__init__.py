"""Checkpoints that are safe by default: whoever loads a run plainly gets the model without its regions."""

from routed_peft.checkpoint.hub import push_to_hub
from routed_peft.checkpoint.inspect import inspect_checkpoint
from routed_peft.checkpoint.load import load_routed, load_weights
from routed_peft.checkpoint.save import save_routed

__all__ = ["inspect_checkpoint", "load_routed", "load_weights", "push_to_hub", "save_routed"]
