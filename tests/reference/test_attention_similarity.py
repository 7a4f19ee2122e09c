"""The attention similarity loss (Eq. 10) on ragged lists against values worked out by hand, and its gradient."""

import pytest
import torch

from fd2fast.reference import attention_similarity_loss


def _maps(*rows):
    return torch.tensor(rows).view(len(rows), -1, 1, 1)


def test_by_hand():
    attention = _maps([3.0, 4.0], [1.0, 1.0], [3.0, 4.0])
    prior = _maps([3.0, -4.0], [0.0, 0.0], [3.0, 4.0])
    # sample 0: distances 8/10 and 5/5, mean .9; sample 1 has none; sample 2: equal maps, distance 0
    loss = attention_similarity_loss(attention, prior, [0, 2, 2, 3], eps=0.0)
    torch.testing.assert_close(loss, torch.tensor([0.1, 0.0, 1.0]))


def test_whole_map_is_one_vector():
    attention, prior = torch.rand(1, 2, 3, 4), torch.rand(1, 2, 3, 4)
    distance = (attention - prior).norm() / (attention.norm() + prior.norm() + 1e-6)
    torch.testing.assert_close(attention_similarity_loss(attention, prior, (0, 1))[0], 1 - distance)


def test_all_empty_is_zero_without_gradient():
    attention = torch.rand(3, 2, 2, 2, requires_grad=True)
    loss = attention_similarity_loss(attention, torch.rand(0, 2, 2, 2), torch.zeros(4, dtype=torch.int32))
    assert loss.tolist() == [0, 0, 0]
    loss.sum().backward()
    assert attention.grad.count_nonzero() == 0


def test_gradient_is_finite_at_equal_maps_and_zero_maps():
    attention = torch.stack([torch.ones(2, 2, 2), torch.zeros(2, 2, 2)]).requires_grad_()
    attention_similarity_loss(attention, attention.detach().clone(), [0, 1, 2]).sum().backward()
    assert attention.grad.count_nonzero() == 0


@pytest.mark.parametrize("offsets", [[0, 0, 3, 4], [0, 4, 4, 4], [0, 1, 2, 4]])
def test_gradcheck(offsets):
    attention = torch.rand(3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    prior = torch.rand(4, 2, 2, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a: attention_similarity_loss(a, prior, offsets), (attention,))


def test_offsets_as_list_tuple_and_tensor_agree():
    attention, prior = torch.rand(2, 1, 3, 3), torch.rand(5, 1, 3, 3)
    expected = attention_similarity_loss(attention, prior, [0, 2, 5])
    for offsets in ((0, 2, 5), torch.tensor([0, 2, 5]), torch.tensor([0, 2, 5], dtype=torch.int32)):
        assert torch.equal(attention_similarity_loss(attention, prior, offsets), expected)
