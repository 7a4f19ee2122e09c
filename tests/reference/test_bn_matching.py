"""The BN matching losses against values worked out by hand, segment by segment, and their gradients."""

import pytest
import torch

from fd2fast.reference import bn_act_matching, bn_matching

DOUBLE = torch.float64


def test_by_hand():
    # segment 0: values 1, 3: mean 2, var 1; segment 1: values 5, 5, 2, 8: mean 5, var 4.5
    x = torch.tensor([1.0, 3.0, 5.0, 5.0, 2.0, 8.0]).view(6, 1, 1, 1)
    loss = bn_matching(x, torch.tensor([1.0]), torch.tensor([2.0]), [0, 2, 6])
    torch.testing.assert_close(loss, torch.tensor([1.0 + 1.0, 2.5 + 4.0]))


def test_norm_is_over_channels():
    # two constant channels: means 3 and 4 from 0, variances 0 from (6, 8)
    x = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1).expand(5, 2, 2, 2)
    loss = bn_matching(x, torch.zeros(2), torch.tensor([6.0, 8.0]), [0, 5])
    torch.testing.assert_close(loss, torch.tensor([10.0 + 5.0]))


@pytest.mark.parametrize("segments", [[0, 6], [0, 2, 4, 6], [0, 1, 6], [0, 1, 2, 3, 4, 5, 6], [0, 0, 4, 4, 6]])
def test_each_segment_is_as_if_alone(segments):
    x = torch.randn(6, 3, 4, 5, dtype=DOUBLE)
    mean, var = torch.randn(3, dtype=DOUBLE), torch.rand(3, dtype=DOUBLE)
    loss = bn_matching(x, mean, var, segments)
    for s, (a, b) in enumerate(zip(segments, segments[1:], strict=False)):
        if a == b:
            assert loss[s] == 0
            continue
        part = x[a:b].transpose(0, 1).flatten(1)
        expected = (part.var(dim=1, correction=0) - var).norm() + (part.mean(dim=1) - mean).norm()
        torch.testing.assert_close(loss[s], expected)
    torch.testing.assert_close(bn_matching(x, mean, var, torch.tensor(segments)), loss)


@pytest.mark.parametrize("segments", [[0, 4], [0, 2, 4], [0, 1, 4], [0, 0, 4]])
def test_gradcheck(segments):
    x = torch.randn(4, 2, 2, 3, dtype=DOUBLE, requires_grad=True)
    mean, var = torch.randn(2, dtype=DOUBLE), torch.rand(2, dtype=DOUBLE)
    assert torch.autograd.gradcheck(lambda x: bn_matching(x, mean, var, segments), (x,))


@pytest.mark.parametrize("segments", [[0, 2, 4], [0, 1, 4]])
def test_gradient_is_zero_where_both_norms_are_zero(segments):
    x = torch.full((4, 2, 2, 2), 3.0, requires_grad=True)
    loss = bn_matching(x, torch.full((2,), 3.0), torch.zeros(2), segments)
    assert loss.tolist() == [0, 0]
    loss.sum().backward()
    assert x.grad.count_nonzero() == 0


def test_gradient_of_the_docstring():
    x = torch.randn(6, 3, 4, 4, dtype=DOUBLE, requires_grad=True)
    mean, var = torch.randn(3, dtype=DOUBLE), torch.rand(3, dtype=DOUBLE)
    bn_matching(x, mean, var, [0, 6]).sum().backward()
    flat = x.detach().transpose(0, 1).flatten(1)
    u, v = flat.mean(dim=1) - mean, flat.var(dim=1, correction=0) - var
    u, v = (u / u.norm()).view(3, 1, 1), (v / v.norm()).view(3, 1, 1)
    expected = u / 96 + 2 * v * (x.detach() - flat.mean(dim=1).view(3, 1, 1)) / 96
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("segments", [[0, 4], [0, 1, 4]])
def test_large_mean_keeps_the_variance(segments):
    x = (1000 + 0.1 * torch.randn(4, 1, 32, 32, dtype=DOUBLE)).float()
    exact = bn_matching(x.double(), torch.full((1,), 1000.0), torch.zeros(1), segments)
    torch.testing.assert_close(
        bn_matching(x, torch.full((1,), 1000.0), torch.zeros(1), segments).double(), exact, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("activation", ["relu", "relu6", "identity"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_fused_equals_the_modules(activation, with_residual):
    x = 3 * torch.randn(4, 3, 5, 5, dtype=DOUBLE)
    bn = torch.nn.BatchNorm2d(3, eps=1e-3).double().eval().requires_grad_(False)
    for values in (bn.weight, bn.bias, bn.running_mean):
        values.normal_()
    bn.running_var.uniform_(0.5, 2)
    residual = torch.randn_like(x) if with_residual else None
    act = {"relu": torch.nn.ReLU(), "relu6": torch.nn.ReLU6(), "identity": torch.nn.Identity()}[activation]
    y, loss = bn_act_matching(
        x,
        bn.weight,
        bn.bias,
        bn.running_mean,
        bn.running_var,
        [0, 1, 4],
        residual=residual,
        activation=activation,
        eps=1e-3,
    )
    torch.testing.assert_close(y, act(bn(x) + (residual if with_residual else 0)))
    torch.testing.assert_close(loss, bn_matching(x, bn.running_mean, bn.running_var, [0, 1, 4]))


@pytest.mark.parametrize("activation", ["relu", "relu6", "identity"])
def test_fused_gradcheck(activation):
    x = 4 * torch.randn(3, 2, 2, 3, dtype=DOUBLE, requires_grad=True)
    residual = torch.randn(3, 2, 2, 3, dtype=DOUBLE, requires_grad=True)
    weight, bias, mean = torch.randn(3, 2, dtype=DOUBLE)
    var = torch.rand(2, dtype=DOUBLE)
    assert torch.autograd.gradcheck(
        lambda x, r: bn_act_matching(x, weight, bias, mean, var, [0, 1, 3], residual=r, activation=activation),
        (x, residual),
    )


def test_half_types():
    x = torch.randn(4, 3, 5, 5).bfloat16()
    one, zero = torch.ones(3), torch.zeros(3)
    y, loss = bn_act_matching(x, one, zero, zero, one, [0, 4])
    assert y.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, bn_matching(x.float(), zero, one, [0, 4]))
