"""Regions as PEFT adapters. Importing this package registers the PEFT type ``ROUTED``.

From the bottom up: `peft_type` and `config`; `projections` and `hidden_units`, the arithmetic; `layer`, `subspace`, `linear`,
`mlp`, `embeddings`, `norms` and `heads`, the PEFT layers; `targets` and `whole`, the plan of a region; `model`, the PEFT tuner
that carries the plan out.
"""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.peft_types import register_peft_method

from routed_peft.regions.config import RegionKind, RoutedConfig, register_region_kind
from routed_peft.regions.embeddings import RoutedTable
from routed_peft.regions.heads import RoutedHeads
from routed_peft.regions.linear import LowRankLinear
from routed_peft.regions.mlp import RoutedMLP
from routed_peft.regions.model import RoutedModel
from routed_peft.regions.norms import RoutedNorm
from routed_peft.regions.peft_type import NAME, PREFIX, peft_type
from routed_peft.regions.subspace import has_subspace, project_base

__all__ = [
    "LowRankLinear",
    "RegionKind",
    "RoutedConfig",
    "RoutedHeads",
    "RoutedMLP",
    "RoutedModel",
    "RoutedNorm",
    "RoutedTable",
    "has_subspace",
    "project_base",
    "register_region_kind",
]

if peft_type() not in PEFT_TYPE_TO_CONFIG_MAPPING:  # it is there already where this module is reloaded
    register_peft_method(name=NAME.lower(), prefix=PREFIX, config_cls=RoutedConfig, model_cls=RoutedModel)
