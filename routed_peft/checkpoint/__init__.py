"""Checkpoints that are safe by default: whoever loads a run plainly gets the model without its regions."""

from typing import TYPE_CHECKING

from routed_peft.lazy import lazy_names

if TYPE_CHECKING:
    from routed_peft.checkpoint.hub import push_to_hub
    from routed_peft.checkpoint.inspect import inspect_checkpoint
    from routed_peft.checkpoint.load import load_routed, load_weights
    from routed_peft.checkpoint.save import save_routed
else:  # `routed-peft inspect` needs no torch
    _MODULES = {"inspect_checkpoint": "inspect", "load_routed": "load", "load_weights": "load"}
    _MODULES |= {"push_to_hub": "hub", "save_routed": "save"}
    __getattr__, __dir__ = lazy_names(__name__, {name: f"{__name__}.{module}" for name, module in _MODULES.items()})

__all__ = ["inspect_checkpoint", "load_routed", "load_weights", "push_to_hub", "save_routed"]
