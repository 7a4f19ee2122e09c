"""The prototype loss (Eq. 9) against values worked out by hand, its gradient, and its digits next to a prototype."""

import pytest
import torch

from fd2fast.reference import normalized_l2, prototype_loss


def test_by_hand():
    # z = (3, 4): |z - c| / (|z| + |c|): c0 = (0, 0): 5/5; c1 = (3, -4): 8/10; c2 = (-3, -4): 10/10
    z = torch.tensor([[3.0, 4.0]]).expand(3, 2)
    prototypes = torch.tensor([[0.0, 0.0], [3.0, -4.0], [-3.0, -4.0]])
    loss = prototype_loss(z, prototypes, torch.tensor([0, 1, 2]), beta=0.25, eps=0.0)
    # label 1: .25 * .8 + .75 * (1 - (1 + 1) / 2); labels 0 and 2: .25 + .75 * (1 - (.8 + 1) / 2)
    torch.testing.assert_close(loss, torch.tensor([0.325, 0.2, 0.325]))


def test_one_class_keeps_only_its_own_term():
    z = torch.tensor([[3.0, 4.0]])
    loss = prototype_loss(z, torch.tensor([[3.0, -4.0]]), torch.tensor([0]), beta=0.25, eps=0.0)
    assert loss.item() == pytest.approx(0.25 * 0.8)


@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 1), (1, 2, 1), (4, 3, 5), (3, 13, 7)])
def test_equals_the_plain_double_loop(n, k, d):
    z, c = torch.randn(n, d, dtype=torch.float64), torch.randn(k, d, dtype=torch.float64)
    labels = torch.randint(k, (n,))
    for i, loss in enumerate(prototype_loss(z, c, labels, beta=0.3)):
        distances = [normalized_l2(z[i], c[j]).item() for j in range(k)]
        own = distances.pop(int(labels[i]))
        expected = 0.3 * own + (0.7 * (1 - sum(distances) / len(distances)) if distances else 0.0)
        assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("k", [1, 2, 7])
def test_gradcheck(k):
    z = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    c = torch.randn(k, 5, dtype=torch.float64)
    labels = torch.randint(k, (4,))
    assert torch.autograd.gradcheck(lambda z: prototype_loss(z, c, labels, beta=0.3), (z,))


def test_chunks_change_nothing(monkeypatch):
    import sys

    z = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    c, labels = torch.randn(11, 5, dtype=torch.float64), torch.randint(11, (6,))
    whole = prototype_loss(z, c, labels)
    (whole_gradient,) = torch.autograd.grad(whole.sum(), z)
    monkeypatch.setattr(sys.modules["fd2fast.reference.prototype_loss"], "_CHUNK_ELEMENTS", 2 * z.numel())
    parts = prototype_loss(z, c, labels)
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)
    torch.testing.assert_close(torch.autograd.grad(parts.sum(), z)[0], whole_gradient)


def test_gradient_is_finite_on_a_prototype_and_at_zero():
    c = torch.randn(3, 4)
    z = torch.stack([c[1], torch.zeros(4)]).requires_grad_()
    prototype_loss(z, torch.cat([c, torch.zeros(1, 4)]), torch.tensor([1, 3])).sum().backward()
    assert torch.isfinite(z.grad).all()


def test_keeps_its_digits_next_to_a_prototype():
    c = torch.nn.functional.normalize(torch.randn(5, 4096, dtype=torch.float64), dim=1).float()
    noise = 1e-4 * torch.randn(5, 4096, dtype=torch.float64)
    z = (c.double() + noise / noise.norm(dim=1, keepdim=True) * 1e-4).float()
    labels = torch.arange(5)
    exact = prototype_loss(z.double(), c.double(), labels, beta=1.0)
    torch.testing.assert_close(prototype_loss(z, c, labels, beta=1.0).double(), exact, rtol=1e-5, atol=0)
