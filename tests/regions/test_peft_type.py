from __future__ import annotations

import pickle

from families import tiny
from peft.utils.peft_types import PeftType
from regions_parts import with_region

from routed_peft.regions.peft_type import NAME, PREFIX, peft_type


def test_the_type_is_a_member_like_peft_s_own_and_is_added_once():
    first = peft_type()
    names = list(PeftType.__members__)
    assert peft_type() is first is PeftType[NAME] is PeftType(NAME) is PeftType.ROUTED
    assert list(PeftType.__members__) == names and names.count(NAME) == 1
    assert list(PeftType)[-1] is first and len(PeftType) == len(names)
    assert first == NAME and first.value == first.name == NAME and isinstance(first, PeftType)
    assert pickle.loads(pickle.dumps(first)) is first


def test_peft_s_own_members_stay_what_they_were():
    peft_type()
    assert PeftType("LORA") is PeftType.LORA and PeftType.LORA.value == "LORA"


def test_all_parameters_of_a_region_are_found_by_the_prefix():
    model = with_region(tiny("llama"))
    regional = [name for name, _ in model.named_parameters() if ".forget." in name]
    assert regional and all(any(part.startswith(PREFIX) for part in name.split(".")) for name in regional)
    assert not any(f".{PREFIX}" in name for name, _ in model.named_parameters() if ".forget." not in name)
