"""torch.compile(fullgraph=True) takes every operation, and the compiled result and gradient are the eager ones."""

import math

import pytest
import torch

from fd2fast import ops

SEGMENTS = torch.tensor([0, 1, 4])


def _constants(*shape):
    return torch.linspace(0.1, 1.9, math.prod(shape)).sin().abs().reshape(shape)


def _flat(outputs):
    return torch.cat([o.flatten() for o in outputs])


CASES = {
    "activation": lambda x: ops.activation(x, "relu6"),
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
    "bn_act_matching": lambda x: _flat(ops.bn_act_matching(x, *_constants(4, 3), SEGMENTS, residual=x.flip(0))),
    "bn_act": lambda x: ops.bn_act(x, *_constants(4, 3), activation="relu6"),
    "max_pool": lambda x: ops.max_pool(x, (3, 3), (2, 2), (1, 1)),
    "segment_statistics": lambda x: _flat(ops.segment_statistics(x, SEGMENTS)),
    "joined_bn_act_matching": lambda x: _flat(
        ops.joined_bn_act_matching(
            (x, x.flip(1)), [ops.segment_statistics(m, SEGMENTS) for m in (x, x.flip(1))], *_constants(4, 6), SEGMENTS
        )
    ),
    "match_statistics": lambda x: ops.match_statistics(x[:, :, 0, 0], x[:, :, 1, 1], *_constants(2, 3)),
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


def test_every_operation_is_here():
    assert {case.partition(",")[0] for case in CASES} | {"adam_clamp_"} == set(ops.__all__)


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_adam_whole_graph(as_tensor, backend, device):
    if backend == "triton":
        pytest.importorskip("triton")
    torch._dynamo.reset()
    step, lr = (torch.tensor(3, device=device), torch.tensor(0.1, device=device)) if as_tensor else (3, 0.1)
    low = torch.full((3,), -2.0, device=device)

    def update(image, grad, m, v):
        settings = {"lr": lr, "betas": (0.5, 0.9), "eps": 1e-8, "low": low, "high": [2.0, 2.1, 2.2]}
        ops.adam_clamp_(image, grad, m, v, step, **settings, backend=backend)

    state = [torch.randn(2, 3, 4, 4, device=device) for _ in range(4)]
    state[3].abs_()
    expected = [s.clone() for s in state]
    update(*expected)
    torch.compile(update, fullgraph=True, backend="aot_eager")(*state)
    for a, e in zip(state, expected, strict=True):
        torch.testing.assert_close(a, e)
