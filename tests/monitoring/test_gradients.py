from __future__ import annotations

import pytest
import torch
from families import tokens
from monitor_parts import KINDS, ROUTES, model_of, randomize
from reference import loss_of
from torch.nn.attention import SDPBackend, sdpa_kernel

from routed_peft import GradientRouting
from routed_peft.monitoring.factors import find_factors
from routed_peft.monitoring.gradients import EnvironmentGradients

ENVIRONMENTS = {"a": torch.tensor([0, 2, 3]), "b": torch.tensor([1, 4])}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("edges", ["parameters", "activations"])
@pytest.mark.parametrize("labels", ["example", "token"])
def test_gradients_by_environment_equal_separate_backward_passes(kind, edges, labels):
    model = model_of(kind, torch.float64)
    randomize(model)
    ids = tokens(5, 6)
    batch = {"input_ids": ids, "labels": ids}
    given = torch.tensor([0, 1, 2, 3, 0])
    if labels == "token":
        given = torch.randint(0, 4, ids.shape, generator=torch.Generator().manual_seed(0))
    routing = GradientRouting(model, ROUTES, train_base=True, edges=edges)
    modules = [module for f in find_factors(model, "forget") for module in f.modules]
    gradients = EnvironmentGradients(modules)
    gradients.start()
    gradients.expect_batch(ENVIRONMENTS, 5)
    with routing(given):
        loss_of(model, batch).backward()
    gradients.stop()
    for name, index in ENVIRONMENTS.items():
        model.zero_grad()
        with routing(given[index]):
            (loss_of(model, {"input_ids": ids[index], "labels": ids[index]}) * len(index) / 5).backward()
        for module in modules:
            assert torch.allclose(gradients.sums[module][name], module.weight.grad, rtol=1e-9, atol=1e-14)
            assert module.weight.grad.abs().max() > 1e-8


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_under_checkpointing(reentrant):
    sums = []
    for checkpointing in (False, True):
        model = model_of("mlp", torch.float64).train()
        randomize(model)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        modules = [module for f in find_factors(model, "forget") for module in f.modules]
        gradients = EnvironmentGradients(modules)
        gradients.start()
        gradients.expect_batch(ENVIRONMENTS, 5)
        ids = tokens(5, 6)
        with sdpa_kernel(SDPBackend.MATH):  # when it is computed again, too
            loss_of(model, {"input_ids": ids, "labels": ids}).backward()
        sums.append([gradients.sums[module][name] for module in modules for name in ENVIRONMENTS])
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-15) for a, b in zip(*sums, strict=True))


def test_rows_that_are_no_rows_are_refused():
    linear = torch.nn.Linear(2, 2)
    gradients = EnvironmentGradients([linear])
    gradients.start()
    gradients.expect_batch(ENVIRONMENTS, 5)
    with pytest.raises(ValueError, match="sees 30 rows where the batch has 5"):
        linear(torch.ones(30, 2))
