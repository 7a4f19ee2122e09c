"""torch.compile(fullgraph=True) takes every operation, and the compiled result and gradient are the eager ones."""

import math

import pytest
import torch

from fd2fast import ops

SEGMENTS = torch.tensor([0, 1, 4])


def _constants(*shape):
    return torch.linspace(0.1, 1.9, math.prod(shape)).sin().abs().reshape(shape)


CASES = {
    "bilinear_attention_pool": lambda x: ops.bilinear_attention_pool(x, x[:, :2].abs()),
    "normalized_l2": lambda x: ops.normalized_l2(x, x.detach() + 1),
    "prototype_loss": lambda x: ops.prototype_loss(x.flatten(1), _constants(5, 75), torch.tensor([0, 1, 4, 2])),
    "attention_similarity_loss": lambda x: ops.attention_similarity_loss(
        x, _constants(6, 3, 5, 5), torch.tensor([0, 0, 2, 3, 6])
    ),
    "attention_similarity_loss, list": lambda x: ops.attention_similarity_loss(
        x, _constants(6, 3, 5, 5), [0, 0, 2, 3, 6]
    ),
    "bn_matching": lambda x: ops.bn_matching(x, _constants(3), _constants(3), SEGMENTS),
    "bn_matching, list": lambda x: ops.bn_matching(x, _constants(3), _constants(3), [0, 1, 4]),
    "bn_act_matching": lambda x: ops.bn_act_matching(x, *_constants(4, 3), SEGMENTS)[0],
    "crop_flip_roll": lambda x: ops.crop_flip_roll(
        x, torch.tensor([[0, 1, 3, 3, 1, 0, 1], [1, 1, 4, 2, 0, 2, 0]]), SEGMENTS, 6
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_whole_graph(case, device):
    torch._dynamo.reset()
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    compiled = torch.compile(CASES[case], fullgraph=True, backend="aot_eager")
    expected, actual = CASES[case](x), compiled(x)
    torch.testing.assert_close(actual, expected)
    g = torch.randn_like(expected)
    torch.testing.assert_close(torch.autograd.grad(actual, x, g), torch.autograd.grad(expected, x, g))


@pytest.mark.parametrize("as_tensor", [False, True])
def test_adam_whole_graph(as_tensor):
    torch._dynamo.reset()
    step, lr = (torch.tensor(3), torch.tensor(0.1)) if as_tensor else (3, 0.1)

    def update(image, grad, m, v):
        ops.adam_clamp_(
            image, grad, m, v, step, lr=lr, betas=(0.5, 0.9), eps=1e-8, low=torch.full((3,), -2.0), high=[2.0, 2.1, 2.2]
        )

    state = [torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.rand(2, 3, 4, 4)]
    expected = [s.clone() for s in state]
    update(*expected)
    torch.compile(update, fullgraph=True, backend="aot_eager")(*state)
    for a, e in zip(state, expected, strict=True):
        torch.testing.assert_close(a, e)
