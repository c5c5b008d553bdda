from __future__ import annotations

import math
from dataclasses import fields

import pytest
from transformers import HfArgumentParser, TrainingArguments

from routed_peft import RoutedTrainingArguments
from routed_peft.training.arguments import RoutedArguments, check_training_numbers


def arguments(**settings) -> RoutedTrainingArguments:
    return RoutedTrainingArguments("out", report_to="none", use_cpu=True, **settings)


def test_every_field_is_a_flag_with_help():
    for field in fields(RoutedArguments):
        assert field.metadata["help"], field.name
    (parsed,) = HfArgumentParser(RoutedTrainingArguments).parse_args_into_dataclasses(
        "--output_dir out --report_to none --use_cpu --train_base True --base_adapters retain style --joint norms --edges "
        "activations --region_learning_rate 0.1 --route_layers 0 1 --self_check False".split()
    )
    assert parsed.train_base and parsed.base_adapters == ["retain", "style"] and parsed.joint == ["norms"]
    assert (parsed.edges, parsed.region_learning_rate, parsed.route_layers) == ("activations", 0.1, [0, 1])
    assert not parsed.self_check and parsed.evaluate_ablated and parsed.gather and parsed.kept_regions == []


@pytest.mark.parametrize("name", ["region_learning_rate", "region_weight_decay", "activation_l1", "check_labels_after"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_numbers_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be a number from 0, got {value!r}"):
        arguments(**{name: value})
    assert getattr(arguments(**{name: 0}), name) == 0


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("weight_decay", -0.1, "from 0"),
        ("max_grad_norm", math.nan, "from 0"),
        ("adam_beta1", 1.1, "from 0 to 1"),
        ("seed", -1, r"from 0 to 4\.29497e\+09"),
        ("per_device_train_batch_size", 0, "from 1"),
        ("gradient_accumulation_steps", 0, "from 1"),
    ],
)
def test_numbers_of_the_trainer_are_looked_at_too(name, value, wanted):
    args = TrainingArguments("out", report_to="none", use_cpu=True)
    check_training_numbers(args)
    setattr(args, name, value)
    with pytest.raises(ValueError, match=f"`{name}` must be a number {wanted}, got {value!r}"):
        check_training_numbers(args)


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match="`edges` must be one of parameters, activations, got 'activation'"):
        arguments(edges="activation")


def test_lists_are_not_shared_between_runs():
    arguments().base_adapters.append("retain")
    assert arguments().base_adapters == []
