from __future__ import annotations

import statistics
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset
from self_label_parts import (
    SELF_LABELING,
    TOPICS,
    self_labeled,
    self_labeled_topics,
    swapped,
    topics_model,
    two_alphabets,
)
from torch import nn
from training_parts import assert_same, train, weights
from transformers import TrainerCallback

from routed_peft import presets
from routed_peft.runs.cost import TrainingCost, matmul_parameters
from routed_peft.training import RegionSchedule, SelfLabelConfig, SelfLabeledRows


def test_self_labels_agree_with_the_truth_and_resume(tmp_path, tokenizer):
    """Once the region knows one alphabet, it finds the unlabeled rows written in it."""
    options = SELF_LABELING | dict(save_strategy="steps", save_steps=14)
    data = self_labeled(robust_share=0.2)
    trainer = train(tmp_path / "a", tokenizer, dataset=data, **options)
    assert data.labels.tolist() == data.rows["side"][:]
    assert [(scoring["step"], scoring["start"]) for scoring in data.scorings] == [(10, 11 * 8)]
    taken = trainer.tokens_per_route
    assert taken["unlabeled"] <= 8 * 7 and sum(taken.values()) == 160 * 7
    assert 0.2 < 1 - data.in_order("side")[11 * 8 :].count("retain") / (160 - 11 * 8) < 0.3  # forget_share
    again = self_labeled(robust_share=0.2)
    resumed = train(tmp_path / "b", tokenizer, dataset=again, resume=str(tmp_path / "a" / "checkpoint-14"), **options)
    assert_same(weights(trainer.model), weights(resumed.model))
    assert again.scorings == data.scorings and again.in_order("side") == data.in_order("side")


def test_rows_laid_out_for_another_length_are_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"laid out for a run of 160 and it takes 80, 10 steps of 8: .*`count=80`"):
        train(tmp_path, tokenizer, dataset=self_labeled(), **SELF_LABELING | {"max_steps": 10})


@pytest.mark.slow
def test_documents_that_share_a_row_are_told_apart_and_resume(tmp_path, tokenizer):
    """Every unlabeled row has a document in either alphabet, each of four tokens with the one that ends it."""
    separator, rows = 1, two_alphabets().to_list()
    for row in rows:
        row["input_ids"][3] = row["input_ids"][7] = separator
        row["side"] = [row["side"]] * 8
    for one, other in zip(rows[120::2], rows[121::2], strict=True):
        for name in ("input_ids", "side"):
            one[name][4:], other[name][4:] = other[name][4:], one[name][4:]
    rows = Dataset.from_list(rows)
    about = {"labeled_first": 0.5, "forget_share": 0.25, "first_forget_share": 0.25}
    options = SELF_LABELING | dict(save_strategy="steps", save_steps=14)
    data = SelfLabeledRows(rows, 160, config=SelfLabelConfig(**about), separator=separator)
    trainer = train(tmp_path / "a", tokenizer, dataset=data, **options)
    found = data.rows.select(data.found_rows)
    assert [set(sides) for sides in found["side"]] == [{label} for label in data.labels[data.found_rows]]
    assert len(found) == 40 and data.scorings[0]["is_forget"][0] in ([True, False], [False, True])
    again = SelfLabeledRows(rows, 160, config=SelfLabelConfig(**about), separator=separator)
    resumed = train(tmp_path / "b", tokenizer, dataset=again, resume=str(tmp_path / "a" / "checkpoint-14"), **options)
    assert_same(weights(trainer.model), weights(resumed.model))


def test_a_region_that_overrules_finds_wrong_labels(tmp_path, tokenizer):
    """Eleven of 120 are wrong, of either side."""
    wrong = range(0, 120, 11)
    data = self_labeled(swapped(two_alphabets(), wrong), overrule=True, first_forget_share=0.5, threshold="median")
    sides = np.array(data.rows["side"][:], dtype=object)
    train(tmp_path, tokenizer, dataset=data, **SELF_LABELING)
    scored = np.array(data.scorings[0]["rows"])
    assert set(wrong) & set(scored.tolist()) and (data.labels[scored] == sides[scored]).all()


@pytest.mark.slow
def test_a_second_scoring_counts_from_where_it_was_and_resumes(tmp_path, tokenizer):
    options = SELF_LABELING | dict(save_strategy="steps", save_steps=4)
    about = {
        "rows": swapped(two_alphabets(), range(0, 120, 23)),
        "overrule": True,
        "score_again_at": 0.7,
        "threshold": "median",
    }
    data = self_labeled(first_forget_share=0.5, **about)
    trainer = train(tmp_path / "a", tokenizer, dataset=data, **options)
    assert [(scoring["step"], scoring["start"]) for scoring in data.scorings] == [(10, 11 * 8), (14, 15 * 8)]
    logged = [entry for entry in trainer.state.log_history if "self_labels_forget" in entry]
    assert [entry["step"] for entry in logged] == [10, 14]
    asked = sum(len(scoring["rows"]) for scoring in data.scorings)
    assert data.scored_tokens == 8 * (asked + 2 * 120), "those with a label are asked each time"
    scored = np.array(data.scorings[1]["rows"])
    assert (data.labels[scored] == np.array(data.rows["side"][:], dtype=object)[scored]).all()
    for step in (12, 16):  # between the two, and after
        again = self_labeled(first_forget_share=0.5, **about)
        resume = str(tmp_path / "a" / f"checkpoint-{step}")
        resumed = train(tmp_path / f"{step}", tokenizer, dataset=again, resume=resume, **options)
        assert_same(weights(trainer.model), weights(resumed.model))
        assert again.scorings == data.scorings
    before = list(data.scorings)
    afresh = train(tmp_path / "c", tokenizer, dataset=data, **options)
    assert_same(weights(trainer.model), weights(afresh.model))
    assert data.scorings == before, "rows that served before forget what was found"


@pytest.mark.slow
def test_a_run_that_stops_at_a_scoring_resumes_with_the_same_weights_of_tokens(tmp_path, tokenizer):
    """The rows of the next step, which a loader may have fetched, keep what they counted as."""
    options = SELF_LABELING | dict(save_strategy="steps", save_steps=10, routes=presets.sgtm("forget", 1.0))
    about = {"overrule": True, "first_forget_share": 0.5, "token_weights": torch.linspace(0, 1, 300)}
    about["rows"] = swapped(two_alphabets(), range(1, 120, 3))
    trainer = train(tmp_path / "a", tokenizer, dataset=self_labeled(**about), **options)
    resume = str(tmp_path / "a" / "checkpoint-10")
    resumed = train(tmp_path / "b", tokenizer, dataset=self_labeled(**about), resume=resume, **options)
    assert_same(weights(trainer.model), weights(resumed.model))


@pytest.mark.slow
def test_self_labels_refuse_what_they_cannot_do(tmp_path, tokenizer):
    for share in (0.51, 0.96):  # the step of the first scoring, and the last but one
        with pytest.raises(ValueError, match="`score_again_at`: after step .* of 20 there is nothing left to label"):
            train(tmp_path / "a", tokenizer, dataset=self_labeled(score_again_at=share), **SELF_LABELING)
    with pytest.raises(ValueError, match="have none"):
        train(tmp_path / "a", tokenizer, dataset=self_labeled(), routes=presets.classic(), **SELF_LABELING)
    with pytest.raises(ValueError, match="`train_sampling_strategy` to 'sequential'"):
        train(tmp_path / "a", tokenizer, dataset=self_labeled())
    with pytest.raises(ValueError, match="cannot tell them apart"):
        data = self_labeled()

        class TurnRound(TrainerCallback):  # the labels, under way
            def on_step_begin(self, args, state, control, **kwargs):
                data._given[:120] = swapped(two_alphabets(), range(120))["route_label"][:120]

        train(tmp_path / "a", tokenizer, dataset=data, callbacks=[TurnRound()], **SELF_LABELING)


def test_the_summary_says_what_a_run_has_cost(tmp_path, tokenizer):
    """Scoring a row takes two forward passes; a run whose tokens are not counted has no ledger."""
    data = self_labeled()
    trainer = train(tmp_path / "a", tokenizer, dataset=data, include_num_input_tokens_seen="all", **SELF_LABELING)
    ledger = TrainingCost.from_dict(trainer.run_summary(labeled_forget_tokens=24)["ledger"])
    size = matmul_parameters(trainer.model)
    scored = 8 * (len(data.scorings[0]["rows"]) + sum(label != "unlabeled" for label in data.rows["route_label"]))
    assert scored == data.scored_tokens and self_labeled().scored_tokens == 0
    assert ledger == TrainingCost(6 * size * 160 * 8 + 2 * size * 2 * scored, 20, 160 * 8, 24)
    trainer.state.num_input_tokens_seen = 0
    assert "ledger" not in trainer.run_summary()


def slow_labels(trained: nn.Module, data: SelfLabeledRows, scored: list[int]) -> list[str]:
    """Score one row at a time by each region alone, and label it by loops."""
    model = topics_model().eval()
    model.load_state_dict(trained.state_dict())

    def benefits(row: int) -> list[float]:
        ids = torch.tensor([data.rows[row]["input_ids"]])
        with torch.no_grad():
            model.base_model.disable_adapter_layers()
            off = float(model(ids, labels=ids).loss)
            model.base_model.enable_adapter_layers()
            found = []
            for name in TOPICS:
                model.base_model.set_adapter(name)
                found.append(off - float(model(ids, labels=ids).loss))
        return found

    thresholds = []
    for i, name in enumerate(TOPICS):
        own, core = (
            [benefits(row)[i] for row in range(180) if data.rows[row]["route_label"] == label]
            for label in (name, "retain")
        )
        above, below = statistics.pstdev(own), statistics.pstdev(core)
        thresholds.append((statistics.mean(own) * below + statistics.mean(core) * above) / (above + below))
    labels = []
    for row in scored:
        able = [(b - t, name) for b, name, t in zip(benefits(row), TOPICS, thresholds, strict=True) if b > t]
        labels.append(max(able)[1] if able else "retain")
    return labels


def test_several_regions_label_by_benefits_and_thresholds_of_their_own(tmp_path, tokenizer):
    """As a slow reference does, and as is true; and a run that resumes finds the same."""
    options = SELF_LABELING | {"save_strategy": "steps", "save_steps": 14, "routes": RegionSchedule(TOPICS)}
    options |= {"learning_rate": 1e-2}
    data, expected = self_labeled_topics(), []

    class Reference(TrainerCallback):  # runs before the scoring of this step
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 10:
                expected.extend(slow_labels(model, data, data.rows_to_score(160 - 11 * 8).tolist()))

    trainer = train(tmp_path / "a", tokenizer, topics_model(), dataset=data, callbacks=[Reference()], **options)
    (scoring,) = data.scorings
    assert scoring["labels"] == expected and {"retain", *TOPICS} == set(expected)
    assert data.labels.tolist() == data.rows["side"][:]
    asked = len(scoring["rows"]) + 180
    assert data.scored_tokens == 8 * asked and data.forward_tokens == 3 * 8 * asked
    (logged,) = (line for line in trainer.state.log_history if "self_labels_bio" in line)
    assert {label: logged[f"self_labels_{label}"] for label in ("retain", *TOPICS)} == Counter(expected)
    again, resume = self_labeled_topics(), str(tmp_path / "a" / "checkpoint-14")
    resumed = train(tmp_path / "b", tokenizer, topics_model(), dataset=again, resume=resume, **options)
    assert_same(weights(trainer.model), weights(resumed.model))
    assert again.scorings == data.scorings and again.in_order("side") == data.in_order("side")


def test_the_region_that_cannot_tell_its_rows_apart_is_named(tmp_path, tokenizer):
    data = self_labeled_topics()

    class TurnRound(TrainerCallback):  # the labels of one region, under way
        def on_step_begin(self, args, state, control, **kwargs):
            swap = {"cyber": "retain", "retain": "cyber"}
            data._given = np.array([swap.get(label, label) for label in data.rows["route_label"]], dtype=object)

    with pytest.raises(ValueError, match="helps labeled cyber rows by .* and retain rows by .*cannot tell them apart"):
        train(
            tmp_path, tokenizer, topics_model(), dataset=data, routes=RegionSchedule(TOPICS), callbacks=[TurnRound()],
            **SELF_LABELING,
        )  # fmt: skip
