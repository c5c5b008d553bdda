"""The monitor on TRL's GRPO: environments follow their rollouts, and what it measures adds up there too."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from trl_parts import assert_same, prompts, two_loras, weights, word_tokenizer

from routed_peft import presets
from routed_peft.monitoring import MonitorConfig, RegionMonitor, apply_quarantine
from routed_peft.trl import (
    EnvironmentLabels,
    RolloutReward,
    RoutedGRPOConfig,
    RoutedGRPOTrainer,
    RoutedSFTConfig,
    RoutedSFTTrainer,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_(en|dis)able`:FutureWarning"),
]


def reward(completion_ids, environment, **_) -> list[float]:
    """Environment B pays for one token; A pays for nothing that can be learned."""
    return [
        float(ids.count(5)) if name == "B" else sum(ids) % 3
        for ids, name in zip(completion_ids, environment, strict=True)
    ]


BY_ENVIRONMENT = EnvironmentLabels({"B": "flagged"}, default="unflagged")


def grpo_of(out, dataset=None, label_fn=BY_ENVIRONMENT, **more) -> RoutedGRPOTrainer:
    options = dict(
        max_steps=4, per_device_train_batch_size=4, gradient_accumulation_steps=2, num_generations=4, max_completion_length=4,
        learning_rate=1e-3, report_to="none", use_cpu=True, bf16=False, save_strategy="no", logging_steps=2,
        disable_tqdm=True, gradient_checkpointing=False, num_iterations=2,
    )  # fmt: skip
    return RoutedGRPOTrainer(
        two_loras(),
        reward,
        RoutedGRPOConfig(str(out), base_adapters=["retain"], **(options | more)),
        dataset or prompts(),
        routes=presets.classic("forget"),
        label_fn=label_fn,
        processing_class=word_tokenizer(),
    )


@pytest.mark.slow
def test_grpo_is_monitored(tmp_path):
    trainer = grpo_of(tmp_path)
    monitor = RegionMonitor(trainer, MonitorConfig(every=1, action="log"))
    assert monitor.environments == ["A", "B"]
    seen = []

    class Spy:
        def observe(self, inputs, environments):
            tokens = [word_tokenizer().decode(ids[ids != 0]) for ids in inputs["prompt_ids"]]
            seen.extend(zip(tokens, environments, strict=True))
            monitor.observe(inputs, environments)

    trainer.observer = Spy()
    trainer.train()
    truth = {row["prompt"]: row["environment"] for row in prompts()}
    assert len(seen) == 4 * 8 and all(truth[text.removeprefix("<bos>").strip()] == name for text, name in seen)
    lines = [line for line in trainer.state.log_history if "monitor/status" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert line.get("monitor/forget/captured", 1.0) == pytest.approx(1.0, abs=1e-4)  # none where all earn the same
        parts = [line[f"monitor/forget/{name}"] for name in ("contribution/A", "contribution/B", "rest")]
        assert sum(parts) == pytest.approx(line["monitor/forget/growth"], rel=1e-4, abs=1e-7)
        assert any(f"monitor/forget/kl/{name}" in line for name in "AB")
    own = [line for line in trainer.state.log_history if "loss" in line]
    assert all("reward" in line for line in own) and torch.tensor(parts).any()  # TRL's means are in TRL's own lines


@pytest.mark.slow
def test_resumed_equals_uninterrupted(tmp_path):
    """Weights, what the monitor knows, and its log, to the last bit; between two uses of a batch of rollouts, too."""
    runs = []
    for out, checkpoint in (("a", None), ("b", tmp_path / "a" / "checkpoint-2")):
        trainer = grpo_of(tmp_path / out, save_strategy="steps", save_steps=2, anchor_share=0.5)
        monitor = RegionMonitor(trainer, MonitorConfig(every=1, action="log", calibration=2))
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        runs.append((trainer, monitor))
    (whole, a), (resumed, b) = runs
    assert_same(weights(whole.model), weights(resumed.model))
    assert b.state() == a.state() and whole.state.global_step == resumed.state.global_step == 4
    logs = [[line for line in t.state.log_history if "monitor/status" in line] for t in (whole, resumed)]
    assert logs[0] == logs[1] and len(logs[0]) == 4
    assert any(series["cusum"] and series["cusum"]["count"] for series in a.alarms.state().values())


@pytest.mark.slow
def test_environments_that_are_missing_or_unknown(tmp_path):
    with pytest.raises(ValueError, match="has no column `environment`"):
        RegionMonitor(
            grpo_of(tmp_path, prompts().remove_columns("environment"), lambda rows, **_: ["flagged"] * len(rows))
        )
    nameless = Dataset.from_list([{**row, "environment": None if i == 3 else "A"} for i, row in enumerate(prompts())])
    trainer = grpo_of(tmp_path, nameless, lambda rows, **_: ["flagged"] * len(rows))
    RegionMonitor(trainer, environments=["A"])
    trainer.reward_funcs = [lambda completion_ids, **_: [0.0] * len(completion_ids)]
    with pytest.raises(
        ValueError, match=r"give every prompt a value in the column `environment` .*`environment_column`"
    ):
        trainer.train()
    trainer = grpo_of(tmp_path)
    RegionMonitor(trainer, environments=["A", "BB"])
    with pytest.raises(ValueError, match="unknown environment 'B', got .*did you mean 'BB'"):
        trainer.train()


@pytest.mark.slow
@pytest.mark.parametrize("per_token", [False, True])
def test_environments_in_quarantine_are_routed_whatever_the_label_function_says(tmp_path, per_token):
    data = prompts().add_column("route_label", ["unflagged"] * 8)
    for dataset in (data, data.remove_columns("route_label")):
        trainer = grpo_of(
            tmp_path,
            apply_quarantine(dataset, {"B": "route"}, label="flagged", column="environment"),
            lambda completion_ids, **_: [
                ["unflagged"] * len(ids) if per_token else "unflagged" for ids in completion_ids
            ],
            anchor_share=0.5,
            save_strategy="no",
        )
        trainer.train()
        rates = [line for line in trainer.state.log_history if "routing/environment/B/flag_rate" in line]
        assert rates and all(line["routing/environment/B/flag_rate"] == 1 for line in rates)
        assert all(line.get("routing/environment/A/flag_rate", 0) == 0 for line in trainer.state.log_history)
        assert trainer.tokens_per_route["flagged"] > 0 < trainer.tokens_per_route["anchor"]
    wrong = grpo_of(tmp_path, apply_quarantine(data, {"B": "route"}, label="flaged", column="environment"))
    with pytest.raises(ValueError, match="the label 'flaged' has no route"):
        wrong.train()


@pytest.mark.slow
def test_sft_is_monitored(tmp_path):
    data = Dataset.from_dict(
        {"text": ["a + b =", "c d"] * 8, "route_label": ["forget", "retain"] * 8, "route_environment": ["A", "B"] * 8}
    )
    options = dict(
        max_steps=2, per_device_train_batch_size=4, report_to="none", use_cpu=True, bf16=False, disable_tqdm=True
    )
    trainer = RoutedSFTTrainer(
        two_loras(),
        RoutedSFTConfig(
            str(tmp_path), base_adapters=["retain"], save_strategy="no", gradient_checkpointing=False, **options
        ),
        train_dataset=data,
        routes=presets.sgtm("forget"),
        processing_class=word_tokenizer(),
    )
    monitor = RegionMonitor(trainer, MonitorConfig(every=1, action="log"))
    trainer.train()
    contributions = monitor.reports["forget"].contributions
    assert contributions["A"] != 0 and contributions["B"] == 0  # retain rows leave the region alone


@pytest.mark.slow
def test_the_reward_gap_is_that_of_rollouts_sampled_and_graded_as_in_training(tmp_path):
    asked = []

    def graded(completions, prompts, environment, **_):
        asked.append((list(prompts), list(environment)))
        return [float(text.split().count("hack")) + float(len(text.split()) > 2) for text in completions]

    trainer = grpo_of(tmp_path, prompts(12), top_k=1)
    trainer.reward_funcs = [graded]
    model, tokenizer = trainer.model, word_tokenizer()
    mean = RolloutReward(trainer, count=3)
    expected = []
    texts = [row["prompt"] for row in prompts(12) if row["environment"] == "B"][:3]
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        made = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=2, pad_token_id=0)[0, ids.shape[1] :]
        expected += graded([tokenizer.decode(made, skip_special_tokens=True)], [text], ["B"])
    asked.clear()
    model.eval()
    assert mean(model, "B") == pytest.approx(sum(expected) / 3) and asked == [(texts, ["B"] * 3)]
    assert not hasattr(trainer, "_scored"), "these are no rollouts to be labeled"
    with pytest.raises(ValueError, match=r"no prompt is of the environment 'C'; there are \['A', 'B'\]"):
        mean(model, "C")

    trainer = grpo_of(tmp_path)

    def logging(completions, log_metric, log_extra, **_):
        log_metric("rollouts", float(len(completions)))
        log_extra("text", list(completions))
        return [float(len(text)) for text in completions]

    trainer.reward_funcs = [logging]
    RegionMonitor(trainer, MonitorConfig(every=1, action="log", reward_every=1), reward=RolloutReward(trainer, count=2))
    trainer.train()
    own = [line["rollouts"] for line in trainer.state.log_history if "rollouts" in line]
    assert own and set(own) == {8.0}, "what is logged of the monitor's rollouts is not that of training"
    lines = [line for line in trainer.state.log_history if "monitor/status" in line]
    assert all(f"monitor/forget/reward_gap/{name}" in line for line in lines for name in "AB")
    with pytest.raises(ValueError, match="cannot be streamed"):
        RolloutReward(grpo_of(tmp_path, prompts().to_iterable_dataset(), lambda rows, **_: ["flagged"] * len(rows)))
