"""Regions as PEFT adapters. Importing this package registers the PEFT type ``ROUTED``."""

from routed_peft.regions.config import RoutedConfig
from routed_peft.regions.linear import LowRankLinear
from routed_peft.regions.mlp import RoutedMLP
from routed_peft.regions.model import RoutedModel
from routed_peft.regions.peft_type import register
from routed_peft.regions.subspace import has_subspace, project_base

register()

__all__ = ["LowRankLinear", "RoutedConfig", "RoutedMLP", "RoutedModel", "has_subspace", "project_base"]
