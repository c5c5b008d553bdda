from __future__ import annotations

import pytest
import torch

from routed_peft.regions.projections import cut_gradient, joint_basis, project_off, restore_component


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def basis(d: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(draw(d, k, seed=seed))[0]


@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6)])
def test_what_is_projected_off_is_what_a_matrix_would_take(shape):
    x, u = draw(*shape), basis(6, 2)
    off = project_off(x, u)
    torch.testing.assert_close(off, x @ (torch.eye(6, dtype=torch.float64) - u @ u.T))
    torch.testing.assert_close(off @ u, torch.zeros(*shape[:-1], 2, dtype=torch.float64))
    torch.testing.assert_close(project_off(off, u), off)


def test_low_precision_is_projected_in_the_precision_of_the_basis_and_keeps_its_dtype():
    x, u = draw(5, 6).bfloat16(), basis(6, 2).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = project_off(x, u)
    wide = x.float() - x.float() @ u @ u.T
    assert found.dtype == torch.bfloat16 and torch.equal(found, wide.bfloat16())


def test_cutting_leaves_the_output_and_takes_the_component_from_its_gradient():
    y, u = draw(3, 6).requires_grad_(), basis(6, 2)
    out = cut_gradient(y, u)
    assert torch.equal(out, y)
    weight = draw(3, 6, seed=1)
    (out * weight).sum().backward()
    torch.testing.assert_close(y.grad, project_off(weight, u))


def test_the_joint_basis_spans_every_subspace_and_no_more():
    first, second = basis(8, 2, seed=1), basis(8, 3, seed=2)
    mixed = torch.linalg.qr(torch.cat([first[:, :1], second[:, :1]], 1))[0]  # lies within the sum of both
    joint = joint_basis([first, second, mixed])
    assert joint is not None and joint.shape == (8, 5)
    torch.testing.assert_close(joint.T @ joint, torch.eye(5, dtype=torch.float64))
    for one in (first, second, mixed):
        torch.testing.assert_close(project_off(one.T, joint), torch.zeros_like(one.T), rtol=0, atol=1e-10)
    assert joint_basis([]) is None and joint_basis([first]) is first


@pytest.mark.parametrize("orthonormal", [True, False])
def test_a_component_is_restored_and_the_rest_stays(orthonormal):
    """Bases side by side overlap: their columns are not orthonormal, and not even independent."""
    u = basis(8, 2, seed=1)
    if not orthonormal:
        u = torch.cat([u, u[:, :1], basis(8, 1, seed=2)], 1)
    before, moved = draw(8, 4), draw(8, 4, seed=3)
    part, off = (
        u.T @ before,
        project_off(moved.T, torch.linalg.svd(u, full_matrices=False)[0][:, : 2 + (not orthonormal)]).T,
    )
    restore_component(moved, u, part)
    torch.testing.assert_close(u.T @ moved, part)
    rest = project_off(moved.T, torch.linalg.svd(u, full_matrices=False)[0][:, : 2 + (not orthonormal)]).T
    torch.testing.assert_close(rest, off)


def test_a_matrix_of_low_precision_is_restored_in_that_of_the_basis():
    u, before = basis(8, 2).float(), draw(8, 4).bfloat16()
    moved = (before.float() + 0.5).bfloat16()
    restore_component(moved, u, u.T @ before.float())
    torch.testing.assert_close(u.T @ moved.float(), u.T @ before.float(), rtol=0, atol=5e-2)
    assert moved.dtype == torch.bfloat16
