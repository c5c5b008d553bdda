from __future__ import annotations

import pytest
import torch

from routed_peft.subspaces import (
    drift,
    leak,
)


def test_leak_and_drift():
    u = torch.linalg.qr(torch.randn(8, 2)).Q
    w0 = torch.randn(8, 5)
    along, across = u @ torch.randn(2, 5), torch.randn(8, 5)
    across -= u @ (u.T @ across)
    assert leak(w0 + along, w0, u) == pytest.approx(1)
    assert leak(w0 + across, w0, u) == pytest.approx(0, abs=1e-12)
    total = float(along.square().sum() + across.square().sum())
    assert leak(w0 + along + across, w0, u) == pytest.approx(float(along.square().sum()) / total, rel=1e-4)
    assert leak(w0, w0, u) == 0
    h = torch.randn(3, 8)
    assert drift(h, h, u) == 0 and drift(2 * h, h, u) == pytest.approx(1)
    assert drift(h + across[:, :1].T, h, u) == pytest.approx(0, abs=1e-5)
    with pytest.raises(ValueError, match="not orthonormal"):
        leak(w0, w0, 2 * u)
