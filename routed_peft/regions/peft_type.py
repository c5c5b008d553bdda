"""The enum member ``PeftType.ROUTED``. PEFT has no public way to add a type, so the member is added by hand, once."""

from __future__ import annotations

from typing import Any

from peft.utils.peft_types import PeftType

NAME = "ROUTED"
PREFIX = "routed_"
"""Start of the names of a region's parameters in a layer, as PEFT needs it to find them."""


def peft_type() -> PeftType:
    """Return ``PeftType.ROUTED``, adding it first where it is missing.

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
