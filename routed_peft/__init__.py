"""Gradient routing for Hugging Face: decide during training where a piece of data is learnt, then remove it."""

from routed_peft import presets
from routed_peft.ablation import ablated
from routed_peft.checkpoint import load_routed, push_to_hub, save_routed
from routed_peft.checkpoint.export import ablate, export
from routed_peft.regions import RoutedConfig
from routed_peft.routes import Route
from routed_peft.routing.gradient_routing import GradientRouting
from routed_peft.training import RoutedTrainer, RoutedTrainingArguments

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
