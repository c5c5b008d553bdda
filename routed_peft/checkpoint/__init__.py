"""Checkpoints that are safe by default: whoever loads a run plainly gets the model without its regions."""

from typing import TYPE_CHECKING

from routed_peft.lazy import lazy_names

if TYPE_CHECKING:
    from routed_peft.checkpoint.hub import push_to_hub
    from routed_peft.checkpoint.inspect import inspect_checkpoint
    from routed_peft.checkpoint.load import load_routed, load_weights
    from routed_peft.checkpoint.save import save_routed
else:  # `routed-peft inspect` needs no torch
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "inspect_checkpoint": "routed_peft.checkpoint.inspect",
            "load_routed": "routed_peft.checkpoint.load",
            "load_weights": "routed_peft.checkpoint.load",
            "push_to_hub": "routed_peft.checkpoint.hub",
            "save_routed": "routed_peft.checkpoint.save",
        },
    )

__all__ = ["inspect_checkpoint", "load_routed", "load_weights", "push_to_hub", "save_routed"]
