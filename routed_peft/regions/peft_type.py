"""The PEFT type ``ROUTED``. PEFT has no public way to add a type, so the enum member is added by hand, once."""

from __future__ import annotations

from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.peft_types import PeftType, register_peft_method

NAME = "ROUTED"
PREFIX = "routed_"


def peft_type() -> PeftType:
    """Return ``PeftType.ROUTED``, adding it first where it is not there yet.

    >>> peft_type() is PeftType("ROUTED")
    True
    """
    if NAME not in PeftType.__members__:
        member: Any = str.__new__(PeftType, NAME)
        member._name_ = NAME
        member._value_ = NAME
        member._sort_order_ = len(PeftType.__members__)
        PeftType._member_names_.append(NAME)
        PeftType._member_map_[NAME] = member
        PeftType._value2member_map_[NAME] = member
        type.__setattr__(PeftType, NAME, member)
    return PeftType(NAME)


def register() -> None:
    """Make PEFT know the type: its configuration, its tuner and its prefix. A second call changes nothing."""
    from routed_peft.regions.config import RoutedConfig
    from routed_peft.regions.model import RoutedModel

    if peft_type() not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=NAME.lower(), prefix=PREFIX, config_cls=RoutedConfig, model_cls=RoutedModel)
