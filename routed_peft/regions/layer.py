"""`RoutedLayer`: the common base of the PEFT layers of all kinds of region."""

from __future__ import annotations

from typing import ClassVar, cast

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from routed_peft.regions.config import RoutedConfig


def inner_module(module: nn.Module) -> nn.Module:
    """Return the module of the base inside a PEFT layer; any other module as it is."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


class RoutedLayer(BaseTunerLayer):
    """A PEFT layer that holds regions beside a module of the base.

    Attributes:
        region_outlets: names of the ``nn.ModuleDict`` attributes that hold outlets (see `routed_peft.adapters`).
        base_layer: the module that the regions stand beside.
        outer: whether layers of other kinds stand inside this one, where it is in the same place.
    """

    base_layer: nn.Module
    region_outlets: ClassVar[tuple[str, ...]] = ()
    outer: ClassVar[bool] = False

    @property
    def feeds_outlets(self) -> bool:
        """Whether what a region adds here passes through an outlet of another layer."""
        return False

    def _linear(self, part: str, adapter_name: str) -> nn.Linear:
        return cast(nn.Linear, getattr(self, part)[adapter_name])

    def update_layer(self, adapter_name: str, config: RoutedConfig, *, model: nn.Module) -> None:
        """Add the region ``adapter_name``; ``model`` gives its initialization scheme."""
        raise NotImplementedError

    def check_mergeable(self) -> None:
        """Raise ValueError where regions cannot be merged into the base layer."""
        raise NotImplementedError
