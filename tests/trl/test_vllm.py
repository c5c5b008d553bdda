"""vLLM cannot run here: a stand-in takes the weights that TRL's interface hands over, and generates from them alone."""

from __future__ import annotations

import pytest
import torch
import trl.trainer.grpo_trainer
from families import tiny
from peft import get_peft_model
from regions_parts import randomize
from subspace_parts import subspace_file
from trl.generation.vllm_generation import VLLMGeneration
from trl_parts import VOCABULARY, completions_of, detector, logps, lora, prompts, trainer_of, two_loras, weights

from routed_peft import RoutedConfig
from routed_peft.trl.mixin import folded_parameters

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_(en|dis)able`:FutureWarning")


class Engine(VLLMGeneration):
    """Holds a plain model, loaded strictly from what `_iter_named_params` yields, and samples greedily from it."""

    def __init__(self, model, **_) -> None:
        self.model, self.engine, self.syncs = model, tiny("llama", vocab_size=VOCABULARY).eval(), 0

    def sync_weights(self) -> None:
        self.engine.load_state_dict(dict(self._iter_named_params()))
        self.syncs += 1

    @torch.no_grad()
    def generate(self, prompts, images, num_generations, profiler):
        completions, scores = [], []
        for prompt in prompts:
            ids = list(prompt)
            logprobs = []
            for _ in range(4):
                logits = self.engine(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
                ids.append(int(logits.argmax()))
                logprobs.append([float(logits.max())])
            completions.append(ids[len(prompt) :])
            scores.append(logprobs)
        return prompts, completions, scores, None


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setattr(trl.trainer.grpo_trainer, "VLLMGeneration", Engine)


KINDS = ["stock LoRA", "own LoRA", "subspace"]


def adapted(kind: str, folder):
    """A tiny model with two adapters that do something: two LoRAs, or one, and a region along a subspace."""
    if kind == "stock LoRA":
        return two_loras()
    torch.manual_seed(0)
    low_rank = dict(
        kind="lora", r=2, lora_alpha=4, target_modules=["q_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    path = subspace_file(folder) if kind == "subspace" else None
    along = {"kind": "subspace", "subspace": path, "task_type": "CAUSAL_LM"}
    stays = RoutedConfig(**low_rank, **({"subspace": path} if path else {}))
    model = get_peft_model(tiny("llama", vocab_size=VOCABULARY), stays, "retain")
    model.add_adapter("forget", RoutedConfig(**(along if path else low_rank)))
    model.base_model.set_adapter(["retain", "forget"])
    for name in ("retain", "forget"):
        randomize(model, name)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapters", [[], ["retain"], ["retain", "forget"]])
def test_folded_parameters_are_those_of_the_merged_model(adapters, kind, tmp_path):
    model = adapted(kind, tmp_path)
    before = weights(model)
    found = {name: value.clone() for name, value in folded_parameters(model, adapters)}
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    merged = model.merge_and_unload(adapter_names=adapters) if adapters else model.unload()
    expected = dict(merged.named_parameters())
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_rollouts_come_from_folded_weights_and_anchors_from_ablated_ones(tmp_path, engine, kind):
    trainer = trainer_of(
        tmp_path, adapted(kind, tmp_path), anchor_share=0.5, anchor_environments=["A"], use_vllm=True, dataset=prompts(),
        max_steps=3, label_fn=lambda rows, **_: ["unflagged"] * len(rows),
    )  # fmt: skip
    trainer.train()
    assert trainer.vllm_generation.syncs == 6  # with the regions and without, at each step
    labels = torch.cat([batch["route_label"] for batch in trainer.seen])
    assert set(labels.tolist()) == {1, 2}
    model = adapted(kind, tmp_path).eval()  # as it was at the first step
    batch = trainer.seen[0]
    for row in range(8):
        regions = ("forget",) if batch["route_label"][row] == 2 else ()
        expected = logps(model, batch, row, *regions)
        torch.testing.assert_close(batch["sampling_per_token_logps"][row], expected.detach(), rtol=0, atol=1e-5)
    for log in trainer.state.log_history[:-1]:
        assert log["sampling/sampling_logp_difference/max"] < 1e-5


@pytest.mark.slow
def test_evaluation_without_the_region_asks_an_engine_without_it(tmp_path, engine):
    trainer = trainer_of(tmp_path, use_vllm=True, more={"eval_dataset": prompts(4)}, label_fn=detector)
    found = trainer.evaluate()
    assert trainer.vllm_generation.syncs == 2 and trainer._in_engine == []
    assert found["eval_sampling/sampling_logp_difference/max"] < 1e-5
    assert found["eval_ablated_sampling/sampling_logp_difference/max"] < 1e-5
    trainer.train()
    assert trainer._in_engine == ["forget"] and completions_of(trainer.seen[0])


def test_refuses_regions_that_are_no_update_of_a_weight(tmp_path):
    config = RoutedConfig(kind="mlp", size=4, init="model", task_type="CAUSAL_LM")
    model = get_peft_model(tiny("llama", vocab_size=VOCABULARY), config, "forget")
    with pytest.raises(ValueError, match="`use_vllm` with the adapter 'forget'.*is no linear update"):
        trainer_of(tmp_path, model, base_adapters=[], train_base=True, use_vllm=True)
    with pytest.warns(UserWarning, match="has no bias"):
        biased = get_peft_model(tiny("llama", vocab_size=VOCABULARY), lora(lora_bias=True), "forget")
    with pytest.raises(ValueError, match="is no linear update"):
        trainer_of(tmp_path, biased, base_adapters=[], train_base=True, use_vllm=True)
