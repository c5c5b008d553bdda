from __future__ import annotations

import copy
import json

import pytest
import torch
from datasets import Dataset, IterableDataset
from families import tiny
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl_parts import (
    PLAIN,
    VOCABULARY,
    Gradients,
    answering,
    assert_same,
    detector,
    logps,
    lora,
    moved,
    plain_logps,
    prompts,
    reward,
    trainer_of,
    two_loras,
    weights,
    word_tokenizer,
)

from routed_peft import Route, ablated, load_routed, presets
from routed_peft.trl import (
    ImperfectDetector,
    RolloutLabels,
    RoutedGRPOTrainer,
)

# TRL calls both by their old names.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_(en|dis)able`:FutureWarning")


def reference_gradients(model, batches, *, routes, epsilon=0.2, beta=0.0) -> dict[str, torch.Tensor]:
    """One rollout after the other, from GRPO's formula (TRL's `dapo`), forbidden parts multiplied by their weight."""
    total: dict[str, torch.Tensor] = {}
    original_model = copy.deepcopy(model).unload()
    for batch in batches:
        for row in range(len(batch["prompt_ids"])):
            route = list(routes.values())[int(batch["route_label"][row])]
            current = logps(model, batch, row, *route.ablated)
            old = (
                batch["old_per_token_logps"][row, : len(current)]
                if "old_per_token_logps" in batch
                else current.detach()
            )
            ratio, advantage = (current - old).exp(), batch["advantages"][row]
            clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
            losses = -torch.min(ratio * advantage, clipped * advantage)
            if beta:
                original = plain_logps(original_model, batch, row).detach()
                kl = (original - current).exp() - (original - current) - 1
                losses = losses + beta * ratio * kl  # as by default: `use_bias_correction_kl`
            model.zero_grad(set_to_none=True)
            (losses.sum() / batch["num_items_in_batch"]).backward()
            for name, p in model.named_parameters():
                group = "forget" if ".forget." in name else "base"
                if p.grad is not None:
                    weight = route.weight(group) * float(batch.get(f"route_weights.{group}", torch.ones(99))[row])
                    total[name] = total.get(name, 0) + weight * p.grad
    return total


REAL_VALUED = {
    "flagged": Route(weights={"base": -0.5, "forget": 2.0}),
    "unflagged": Route(weights={"forget": 0.25}),
    "anchor": Route(ablated=("forget",)),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("routes", "options"),
    [
        (presets.classic("forget"), {}),
        (presets.exclusive("forget"), {"anchor_share": 0.5, "baseline_over": "unflagged"}),
        (REAL_VALUED, {"gradient_checkpointing": True, "anchor_share": 0.5}),
        ({"flagged": Route(weights={"base": 0.0}), "unflagged": Route(ablated=("forget",))}, {}),
        (presets.exclusive("forget"), {"anchor_share": 0.5, "beta": 0.5}),
        (REAL_VALUED, {"beta": 0.5}),
    ],
    ids=[
        "classic",
        "exclusive with anchors",
        "real-valued, checkpointed",
        "ablated in the loss only",
        "KL",
        "KL, real-valued",
    ],
)
def test_gradients_equal_those_of_one_rollout_after_the_other(tmp_path, routes, options):
    gradients = Gradients()
    weigh = lambda completion_ids, **_: RolloutLabels(
        detector(completion_ids), {"base": [0.5 + len(ids) for ids in completion_ids]}
    )
    trainer = trainer_of(
        tmp_path, two_loras().double(), routes, label_fn=weigh, max_steps=1, gradient_accumulation_steps=2,
        max_grad_norm=0.0, more={"callbacks": [gradients]}, **options,
    )  # fmt: skip
    trainer.train()
    assert len(trainer.seen) == 2
    labels = torch.cat([batch["route_label"] for batch in trainer.seen])
    assert len(labels.unique()) >= 2 and len(gradients.found) == 2 * 2 * 3 * 2
    beta = options.get("beta", 0.0)
    expected = reference_gradients(two_loras().double(), trainer.seen, routes=trainer.routing.routes, beta=beta)
    for name, gradient in gradients.found.items():  # TRL's fused head and advantages are float32
        torch.testing.assert_close(gradient, expected[name], rtol=2e-5, atol=1e-7)


@pytest.mark.slow
def test_all_ones_routes_equal_trl_step_for_step(tmp_path):
    options = {
        "max_steps": 4,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
        "num_iterations": 2,
        "beta": 0.0,
    }
    routed = trainer_of(
        tmp_path / "a", None, presets.control(["flagged", "unflagged"]), clip_per_group=False, **options
    )
    routed.train()
    model = two_loras()
    plain = GRPOTrainer(
        model,
        reward,
        GRPOConfig(str(tmp_path / "b"), **(PLAIN | options)),
        prompts(),
        processing_class=word_tokenizer(),
    )
    plain.train()
    logs = [
        [
            {k: v for k, v in log.items() if not k.startswith("routing/") and "time" not in k and "second" not in k}
            for log in t
        ]
        for t in (routed.state.log_history, plain.state.log_history)
    ]
    assert logs[0] == logs[1]
    assert_same(weights(routed.model), weights(model))


class Weights(TrainerCallback):
    """Keeps the weights after every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        self.steps.append(weights(model))


@pytest.mark.parametrize(
    ("label", "rests", "learns"), [("flagged", "retain", "forget"), ("unflagged", "forget", "retain")]
)
def test_groups_that_no_data_trains_stay(tmp_path, label, rests, learns):
    def mixed_then_one(completion_ids, generation, **_):  # so that Adam has momentum when a group falls idle
        return [label] * len(completion_ids) if generation[0] else ["flagged", "unflagged"] * (len(completion_ids) // 2)

    after = Weights()
    trainer = trainer_of(
        tmp_path,
        routes=presets.exclusive("forget"),
        label_fn=mixed_then_one,
        weight_decay=0.1,
        more={"callbacks": [after]},
    )
    before = weights(trainer.model)
    trainer.train()
    first, second = after.steps
    assert moved(before, first, f".{rests}.") and moved(before, first, f".{learns}.")
    assert not moved(first, second, f".{rests}.") and moved(first, second, f".{learns}.")
    assert not moved(before, second, "base_layer")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "step"), [(8, 2), (4, 2), (4, 3)], ids=["first epoch", "between epochs", "second epoch"]
)
def test_resuming_equals_going_on_and_saves_the_routed_layout(tmp_path, size, step):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": step, "anchor_share": 0.5}
    noisy = ImperfectDetector(detector, recall=0.5, precision=0.8, seed=3)
    whole = trainer_of(tmp_path / "a", dataset=prompts(size), label_fn=noisy, **options)
    whole.train()
    again = trainer_of(tmp_path / "b", dataset=prompts(size), label_fn=noisy, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
    assert [b["route_label"].tolist() for b in whole.seen[step:]] == [b["route_label"].tolist() for b in again.seen]
    assert_same(weights(whole.model), weights(again.model))
    assert whole.tokens_per_route == again.tokens_per_route
    whole.save_model()
    saved = json.loads((tmp_path / "a" / "routing.json").read_text())
    assert list(saved["routes"]) == ["flagged", "unflagged", "anchor"]
    ids = torch.tensor([[4, 5, 6]])
    with torch.no_grad(), ablated(whole.model, "forget"):
        expected = whole.model.eval()(input_ids=ids).logits
        torch.testing.assert_close(load_routed(tmp_path / "a").eval()(input_ids=ids).logits, expected)


def test_evaluation_also_without_the_region(tmp_path):
    trainer = trainer_of(tmp_path, more={"eval_dataset": prompts(4)}, anchor_share=0.5)
    found = trainer.evaluate()
    assert 0 <= found["eval_routing/flag_rate"] <= 1 and 0 <= found["eval_ablated_routing/flag_rate"] <= 1
    assert found["eval_routing/anchor_share"] == 0 and found["eval_reward"] != found["eval_ablated_reward"]


@pytest.mark.slow
def test_streams_of_prompts(tmp_path):
    rows = list(prompts())
    stream = IterableDataset.from_generator(lambda: iter(rows))
    trainer = trainer_of(tmp_path, dataset=stream, anchor_share=0.5, anchor_environments=["A"])
    trainer.train()
    assert trainer.tokens_per_route["flagged"]


def test_a_detector_may_find_nothing_yet(tmp_path, caplog):
    """What would stop a run on a stream of text: here the policy may start to hack later."""
    rows = list(prompts())
    stream = IterableDataset.from_generator(lambda: iter(rows))
    clean = answering(lambda ids: ["unflagged"] * len(ids))
    trainer_of(tmp_path, dataset=stream, label_fn=clean, check_labels_after=1).train()
    assert "over this run, no row is routed" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anchor_share": 1.5}, "from 0 to below 1"),
        ({"anchor_share": 0.0, "anchor_environments": ["A"]}, "but `anchor_share` is 0"),
        ({"anchor_share": 0.5, "anchor_environments": ["Z"]}, r"has \['Z'\], which `environment` does not hold"),
        ({"anchor_share": 0.5, "anchor_environments": ["A"], "environment_column": "env"}, "needs the column `env`"),
        ({"baseline_over": "all"}, "one of group, unflagged"),
        ({"baseline_over": "unflagged", "flagged_labels": ["hack"]}, "none of `flagged_labels`"),
        ({"baseline_over": "unflagged", "multi_objective_aggregation": "normalize_then_sum"}, "sum_then_normalize"),
        ({"anchor_share": 0.5, "flagged_labels": ["hack"]}, r"add \['flagged'\] to `flagged_labels`"),
        ({"sync_ref_model": True, "beta": 0.1}, "`sync_ref_model`"),
        ({"activation_l1": 0.1}, "`activation_l1`"),
        ({"use_liger_kernel": True}, "`use_liger_kernel`"),
    ],
)
def test_refuses_options_that_would_be_wrong(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, **options)


def test_refuses_what_has_no_labels_no_names_or_no_use(tmp_path):
    with pytest.raises(ValueError, match="rollouts have no labels"):
        trainer_of(tmp_path, label_fn=None)
    with pytest.raises(ValueError, match="maps adapter names to configurations"):
        trainer_of(tmp_path, tiny("llama", vocab_size=VOCABULARY), more={"peft_config": lora()})
    with pytest.raises(ValueError, match="so it would not be used"):
        trainer_of(tmp_path, more={"ref_model": tiny("llama", vocab_size=VOCABULARY)})
    with pytest.raises(ValueError, match="ablates all of"):
        trainer_of(tmp_path, routes={**presets.classic("forget"), "anchor": Route()}, anchor_share=0.5)
    with pytest.raises(ValueError, match="is a `RoutedGRPOConfig`"):
        RoutedGRPOTrainer(two_loras(), reward, None, prompts(), routes=presets.classic("forget"))


def test_runs_without_flags_end_with_a_warning_not_an_error(tmp_path, caplog):
    data = Dataset.from_dict({"prompt": ["a +"] * 4})
    trainer = trainer_of(
        tmp_path, dataset=data, label_fn=lambda prompts, **_: ["unflagged"] * len(prompts), max_steps=1
    )
    trainer.train()
    assert "no row is routed" in caplog.text
