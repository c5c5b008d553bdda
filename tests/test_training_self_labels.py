from __future__ import annotations

import pytest
import torch

from routed_peft import presets
from routed_peft.training.self_labels import SelfLabels, row_losses


def test_rows_stay_as_they_are_until_both_sides_are_known():
    labels = SelfLabels(presets.sgtm(), "both")
    rows, benefit = torch.tensor([2, 2, 0, 1]), torch.tensor([5.0, 0.0, 1.0, 1.0])
    assert torch.equal(labels.assign(rows, benefit), rows)
    labels.update(torch.tensor([3.0, 0.0]), torch.tensor([1.0, 0.0]))
    assert labels.means == [3.0, None] and torch.equal(labels.assign(rows, benefit), rows)
    labels.update(torch.tensor([0.0, 8.0]), torch.tensor([0.0, 2.0]))
    assert labels.means == [3.0, 4.0] and torch.equal(labels.assign(rows, benefit), rows)


@pytest.mark.parametrize(("mode", "expected"), [("both", [0, 1, 0, 1]), ("forget", [0, 2, 0, 1])])
def test_midpoint(mode, expected):
    labels = SelfLabels(presets.sgtm(), mode)
    labels.update(torch.tensor([4.0, 0.0]), torch.tensor([2.0, 3.0]))  # means 2 and 0
    assert labels.assign(torch.tensor([2, 2, 0, 1]), torch.tensor([1.1, 0.9, 0.0, 9.0])).tolist() == expected


def test_means_run():
    labels = SelfLabels(presets.sgtm(), decay=0.5)
    for total in (2.0, 4.0):
        labels.update(*labels.sums(torch.tensor([0, 0, 1]), torch.tensor([total, total, 1.0])))
    assert labels.means == [3.0, 1.0]


def test_row_losses_are_means_over_tokens():
    logits = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[1, 2, 3, 4], [5, 6, -100, -100]])
    losses = row_losses(lambda: logits, targets)
    log = logits.log_softmax(-1)
    assert torch.allclose(losses[1], -log[1, 0, 6])
    assert torch.allclose(losses[0], -(log[0, 0, 2] + log[0, 1, 3] + log[0, 2, 4]) / 3)


def test_bad_arguments():
    with pytest.raises(ValueError, match="`self_labels` is one of"):
        SelfLabels(presets.sgtm(), "retain")
    with pytest.raises(ValueError, match=r"\['forget', 'retain', 'unlabeled'\] have none"):
        SelfLabels(presets.classic())
