from __future__ import annotations

import pytest
import torch
from families import tiny
from monitor_parts import monitored, quiet
from subspace_parts import subspace_file, subspace_layers, with_subspace

from routed_peft.monitoring.gradients import weight_drift
from routed_peft.subspaces import Subspace, haar


def test_a_subspace_region(tmp_path):
    """Parts of the growth, energy share and drift along the subspace, all by their definitions."""
    model = with_subspace(tiny("llama", torch.float64, vocab_size=300), subspace_file(tmp_path), "forget")
    options = dict(max_steps=1, train_base=True, gradient_accumulation_steps=2, per_device_train_batch_size=4)
    trainer, monitor = monitored(tmp_path, quiet(random_subspaces=2), model=model, **options)
    layers = [f.layer for f in monitor.factors["forget"]]
    assert all(f.b is None for f in monitor.factors["forget"])
    gradients, batches = [], []
    for layer in layers:  # as the monitor does, but kept whole
        layer.register_forward_hook(
            lambda _, __, y: y.register_hook(gradients.append) and None if y.requires_grad else None
        )
    observe = monitor.observe
    monitor.observe = lambda inputs, names: (batches.append(names), observe(inputs, names))
    before = [layer.get_delta_weight("forget").clone() for layer in layers]
    trainer.train()
    report, u = monitor.reports["forget"], layers[0].basis("forget")
    norm = lambda products: float(torch.cat([d.flatten() for d in products]).norm())
    after = [layer.get_delta_weight("forget") for layer in layers]
    assert (
        report.growth.growth == pytest.approx(norm(after) - norm(before), rel=1e-9)
        and report.growth.captured > 1 - 1e-9
    )
    assert sum(report.contributions.values()) + report.growth.rest == pytest.approx(report.growth.growth, rel=1e-9)
    count = len(layers)
    for name in ("noise", "pattern"):
        parts = [
            torch.cat(
                [g[[i for i, other in enumerate(names) if other == name]] for g in gradients[count * k :][:count]]
            )
            for k, names in enumerate(batches)
        ]
        every = torch.cat(parts)
        share = float((every @ u).square().sum() / every.square().sum())
        assert report.extra["energy"][name] == pytest.approx(share, rel=1e-5)
        random = [
            float((every @ haar(Subspace(u), s).at(0).double()).square().sum() / every.square().sum()) for s in (0, 1)
        ]
        assert report.extra["energy_random"][name] == pytest.approx(sum(random) / 2, rel=1e-5)
    assert report.weight_drift < 1e-12
    with torch.no_grad():
        layers[0].base_layer.weight += 0.1 * u[:, :1]
    moved = 0.1 * layers[0].in_features ** 0.5
    kept = torch.cat([m.routed_C0["forget"].flatten() for m in subspace_layers(model)]).norm()
    assert weight_drift(model, "forget") == pytest.approx(moved / float(kept), rel=1e-6)
