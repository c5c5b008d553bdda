from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from families import tokens
from monitor_parts import model_of, randomize

from routed_peft import ablated
from routed_peft.monitoring.factors import find_factors
from routed_peft.monitoring.probe import Probe


def test_probe_against_the_definitions():
    model = model_of("lora", torch.float32)
    randomize(model)
    ids = tokens(4, 6)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    predicts = torch.zeros_like(ids, dtype=torch.bool)
    predicts[:, 1:5] = True
    predicts[1, 3:] = False
    rows_ = {"a": torch.tensor([0, 2]), "b": torch.tensor([1, 3])}
    probe = Probe(3)
    probe.keep({"input_ids": ids, "attention_mask": mask}, predicts, rows=rows_, environments=["a", "b", "c"])
    assert probe.kept[0].environment.tolist() == [0, 1, 0]  # by turns
    factors = find_factors(model, "forget")
    effect = probe.measure(model, {"forget": factors}, environments=3, reduce=lambda t: t)["forget"]
    for name, index in (("a", [0, 2]), ("b", [1])):
        outputs, kl, count = [], 0.0, 0
        for row in index:
            real = int(mask[row].sum())
            for with_region in (True, False):
                with torch.no_grad(), nullcontext() if with_region else ablated(model, "forget"):
                    logits = model(input_ids=ids[row : row + 1, :real]).logits[0]
                outputs.append(logits.log_softmax(-1))
            full, without = outputs[-2:]
            at = predicts[row, :real]
            kl += float((full[at].exp() * (full[at] - without[at])).sum())
            count += int(at.sum())
        column = "abc".index(name)
        assert float(effect.kl[column]) == pytest.approx(kl / count, rel=1e-3)
        assert not probe.kept and effect.kl[2].isnan() and effect.overall[2].isnan()
    seen = {}
    handles = [
        module.register_forward_hook(lambda _, __, output, key=key: seen.__setitem__(key, output))
        for i, f in enumerate(factors)
        for key, module in (((i, "region"), f.b), ((i, "layer"), f.layer))
    ]
    with torch.no_grad():
        model(input_ids=ids[1:2, :4])
    for handle in handles:
        handle.remove()
    squares = [(factors[i].scale * seen[i, "region"]).square().sum() for i in range(len(factors))]
    totals = [seen[i, "layer"].square().sum() for i in range(len(factors))]
    sizes = torch.stack([(s / t).sqrt() for s, t in zip(squares, totals, strict=True)])
    assert torch.allclose(effect.functional_size[:, 1], sizes, rtol=1e-4)
    assert float(effect.overall[1]) == pytest.approx(float((sum(squares) / sum(totals)).sqrt()), rel=1e-4)
