from __future__ import annotations

import pytest
import torch
from reference import loss_of
from routing_parts import ROUTES, batch_of, lora, refuse, two_regions
from torch import nn

from routed_peft import presets
from routed_peft.routing.gradient_routing import GradientRouting


class NoisyNorm(nn.LayerNorm):
    dropout = 0.0

    def __init__(self, size: int, dropout: float) -> None:
        super().__init__(size)
        self.dropout = dropout

    def forward(self, x):
        return nn.functional.dropout(super().forward(x), self.dropout, self.training)


def test_modules_evaluated_twice_may_not_drop_out():
    for dropout in (0.0, 0.1):
        model = lora()
        model.base_model.model.model.norm = NoisyNorm(16, dropout)
        if dropout:
            refuse("is evaluated twice to be routed, and its dropout would differ", model, train_base=True)
        GradientRouting(model, presets.sgtm("forget"), train_base=True, joint=["norms"] if dropout else []).detach()


def test_heads_first_norms_with_as_many_heads_as_positions():
    model = two_regions("gemma3_text")  # four heads
    routing = GradientRouting(model, ROUTES, train_base=True)
    batch = batch_of(2, length=4)
    with pytest.raises(ValueError, match="as many heads as positions"), routing(torch.zeros(2, 4, dtype=torch.long)):
        model(**batch)
    with routing(["forget", "era"]):
        loss_of(model, batch).backward()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own
def test_compiled_equals_eager():
    grads = []
    for compiled in (False, True):
        model, batch = two_regions("llama", torch.float32), batch_of(5)
        routing = GradientRouting(model, ROUTES, train_base=True, gather=False)
        run = torch.compile(model, backend="aot_eager") if compiled else model
        for labels in (list(ROUTES), list(ROUTES)[::-1]):
            with routing(labels):
                loss_of(run, batch).backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    assert all(torch.allclose(grads[0][n], grads[1][n], rtol=1e-4, atol=1e-5) for n in grads[0])
