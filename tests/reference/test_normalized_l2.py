"""The normalised distance against values worked out by hand, and its gradient at the kinks."""

import math

import pytest
import torch

from fd2fast.reference import normalized_l2


def test_by_hand():
    # |u - v| = |(0, 8)| = 8, |u| = |v| = 5
    u = torch.tensor([3.0, 4.0])
    v = torch.tensor([3.0, -4.0])
    assert normalized_l2(u, v, eps=0.0).item() == pytest.approx(0.8)
    assert normalized_l2(u, v, eps=6.0).item() == pytest.approx(0.5)
    assert normalized_l2(u, -u, eps=0.0).item() == pytest.approx(1.0)


def test_default_eps_is_1e_6():
    u = torch.tensor([1e-6], dtype=torch.float64)
    assert normalized_l2(u, torch.zeros_like(u)).item() == pytest.approx(0.5, rel=1e-12)


def test_broadcasts_over_leading_dimensions():
    u, v = torch.randn(4, 1, 7), torch.randn(3, 7)
    d = normalized_l2(u, v)
    assert d.shape == (4, 3)
    torch.testing.assert_close(d[2, 1], normalized_l2(u[2, 0], v[1]))


@pytest.mark.parametrize(
    ("u", "v"), [([1.0, 2.0], [1.0, 2.0]), ([0.0, 0.0], [0.0, 0.0]), ([0.0, 0.0], [3.0, 4.0]), ([3.0, 4.0], [0.0, 0.0])]
)
def test_gradient_is_finite_at_equal_and_zero_vectors(u, v):
    u, v = torch.tensor(u, requires_grad=True), torch.tensor(v, requires_grad=True)
    normalized_l2(u, v).backward()
    assert torch.isfinite(u.grad).all()
    assert torch.isfinite(v.grad).all()
    if torch.equal(u, v):
        assert u.grad.count_nonzero() == 0


def test_gradient_by_hand():
    # one dimension, u = 3, v = 1: d = 2 / 4, dd/du = 1 / 4 - 2 / 16
    u = torch.tensor([3.0], requires_grad=True)
    normalized_l2(u, torch.tensor([1.0]), eps=0.0).backward()
    assert u.grad.item() == pytest.approx(0.125)


def test_gradcheck():
    u = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    v = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(normalized_l2, (u, v))


def test_half_is_summed_in_float():
    # the sum of 65,536 squares of 2 passes float16's largest number
    u = torch.full((65536,), 2.0, dtype=torch.float16)
    d = normalized_l2(u, torch.zeros_like(u))
    assert d.dtype == torch.float32
    assert math.isclose(d.item(), 1.0, rel_tol=1e-6)
