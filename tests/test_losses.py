from __future__ import annotations

import pytest
import torch

from routed_peft.losses import DivergedError, check_finite, target_losses, token_losses


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_losses_are_those_of_a_softmax_in_float32_or_better(dtype):
    logits = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    targets = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, -100, -100]])
    found, wide = token_losses(logits, targets), logits.to(torch.promote_types(dtype, torch.float32))
    assert found.dtype == wide.dtype and found.shape == (2, 4)
    for row in range(2):
        for place in range(4):
            token = int(targets[row, place + 1])
            expected = 0.0 if token < 0 else -wide[row, place].log_softmax(-1)[token].item()
            assert found[row, place].item() == pytest.approx(expected, rel=1e-6)
    assert torch.equal(found, target_losses(logits[:, :-1], targets[:, 1:]))


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_a_run(loss):
    check_finite(torch.tensor(1.0), step=3)
    with pytest.raises(DivergedError, match=f"the loss is {loss} at step 3"):
        check_finite(torch.tensor(loss), step=3)
