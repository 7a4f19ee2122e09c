"""Bilinear attention pooling against values worked out by hand, and its gradient."""

import pytest
import torch

from fd2fast.reference import bilinear_attention_pool


def test_by_hand():
    # one 1x2 map, two channels: G = ((1*2 + 2*1) / 2, (1*0 + 2*7) / 2) = (2, 7); s = (sqrt 2, sqrt 7); |s| = 3
    attention = torch.tensor([[[[1.0, 2.0]]]])
    features = torch.tensor([[[[2.0, 1.0]], [[0.0, 7.0]]]])
    z = bilinear_attention_pool(features, attention, eps=0.0)
    torch.testing.assert_close(z, torch.tensor([[2.0**0.5 / 3, 7.0**0.5 / 3]]))


def test_order_is_map_then_channel_and_sign_survives():
    # 2 maps, 3 channels, one pixel: G[m, c] = a_m f_c
    attention = torch.tensor([1.0, 4.0]).view(1, 2, 1, 1)
    features = torch.tensor([1.0, -4.0, 0.0]).view(1, 3, 1, 1)
    z = bilinear_attention_pool(features, attention, eps=0.0)
    s = torch.tensor([[1.0, -2.0, 0.0, 2.0, -4.0, 0.0]])
    torch.testing.assert_close(z, s / 5.0)


def test_eps_inside_the_root_but_not_at_zero():
    features = torch.tensor([3.0, 0.0]).view(1, 2, 1, 1)
    z = bilinear_attention_pool(features, torch.ones(1, 1, 1, 1), eps=1.0)
    torch.testing.assert_close(z, torch.tensor([[1.0, 0.0]]))
    default = bilinear_attention_pool(torch.tensor([1e-6, -1.0]).view(1, 2, 1, 1).double(), torch.ones(1, 1, 1, 1))
    assert (default[0, 0] / default[0, 1]).item() == pytest.approx(-((2e-6) ** 0.5) / (1 + 1e-6) ** 0.5, rel=1e-12)


def test_all_zero_sample_gives_zero_and_no_gradient():
    features = torch.zeros(2, 3, 2, 2, requires_grad=True)
    attention = torch.ones(2, 2, 2, 2, requires_grad=True)
    z = bilinear_attention_pool(features, attention)
    assert z.count_nonzero() == 0
    (z * torch.randn_like(z)).sum().backward()
    assert features.grad.count_nonzero() == 0
    assert attention.grad.count_nonzero() == 0


@pytest.mark.parametrize("shape", [(2, 3, 2, 2, 2), (1, 1, 1, 1, 1), (3, 5, 7, 1, 3)])
def test_gradcheck(shape):
    n, c, h, w, m = shape
    features = torch.randn(n, c, h, w, dtype=torch.float64, requires_grad=True)
    attention = torch.rand(n, m, h, w, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda f, a: bilinear_attention_pool(f, a, eps=1e-2), (features, attention))


def test_layout_does_not_matter():
    features, attention = torch.randn(2, 8, 5, 3), torch.rand(2, 4, 5, 3)
    z = bilinear_attention_pool(features, attention)
    last = torch.channels_last
    torch.testing.assert_close(
        bilinear_attention_pool(features.to(memory_format=last), attention.to(memory_format=last)), z
    )
    assert z.norm(dim=1).tolist() == pytest.approx([1.0, 1.0])


def test_half_gives_float():
    z = bilinear_attention_pool(torch.randn(1, 2, 3, 3).bfloat16(), torch.rand(1, 2, 3, 3).bfloat16())
    assert z.dtype == torch.float32
