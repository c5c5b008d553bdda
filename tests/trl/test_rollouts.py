from __future__ import annotations

import math

import pytest
import torch
from trl_parts import (
    answering,
    completions_of,
    detector,
    is_hack,
    reward,
    trainer_of,
)

from routed_peft.trl import (
    EnvironmentLabels,
    ImperfectDetector,
    RolloutLabels,
)
from routed_peft.trl.rollouts import position_values

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_(en|dis)able`:FutureWarning")


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
            "not finite numbers",
        ),
        (answering(lambda ids: RolloutLabels(detector(ids), advantages=[math.inf] * 8)), "not finite numbers"),
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


def test_refuses_advantages_that_would_be_lost(tmp_path):
    own = answering(lambda ids: RolloutLabels(detector(ids), advantages=[1.0] * 8))
    with pytest.raises(ValueError, match="returned advantages of its own"):
        trainer_of(tmp_path, label_fn=own, baseline_over="unflagged").train()


def test_values_of_tokens_stand_one_position_to_the_left():
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    assert position_values([[3], []], mask, completions=2, fill=-100).tolist() == [[-100, 3, 3, -100, -100], [-100] * 5]


@pytest.mark.slow
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


@pytest.mark.slow
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
