from __future__ import annotations

import numpy as np
import pytest
from datasets import ClassLabel
from trl_parts import (
    detector,
    prompts,
    trainer_of,
)

from routed_peft.trl import (
    AdvantageLabels,
    ColumnLabels,
    EnvironmentLabels,
    ImperfectDetector,
)
from routed_peft.trl.rollout_labels import labels_from_dataset

KINDS = ["flagged", "unflagged"]
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_(en|dis)able`:FutureWarning")


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_labels_of_evaluation_rollouts_mean_the_same_classes(tmp_path):
    data = prompts().add_column("route_label", ["flagged", "unflagged"] * 4)
    train, other = (data.cast_column("route_label", ClassLabel(names=names)) for names in (KINDS, KINDS[::-1]))
    with pytest.raises(ValueError, match="cast both to one"):
        trainer_of(tmp_path, dataset=train, label_fn=None, more={"eval_dataset": other})
    assert labels_from_dataset(data, {"a": train})(rows=[{"route_label": 1}]) == ["unflagged"]


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
