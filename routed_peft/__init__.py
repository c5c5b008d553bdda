"""Gradient routing for Hugging Face: decide during training where a piece of data is learned, then remove it.

``import routed_peft`` alone is cheap: its names are imported when they are first used. Taking any of them, or
``import routed_peft.regions``, registers the PEFT type ``ROUTED``, so that PEFT itself can load a region.
"""

from typing import TYPE_CHECKING

from routed_peft.lazy import lazy_names

if TYPE_CHECKING:
    from routed_peft import presets
    from routed_peft.ablation import ablated
    from routed_peft.checkpoint import load_routed, push_to_hub, save_routed
    from routed_peft.checkpoint.export import ablate, export
    from routed_peft.regions import RoutedConfig
    from routed_peft.routes import Route
    from routed_peft.routing.gradient_routing import GradientRouting
    from routed_peft.training import RoutedTrainer, RoutedTrainingArguments
else:
    _HOMES = {"routed_peft.ablation": ["ablated"], "routed_peft.presets": ["presets"], "routed_peft.routes": ["Route"]}
    _HOMES |= {"routed_peft.checkpoint": ["load_routed", "push_to_hub", "save_routed"]}
    _HOMES |= {"routed_peft.checkpoint.export": ["ablate", "export"], "routed_peft.regions": ["RoutedConfig"]}
    _HOMES |= {"routed_peft.routing.gradient_routing": ["GradientRouting"]}
    _HOMES |= {"routed_peft.training": ["RoutedTrainer", "RoutedTrainingArguments"]}
    _NAMES = {name: home for home, names in _HOMES.items() for name in names}
    __getattr__, __dir__ = lazy_names(__name__, _NAMES, before="routed_peft.regions")

__version__ = "0.1.0"

__all__ = [
    "GradientRouting",
    "Route",
    "RoutedConfig",
    "RoutedTrainer",
    "RoutedTrainingArguments",
    "ablate",
    "ablated",
    "export",
    "load_routed",
    "presets",
    "push_to_hub",
    "save_routed",
]
