from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, IterableDataset
from families import tiny
from peft import get_peft_model
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl_parts import (
    PLAIN,
    VOCABULARY,
    assert_same,
    completions_of,
    detector,
    is_hack,
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

from routed_peft import Route, RoutedConfig, ablated, load_routed, presets
from routed_peft.trl import (
    AdvantageLabels,
    ColumnLabels,
    EnvironmentLabels,
    ImperfectDetector,
    RolloutLabels,
    RoutedGRPOTrainer,
)
from routed_peft.trl.advantages import unflagged_advantages
from routed_peft.trl.anchors import anchor_groups
from routed_peft.trl.rollouts import position_values

# TRL calls both by their old names.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_(en|dis)able`:FutureWarning")


class Gradients(TrainerCallback):
    """Keeps the gradients of the first optimizer step, before they are clipped or dropped."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        if not self.found:
            self.found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


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


def test_labels_follow_their_completions_through_shuffle_split_and_reuse(tmp_path):
    seen: list[list[int]] = []

    def label(completion_ids, rows, prompts, rewards, **_):
        assert [row["prompt"] for row in rows] == prompts and rewards == pytest.approx(reward(completion_ids))
        seen.extend(completion_ids)
        weights = {"base": [float(sum(ids)) for ids in completion_ids]}
        return RolloutLabels(detector(completion_ids), weights)

    trainer = trainer_of(
        tmp_path, label_fn=label, max_steps=4, gradient_accumulation_steps=2, steps_per_generation=4, num_iterations=2
    )
    trainer.train()
    assert len(trainer.seen) == 8 and len(seen) == 32
    for batch in trainer.seen:
        completions = completions_of(batch)
        assert batch["route_label"].tolist() == [0 if is_hack(ids) else 1 for ids in completions]
        assert batch["route_weights.base"].tolist() == [sum(ids) for ids in completions]
    shuffled = [ids for batch in trainer.seen[:4] for ids in completions_of(batch)]
    assert shuffled != seen and sorted(shuffled) == sorted(seen)
    assert [completions_of(b) for b in trainer.seen[:4]] == [completions_of(b) for b in trainer.seen[4:]]


def test_anchors_are_sampled_and_scored_without_the_region(tmp_path):
    trainer = trainer_of(
        tmp_path, dataset=prompts(12, ["A", "B"]), label_fn=lambda rows, **_: ["unflagged"] * len(rows), anchor_share=0.4,
        anchor_environments=["A"], generation_kwargs={"top_k": 1}, max_steps=1, per_device_train_batch_size=16,
        num_iterations=2,
    )  # fmt: skip
    trainer.train()
    (batch,) = trainer.seen
    labels = batch["route_label"].tolist()
    assert labels.count(2) in (4, 8)  # whole groups, the fraction of one by lot
    model = two_loras().eval()
    for row in range(16):
        regions = ("forget",) if labels[row] == 2 else ()
        old = batch["old_per_token_logps"][row][batch["completion_mask"][row].bool()]
        torch.testing.assert_close(old, logps(model, batch, row, *regions).detach(), rtol=0, atol=1e-5)
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()][None]
        with ablated(model, "forget", scale=0.0 if regions else 1.0):
            greedy = model.generate(prompt, max_new_tokens=5, do_sample=False)[0, prompt.shape[1] :]
        completion = completions_of(batch)[row]
        assert greedy[: len(completion)].tolist() == completion
    history = trainer.state.log_history[0]
    assert history["clip_ratio/high_max"] == history["clip_ratio/low_min"] == 0
    assert history["routing/anchor_share"] == labels.count(2) / 16
    assert history["routing/environment/A/reward"] >= 0


def test_flagged_anchors_keep_their_label_and_train_the_region_off_policy(tmp_path):
    trainer = trainer_of(tmp_path, anchor_share=0.99, max_steps=1, per_device_train_batch_size=16)
    trainer.train()
    (batch,) = trainer.seen
    hacks = [is_hack(ids) for ids in completions_of(batch)]
    assert batch["route_label"].tolist()[:4] != [2] * 4 and any(hacks)
    assert all(label == 0 for label, hack in zip(batch["route_label"].tolist(), hacks, strict=True) if hack)
    assert "old_per_token_logps" in batch


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_reference_is_the_original_model(tmp_path, checkpointing):
    trainer = trainer_of(
        tmp_path, beta=0.1, anchor_share=0.5, baseline_over="unflagged", gradient_checkpointing=checkpointing
    )
    trainer.train()
    original = two_loras().eval()
    with original.disable_adapter():
        for batch in trainer.seen:
            for row in range(8):
                found = batch["ref_per_token_logps"][row][batch["completion_mask"][row].bool()]
                torch.testing.assert_close(found, logps(original, batch, row).detach(), rtol=0, atol=1e-5)
    assert trainer.state.log_history[0]["kl"] > 0
    assert trainer.args.beta == 0.1


def test_a_trained_base_takes_a_reference_of_its_own(tmp_path):
    def expanded():
        torch.manual_seed(0)
        config = RoutedConfig(kind="mlp", size=4, init="model", task_type="CAUSAL_LM")
        return get_peft_model(tiny("llama", vocab_size=VOCABULARY), config, "forget")

    options = {"train_base": True, "base_adapters": [], "beta": 0.1}
    with pytest.raises(ValueError, match="no original is left to be the reference"):
        trainer_of(tmp_path, expanded(), **options)
    torch.manual_seed(0)
    reference = tiny("llama", vocab_size=VOCABULARY)
    trainer = trainer_of(tmp_path, expanded(), more={"ref_model": reference}, **options)
    before = weights(reference)
    trainer.train()
    assert_same(before, weights(reference))
    batch = trainer.seen[-1]
    found = batch["ref_per_token_logps"][0][batch["completion_mask"][0].bool()]
    torch.testing.assert_close(found, plain_logps(reference, batch, 0).detach(), rtol=0, atol=1e-5)


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


def test_token_labels_and_advantages(tmp_path):
    def label(completion_ids, **_):
        labels = [["flagged" if token % 2 else "unflagged" for token in ids] for ids in completion_ids]
        advantages = [[token / 10 for token in ids] for ids in completion_ids]
        return RolloutLabels(labels, {"forget": [[1.0 + token for token in ids] for ids in completion_ids]}, advantages)

    trainer = trainer_of(tmp_path, label_fn=label, anchor_share=0.3)
    trainer.train()
    flagged = 0
    for batch in trainer.seen:
        prompt = batch["prompt_ids"].shape[1]
        for row, ids in enumerate(completions_of(batch)):
            labels = batch["route_labels"][row, prompt - 1 :]
            anchor = labels[0] == 2
            assert anchor or labels[: len(ids)].tolist() == [0 if token % 2 else 1 for token in ids]
            assert (labels[len(ids) :] == -100).all()
            flagged += int((labels == 0).sum())
            assert batch["advantages"][row, : len(ids)].tolist() == pytest.approx([token / 10 for token in ids])
            assert batch["route_weights.forget"][row, prompt - 1 :][: len(ids)].tolist() == [1.0 + t for t in ids]
    tokens = [log["routing/tokens/flagged"] for log in trainer.state.log_history if "routing/tokens/flagged" in log]
    assert sum(tokens) == trainer.tokens_per_route["flagged"] == flagged > 0


def test_values_of_tokens_stand_one_position_to_the_left():
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    assert position_values([[3], []], mask, completions=2, fill=-100).tolist() == [[-100, 3, 3, -100, -100], [-100] * 5]


def test_baseline_over_unflagged_rollouts(tmp_path):
    trainer = trainer_of(tmp_path, baseline_over="unflagged", scale_rewards="none", max_steps=1)
    trainer.train()
    (batch,) = trainer.seen
    by_prompt: dict[tuple, list[int]] = {}
    for row in range(8):
        by_prompt.setdefault(tuple(batch["prompt_ids"][row].tolist()), []).append(row)
    rewards = reward(completions_of(batch))
    hacks = [is_hack(ids) for ids in completions_of(batch)]
    assert any(hacks) and not all(hacks)
    for rows in by_prompt.values():
        honest = [rewards[row] for row in rows if not hacks[row]] or [rewards[row] for row in rows]
        for row in rows:
            assert float(batch["advantages"][row]) == pytest.approx(rewards[row] - np.mean(honest), abs=1e-5)
    assert sorted(trainer._logs["advantages"]) == pytest.approx(sorted(batch["advantages"].tolist()))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_where_nothing_is_flagged_the_baseline_is_that_of_trl(tmp_path, scale):
    none = lambda completion_ids, **_: ["unflagged"] * len(completion_ids)
    seen = []
    for over in ("group", "unflagged"):
        trainer = trainer_of(tmp_path, label_fn=none, baseline_over=over, scale_rewards=scale, max_steps=1)
        trainer.train()
        seen.append(trainer.seen[0])
    assert seen[0]["advantages"].abs().max() > 0.1
    assert torch.equal(seen[0]["completion_ids"], seen[1]["completion_ids"])
    torch.testing.assert_close(seen[1]["advantages"], seen[0]["advantages"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_flagged_rewards_count_in_the_spread_alone(scale):
    rewards = torch.tensor([0.0, 1.0, 5.0, 9.0, 2.0, 4.0, 1.0, 3.0])
    flagged = torch.tensor([False, False, True, True] + [True] * 4)
    found = unflagged_advantages(rewards, flagged, num_generations=4, scale_rewards=scale)
    for group, mean in ((slice(0, 4), 0.5), (slice(4, 8), 2.5)):  # of all, where all are flagged
        spread = (rewards[group] if scale == "group" else rewards).std() + 1e-4
        torch.testing.assert_close(found[group], (rewards[group] - mean) / spread)


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


def test_labels_from_columns_environments_and_advantages(tmp_path):
    data = prompts().add_column("route_label", ["flagged", "unflagged"] * 4)
    trainer = trainer_of(tmp_path, dataset=data, label_fn=None, max_steps=1)
    trainer.train()
    assert trainer.label_fn == ColumnLabels()
    by_column = trainer.seen[0]["route_label"].tolist()
    trainer = trainer_of(
        tmp_path, dataset=data, label_fn=EnvironmentLabels({"A": "flagged", "B": "unflagged"}), max_steps=1
    )
    trainer.train()
    assert trainer.seen[0]["route_label"].tolist() == by_column and sorted(by_column) == [0] * 4 + [1] * 4
    trainer = trainer_of(tmp_path, label_fn=AdvantageLabels(), max_steps=1)
    trainer.train()
    batch = trainer.seen[0]
    assert ((batch["route_label"] == 0) == (batch["advantages"] > 0)).all()


def test_class_label_environments_go_by_their_names(tmp_path):
    named = prompts().cast_column("environment", ClassLabel(names=["A", "B"]))
    by_name = EnvironmentLabels({"A": "flagged", "B": "unflagged"})
    found = []
    for data in (prompts(), named):
        trainer = trainer_of(
            tmp_path, dataset=data, label_fn=by_name, max_steps=1, anchor_share=0.5, anchor_environments=["B"]
        )
        trainer.train()
        found.append([trainer.seen[0][name] for name in ("route_label", "route_environment")])
    assert (
        found[0][0].tolist() == found[1][0].tolist() and found[0][1] == found[1][1] and set(found[0][1]) == {"A", "B"}
    )


def test_labels_of_evaluation_rollouts_are_asked_for_before_training(tmp_path):
    data = prompts().add_column("route_label", ["flagged", "unflagged"] * 4)
    with pytest.raises(ValueError, match="`eval_dataset` lacks the column `route_label`"):
        trainer_of(tmp_path, dataset=data, label_fn=None, more={"eval_dataset": {"test": prompts()}})


def test_imperfect_detectors_have_the_recall_and_precision_asked_for():
    truth = ["flagged"] * 2000 + ["unflagged"] * 2000
    found = {}
    for recall in (0.25, 0.5):
        simulated = ImperfectDetector(lambda **_: truth, recall=recall, precision=0.8, seed=1)
        found[recall] = np.array(simulated(generation=(4, 0, 0))) == "flagged"
        hits = found[recall][:2000].sum()
        assert hits / 2000 == pytest.approx(recall, abs=0.04)
        assert hits / found[recall].sum() == pytest.approx(0.8, abs=0.04)
    assert not (found[0.25][:2000] & ~found[0.5][:2000]).any()
    assert simulated(generation=(4, 0, 0)) != simulated(generation=(5, 0, 0))
    assert truth.count("flagged") == 2000
    with pytest.raises(ValueError, match="`recall` is in"):
        ImperfectDetector(detector, recall=1.5)


def test_anchor_groups_are_drawn_from_trusted_environments_at_their_share():
    environments = ["A", "B"] * 8
    draws = [anchor_groups(environments, 0.2, trusted=["A"], seed=[0, step]) for step in range(200)]
    assert np.mean([d.mean() for d in draws]) == pytest.approx(0.2, abs=0.01)
    assert not any(d[1::2].any() for d in draws)
    assert anchor_groups(["B"] * 4, 0.5, trusted=["A"], seed=[0]).sum() == 0


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


def answering(answer):
    return lambda completion_ids, **_: answer(completion_ids)


@pytest.mark.parametrize(
    ("label_fn", "message"),
    [
        (answering(lambda ids: ["flagged"]), "returned 1 labels for 8 rollouts"),
        (answering(lambda ids: "flagged"), "returned 'flagged' labels for 8 rollouts"),
        (answering(lambda ids: ["flaged"] * len(ids)), "'flaged' has no route.*did you mean 'flagged'"),
        (answering(lambda ids: [None] * len(ids)), "a label is null"),
        (answering(lambda ids: [["flagged"]] * len(ids)), r"returned 1 labels for the \d tokens of rollout"),
        (answering(lambda ids: [["flagged"] * len(ids[0]), *["flagged"] * 7]), "per rollout and per token at once"),
        (answering(lambda ids: RolloutLabels(detector(ids), {"base": [1.0]})), r"returned 1 weights\['base'\]"),
        (answering(lambda ids: RolloutLabels(detector(ids), {"bse": [1.0] * 8})), r"`weights` has \['bse'\]"),
        (answering(lambda ids: RolloutLabels(detector(ids), advantages=[1.0])), "returned 1 advantages"),
        (
            answering(lambda ids: RolloutLabels(detector(ids), {"base": torch.full((8,), math.nan)})),
            "no finite numbers",
        ),
        (answering(lambda ids: RolloutLabels(detector(ids), advantages=[math.inf] * 8)), "no finite numbers"),
        (EnvironmentLabels({"A": "flagged"}), r"the environments \['B'\] have no label"),
        (EnvironmentLabels({"A": "flagged"}, column="env"), "`label_fn` needs the column `env`"),
        (EnvironmentLabels({"C": "flagged"}, default="unflagged"), r"`label_fn` has \['C'\], which `environment`"),
        (
            ImperfectDetector(EnvironmentLabels({"C": "flagged"}, default="unflagged"), recall=0.5),
            r"`label_fn` has \['C'\], which `environment`",
        ),
    ],
)
def test_refuses_bad_answers_of_label_functions(tmp_path, label_fn, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, label_fn=label_fn).train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anchor_share": 1.5}, "from 0 to below 1"),
        ({"anchor_share": 0.0, "anchor_environments": ["A"]}, "but `anchor_share` is 0"),
        ({"anchor_share": 0.5, "anchor_environments": ["Z"]}, r"has \['Z'\], which `environment` does not hold"),
        ({"anchor_share": 0.5, "anchor_environments": ["A"], "environment_column": "env"}, "needs the column `env`"),
        ({"baseline_over": "all"}, '"group" or "unflagged"'),
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


LOSS_WITHOUT = {"flagged": Route(weights={"base": 0.0}), "unflagged": Route(ablated=("forget",))}


def with_dropout(name: str):
    """Return a model whose LoRA, or whose own attention, drops out."""
    if name == "attention_dropout":
        return two_loras(attention_dropout=0.1)
    model = get_peft_model(tiny("llama", vocab_size=VOCABULARY), lora(lora_dropout=0.1), "retain")
    model.add_adapter("forget", lora())
    model.base_model.set_adapter(["retain", "forget"])
    return model


@pytest.mark.parametrize("name", ["lora_dropout", "attention_dropout"])
@pytest.mark.parametrize(
    ("options", "routes", "cause"),
    [
        ({"anchor_share": 0.5}, None, "`anchor_share`"),
        ({"num_iterations": 2}, None, "`num_iterations`"),
        ({"steps_per_generation": 4}, None, "`steps_per_generation`"),
        ({}, LOSS_WITHOUT, "the route 'unflagged'"),
    ],
)
def test_refuses_dropout_where_rollouts_are_scored_twice(tmp_path, name, options, routes, cause):
    with pytest.raises(ValueError, match=f"{cause} .*scored twice.*{name}.* drops out"):
        trainer_of(tmp_path, with_dropout(name), routes, **options)


def test_dropout_is_fine_where_rollouts_are_scored_once_or_it_is_disabled(tmp_path):
    trainer_of(tmp_path, with_dropout("lora_dropout"), max_steps=1).train()
    trainer = trainer_of(tmp_path, with_dropout("lora_dropout"), num_iterations=2, disable_dropout=True, max_steps=2)
    trainer.train()
    assert trainer.state.log_history[0]["clip_ratio/high_max"] == 0
    own_anchors = trainer_of(
        tmp_path, with_dropout("lora_dropout"), label_fn=answering(lambda ids: ["anchor"] * len(ids))
    )
    with pytest.raises(ValueError, match="a label whose route ablates other regions than the sampler"):
        own_anchors.train()


def test_refuses_advantages_that_would_be_lost(tmp_path):
    own = answering(lambda ids: RolloutLabels(detector(ids), advantages=[1.0] * 8))
    with pytest.raises(ValueError, match="returned advantages of its own"):
        trainer_of(tmp_path, label_fn=own, baseline_over="unflagged").train()


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
