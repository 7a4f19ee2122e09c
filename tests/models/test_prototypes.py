"""Prototype rules against their recurrences and closed forms."""

import pytest
import torch
from torch.nn import functional as F

from fd2fast.models.prototypes import Prototypes

K, D = 5, 7


def fresh(mu=0.05, dtype=torch.float64):
    return Prototypes(
        torch.zeros(K, D, dtype=dtype), torch.zeros(K, D, dtype=dtype), torch.zeros(K, dtype=torch.bool), mu
    )


def stream(batches=12, size=6, dtype=torch.float64):
    for _ in range(batches):
        yield F.normalize(torch.rand(size, D, dtype=dtype), dim=1), torch.randint(K - 1, (size,))


@pytest.mark.parametrize("mu", [0.05, 0.5, 1.0])
def test_ema_is_the_sequential_recurrence(mu):
    prototypes, by_hand = fresh(mu), {}
    for z, labels in stream():
        prototypes.update(z, labels)
        for row, y in zip(z, labels.tolist(), strict=True):
            by_hand[y] = row if y not in by_hand else (1 - mu) * by_hand[y] + mu * row
    for y in range(K):
        wanted = by_hand.get(y, torch.zeros(D, dtype=torch.float64))
        torch.testing.assert_close(prototypes.ema[y], wanted, rtol=1e-12, atol=1e-12)
        assert bool(prototypes.seen[y]) == (y in by_hand)


def test_ema_of_one_class_is_the_closed_form():
    prototypes, mu = fresh(), 0.05
    z = F.normalize(torch.rand(9, D, dtype=torch.float64), dim=1)
    for part in z.split(4):
        prototypes.update(part, torch.full((len(part),), 2))
    powers = (1 - mu) ** torch.arange(8, -1, -1, dtype=torch.float64)
    weights = mu * powers
    weights[0] = powers[0]
    assert weights.sum().item() == pytest.approx(1)
    torch.testing.assert_close(prototypes.ema[2], weights @ z)


def test_last_is_mu_times_the_last_z_exactly_and_the_released_recurrence():
    prototypes, mu = fresh(), 0.05
    c = torch.zeros(K, D, dtype=torch.float64)
    last = {}
    for z, labels in stream():
        prototypes.update(z, labels)
        step = c[labels] + mu * (z - F.normalize(c[labels], dim=1, eps=1e-12))
        for row, y in enumerate(labels.tolist()):  # of duplicates the last write stays
            c[y] = step[row]
            last[y] = z[row]
    for y, z in last.items():
        assert torch.equal(prototypes.last[y], mu * F.normalize(z, dim=0, eps=1e-12))
    torch.testing.assert_close(prototypes.last, c, rtol=1e-12, atol=1e-14)
    assert prototypes.last.norm(dim=1)[:4].tolist() == pytest.approx([mu] * 4)


def test_a_zero_z_leaves_no_nan():
    prototypes = fresh()
    prototypes.update(torch.zeros(2, D, dtype=torch.float64), torch.tensor([0, 0]))
    assert torch.equal(prototypes.ema, torch.zeros(K, D, dtype=torch.float64))
    assert torch.equal(prototypes.last, torch.zeros(K, D, dtype=torch.float64))


def test_the_centre_is_the_normalised_prototype_before_the_update():
    prototypes = fresh()
    batches = list(stream(3))
    z, labels = batches[0]
    first = {y: z[labels.tolist().index(y)] for y in labels.tolist()}
    target = prototypes.center_target(z, labels, "ema")
    torch.testing.assert_close(target, torch.stack([first[y] for y in labels.tolist()]))
    assert torch.equal(prototypes.center_target(z, labels, "last"), torch.zeros_like(z))
    for z, labels in batches[:2]:
        prototypes.update(z, labels)
    z, labels = batches[2]
    labels = labels.clamp(max=int(prototypes.seen.nonzero().max()))
    torch.testing.assert_close(prototypes.center_target(z, labels, "ema"), F.normalize(prototypes.ema[labels], dim=1))
    torch.testing.assert_close(prototypes.center_target(z, labels, "last"), prototypes.last[labels] / 0.05)


def test_the_target_carries_no_gradient():
    prototypes = fresh()
    z = F.normalize(torch.rand(3, D, dtype=torch.float64), dim=1).requires_grad_()
    assert not prototypes.center_target(z, torch.tensor([0, 0, 1]), "ema").requires_grad
    prototypes.update(z, torch.tensor([0, 0, 1]))
    assert not prototypes.ema.requires_grad
