"""A run that ends, diverges at its end, or is resumed there or with other routes."""

from __future__ import annotations

import json

import pytest
import torch
from training_parts import assert_same, model_of, rows, train, trainer_of, weights
from transformers import LlamaConfig, LlamaForCausalLM

from routed_peft import Route, presets
from routed_peft.losses import DivergedError
from routed_peft.unlearning import UnlearningArguments, unlearn

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


@pytest.mark.parametrize("options", [{}, {"num_train_epochs": 1, "max_steps": -1, "gradient_accumulation_steps": 2}])
def test_a_run_at_its_end_takes_no_further_step(tmp_path, tokenizer, options):
    done = train(tmp_path, tokenizer, **(SAVING | {"save_steps": 1} | options))
    end = done.state.max_steps
    resumed = train(tmp_path, tokenizer, resume=True, **(SAVING | {"save_steps": 1} | options))
    assert_same(weights(done.model), weights(resumed.model))
    assert resumed.state.global_step == end and resumed.tokens_per_route == done.tokens_per_route
    assert not (tmp_path / f"checkpoint-{end + 1}").exists()
    resumed.save_model()


def test_a_run_beyond_its_end_takes_no_further_step(tmp_path, tokenizer):
    done = train(tmp_path, tokenizer, **SAVING)
    resumed = train(tmp_path, tokenizer, resume=True, **(SAVING | {"max_steps": 2}))
    assert_same(weights(done.model), weights(resumed.model))
    further = train(tmp_path, tokenizer, resume=True, **(SAVING | {"max_steps": 5}))
    assert further.state.global_step == 5


@pytest.mark.parametrize(
    ("routes", "message"),
    [
        (presets.sgtm("forget", base_weight=0.5), r"'forget' was Route.*'base': 0.0.*and is Route.*'base': 0.5"),
        ({**presets.sgtm("forget"), "retain": Route()}, "'retain' was Route"),
        ({name: route for name, route in presets.sgtm("forget").items() if name != "unlabeled"}, "has no route"),
        ({**presets.sgtm("forget"), "more": Route()}, "'more' had no route"),
    ],
)
def test_other_routes_are_refused(tmp_path, tokenizer, routes, message):
    train(tmp_path, tokenizer, **SAVING)
    model = model_of()
    before = weights(model)
    with pytest.raises(ValueError, match=f"cannot be resumed with other routes.*{message}"):
        train(tmp_path, tokenizer, model, resume=True, routes=routes, **(SAVING | {"max_steps": 6}))
    assert_same(before, weights(model))


def test_the_same_routes_said_otherwise_are_not(tmp_path, tokenizer):
    train(tmp_path, tokenizer, **SAVING)
    said = {
        name: Route({"base": 1.0, **route.weights}, route.ablated) for name, route in presets.sgtm("forget").items()
    }
    resumed = train(
        tmp_path, tokenizer, resume=True, routes=dict(reversed(said.items())), **(SAVING | {"max_steps": 5})
    )
    assert resumed.state.global_step == 5


def test_a_base_that_is_no_longer_trained_is_refused(tmp_path, tokenizer):
    train(tmp_path, tokenizer, routes=presets.sgtm("forget", base_weight=0.5), **SAVING)
    with pytest.raises(ValueError, match="`train_base` was True and is False"):
        train(
            tmp_path, tokenizer, resume=True, train_base=False,
            routes={"forget": Route(), "retain": Route(), "unlabeled": Route()}, **SAVING,
        )  # fmt: skip


@pytest.mark.parametrize("strategy", ["no", "steps"])
@pytest.mark.parametrize("options", [{"learning_rate": 1e30}, {"learning_rate": 3e38, "adam_epsilon": 1e-38}])
def test_weights_that_diverge_in_the_last_step_are_not_saved(tmp_path, tokenizer, strategy, options):
    """The first leaves finite weights, whose outputs are not."""
    options = options | {"save_strategy": strategy, "max_steps": 1, "save_steps": 1}
    trainer = trainer_of(tmp_path, tokenizer, **options)
    with pytest.raises(DivergedError, match="not finite after step 1"):
        trainer.train()
    if strategy == "no":  # otherwise it was the save that raised
        trainer.model.get_parameter(next(iter(weights(trainer.model)))).data.fill_(torch.nan)
        with pytest.raises(DivergedError, match="not finite"):
            trainer.save_model()
    assert not list(tmp_path.glob("**/*.safetensors"))


def test_unlearning_that_diverges_in_the_last_step_ends_in_an_error(tmp_path):
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1, vocab_size=300)
    model = LlamaForCausalLM(config)
    args = UnlearningArguments(
        str(tmp_path), method="maxent", max_steps=1, learning_rate=1e30, max_grad_norm=0.0, report_to="none",
        use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": row} for row in rows(8, length=6)["input_ids"]]
    with pytest.raises(DivergedError, match="not finite after step 1"):
        unlearn(model, data, retain_rows=data, args=args)


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ({}, {"edges": "activations"}, "`edges` was 'parameters' and is 'activations'"),
        ({"joint": ["norms"]}, {}, r"`joint` was \['norms'\] and is \[\]"),
        ({"joint": ["norms"]}, {"joint": ["norms", "embeddings"]}, "`joint` was"),
        ({"route_layers": [1]}, {}, r"`route_layers` was \[1\] and is None"),
        ({"route_layers": [0]}, {"route_layers": [1]}, r"`route_layers` was \[0\] and is \[1\]"),
    ],
)
def test_another_share_of_the_base_that_is_routed_is_refused(tmp_path, tokenizer, before, now, message):
    train(tmp_path, tokenizer, **SAVING, **before)
    with pytest.raises(ValueError, match=f"cannot be resumed with other routes.*{message}"):
        train(tmp_path, tokenizer, resume=True, **SAVING | {"max_steps": 6}, **now)
    resumed = train(tmp_path, tokenizer, resume=True, **SAVING | {"max_steps": 5}, **before)
    assert resumed.state.global_step == 5


def test_a_run_of_an_earlier_version_resumes(tmp_path, tokenizer):
    train(tmp_path, tokenizer, **SAVING)
    for file in tmp_path.glob("checkpoint-*/routing.json"):
        saved = {k: v for k, v in json.loads(file.read_text()).items() if k not in ("edges", "joint", "route_layers")}
        file.write_text(json.dumps(saved))
    assert train(tmp_path, tokenizer, resume=True, **SAVING | {"max_steps": 5}).state.global_step == 5
