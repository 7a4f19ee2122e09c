"""Adam with clamp against torch.optim.Adam followed by a clamp, for ten steps."""

import pytest
import torch

from fd2fast.reference import adam_clamp_

LOW, HIGH = [-2.1, -2.0, -1.8], [2.2, 2.4, 2.6]


def _state(dtype):
    image = 3 * torch.randn(2, 3, 4, 5, dtype=dtype)
    return image, torch.zeros_like(image), torch.zeros_like(image)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("betas", [(0.5, 0.9), (0.9, 0.999)])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_equals_torch(dtype, betas, as_tensor):
    image, exp_avg, exp_avg_sq = _state(dtype)
    other = image.clone().requires_grad_()
    optimizer = torch.optim.Adam([other], lr=0.25, betas=betas, eps=1e-8, foreach=False)
    low, high = (torch.tensor(b, dtype=dtype) for b in (LOW, HIGH))
    for step in range(1, 11):
        lr = 0.25 / step**0.5
        grad = torch.randn_like(image)
        t, rate = (torch.tensor(step), torch.tensor(lr, dtype=torch.float64)) if as_tensor else (step, lr)
        adam_clamp_(image, grad, exp_avg, exp_avg_sq, t, lr=rate, betas=betas, eps=1e-8, low=low, high=high)
        optimizer.param_groups[0]["lr"] = lr
        other.grad = grad.clone()
        optimizer.step()
        with torch.no_grad():
            other.copy_(torch.minimum(torch.maximum(other, low.view(3, 1, 1)), high.view(3, 1, 1)))
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if as_tensor and dtype == torch.float32 else {"rtol": 0, "atol": 0}
    if as_tensor and dtype == torch.float64:
        tolerance = {"rtol": 1e-13, "atol": 1e-13}
    torch.testing.assert_close(image, other.detach(), **tolerance)
    assert (image == low.view(3, 1, 1)).any()
    assert (image == high.view(3, 1, 1)).any()
    state = optimizer.state[other]
    torch.testing.assert_close(exp_avg, state["exp_avg"], rtol=0, atol=0)
    torch.testing.assert_close(exp_avg_sq, state["exp_avg_sq"], rtol=0, atol=0)


def test_first_step_by_hand():
    # at step 1 the corrected moments are g and g^2, so the step is lr * sign(g) with eps = 0
    image = torch.tensor([0.0, 1.0, 2.0]).view(1, 3, 1, 1)
    grad = torch.tensor([4.0, -0.5, -3.0]).view(1, 3, 1, 1)
    m, v = torch.zeros_like(image), torch.zeros_like(image)
    adam_clamp_(image, grad, m, v, 1, lr=0.5, betas=(0.5, 0.9), eps=0.0, low=[-1.0] * 3, high=[1.25, 2.0, 2.25])
    torch.testing.assert_close(image.flatten(), torch.tensor([-0.5, 1.5, 2.25]))
    torch.testing.assert_close(m.flatten(), torch.tensor([2.0, -0.25, -1.5]))
    torch.testing.assert_close(v.flatten(), torch.tensor([1.6, 0.025, 0.9]))


def test_grad_is_not_written_and_half_grads_work():
    image, m, v = _state(torch.float32)
    grad = torch.randn_like(image).bfloat16()
    kept, before = grad.clone(), image.clone()
    adam_clamp_(image, grad, m, v, 1, lr=0.1, betas=(0.9, 0.999), eps=1e-8, low=LOW, high=HIGH)
    assert torch.equal(grad, kept)
    other, m2, v2 = before, torch.zeros_like(m), torch.zeros_like(v)
    adam_clamp_(other, kept.float(), m2, v2, 1, lr=0.1, betas=(0.9, 0.999), eps=1e-8, low=LOW, high=HIGH)
    assert torch.equal(image, other)


def test_leaf_that_requires_grad_is_updated():
    image = torch.zeros(1, 3, 2, 2, requires_grad=True)
    m, v = torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)
    adam_clamp_(image, torch.ones(1, 3, 2, 2), m, v, 1, lr=0.1, betas=(0.9, 0.999), eps=0.0, low=LOW, high=HIGH)
    torch.testing.assert_close(image.detach(), torch.full((1, 3, 2, 2), -0.1))
