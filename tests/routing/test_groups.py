from __future__ import annotations

from reference import loss_of
from routing_parts import batch_of, two_regions

from routed_peft import presets
from routed_peft.routes import Route
from routed_peft.routing.gradient_routing import GradientRouting


def test_joint_modules_learn_from_everything():
    model, batch = two_regions("llama"), batch_of(2)
    routing = GradientRouting(
        model,
        presets.sgtm("forget") | {"b": Route(weights={"bio": 1.0})},
        train_base=True,
        joint=["embeddings", "norms", "head"],
    )
    with routing(["forget", "forget"]):
        loss_of(model, batch).backward()
    learned = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any() and "routed_" not in n}
    assert learned and all("embed" in n or "norm" in n or "lm_head" in n for n in learned)
    assert routing.groups == ["base", "joint", "forget", "bio"]
