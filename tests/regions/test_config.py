import copy
import importlib
import json
import pickle

import pytest
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import routed_peft.regions
from routed_peft.regions import RoutedConfig, RoutedModel
from routed_peft.regions.peft_type import peft_type


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 4, "kind": "attention"}, "`kind` must be one of 'mlp', 'lora'.*, got 'attention'"),
        ({"kind": "mlp"}, "`size` must be a whole number of hidden units, at least 1, got None"),
        ({"size": 0}, "`size` .* got 0"),
        ({"size": 2.5}, "`size` .* got 2.5"),
        ({"size": True}, "`size` .* got True"),
        ({"size": 4, "init": "random"}, "`init` must be one of 'zero', 'model' or None, got 'random'"),
        ({"size": 4, "target_modules": []}, "`target_modules` must be a list of module names"),
        ({"size": 4, "target_modules": ["mlp", 3]}, "`target_modules` must be a list of module names"),
        ({"size": 4, "exclude_modules": [""]}, "`exclude_modules` must be a list of module names"),
        ({"size": 4, "layers_to_transform": [-1]}, "`layers_to_transform` holds layer indices"),
        ({"size": 4, "layers_to_transform": 1, "target_modules": ".*mlp"}, "needs `target_modules` as a list"),
        ({"size": 4, "layers_pattern": "h"}, "only together with `layers_to_transform`"),
        ({"size": 4, "task_type": "NONSENSE"}, "Invalid task type"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RoutedConfig(**fields)


def test_a_configuration_survives_saving(tmp_path):
    config = RoutedConfig(
        size=4, target_modules={"mlp"}, layers_to_transform=[1], init="zero", base_fingerprint={"parameters": 1}
    )
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is RoutedConfig and loaded.to_dict() == config.to_dict()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "ROUTED"


def test_the_enum_member_is_like_any_other():
    member = PeftType("ROUTED")
    assert member is PeftType.ROUTED is peft_type() is PeftType["ROUTED"]
    assert isinstance(member, PeftType) and member.name == member.value == "ROUTED" == member
    assert member in list(PeftType) and list(PeftType).count("ROUTED") == 1
    assert pickle.loads(pickle.dumps(member)) is member is copy.deepcopy(member)
    assert json.dumps(member) == '"ROUTED"' and {member: 1}["ROUTED"] == 1


def test_registration_can_be_repeated():
    importlib.reload(routed_peft.regions)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[peft_type()] is RoutedConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[peft_type()] is RoutedModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[peft_type()] == "routed_"
