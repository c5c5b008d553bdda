"""Coherence after ablation: the best step by held-out rows is kept, and nothing is kept that does not help."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from experiments.common.coherence import restore_coherence


@pytest.fixture
def model():
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, **size)).double()


@pytest.fixture
def rows():
    return torch.arange(8 * 12).mul(7).remainder(5).view(8, 12)


def loss(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, labels=ids).loss.item()


def reference(model, rows, steps, rate):
    """Every step's weights and held-out loss, by a second optimizer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1)
    found = [(loss(model, rows[4:]), {k: p.clone() for k, p in model.state_dict().items()})]
    for _ in range(steps):
        model.zero_grad()
        model(input_ids=rows[:4], labels=rows[:4]).loss.backward()
        optimizer.step()
        found.append((loss(model, rows[4:]), {k: p.clone() for k, p in model.state_dict().items()}))
    return found


def test_it_keeps_the_best_step_of_the_best_rate(model, rows):
    start, rates = {k: p.clone() for k, p in model.state_dict().items()}, (1e-3, 0.1, 3.0)
    runs = []
    for rate in rates:
        model.load_state_dict(start)
        runs.append(reference(model, rows, 12, rate))
    model.load_state_dict(start)
    found = restore_coherence(model, rows, steps=12, learning_rates=rates)
    lowest = [min(value for value, _ in run) for run in runs]
    best = runs[lowest.index(min(lowest))]
    values = [value for value, _ in best]
    assert found.learning_rate == rates[lowest.index(min(lowest))] == 0.1
    assert found.retain_losses == pytest.approx(values, abs=1e-12)
    assert 0 < found.best_step == values.index(min(values))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, best[found.best_step][1][name], rtol=0, atol=1e-12)


def test_a_model_that_no_step_helps_stays_as_it_was(model, rows):
    start = {k: p.clone() for k, p in model.state_dict().items()}
    found = restore_coherence(model, rows, steps=3, learning_rates=[30.0])
    assert found.best_step == 0 and found.retain_losses[0] == min(found.retain_losses)
    assert all(torch.equal(tensor, start[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("count", "steps", "rates", "got"),
    [(1, 3, [1e-3], "3, 1 and 1"), (8, 0, [1e-3], "0, 1 and 8"), (8, 3, [], "3, 0 and 8")],
)
def test_what_it_takes(model, rows, count, steps, rates, got):
    with pytest.raises(ValueError, match=rf"`steps`, 1 of `learning_rates` and 2 `rows`, got {got}"):
        restore_coherence(model, rows[:count], steps=steps, learning_rates=rates)
