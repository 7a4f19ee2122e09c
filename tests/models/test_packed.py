"""Convolutions with packed weights against torch's own: the same values, other shapes than the packed one, copies."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from fd2fast.models import cpu, frozen, packed

DTYPES = [d for d in (torch.float32, torch.bfloat16) if packed.supports(d)]
# channels in, out, kernel, stride, padding, dilation, groups, side
CASES = [
    (16, 24, (3, 3), (1, 1), (1, 1), (1, 1), 1, (9, 11)),
    (16, 24, (3, 3), (2, 2), (1, 1), (1, 1), 1, (9, 12)),
    (16, 24, (3, 3), (2, 1), (0, 2), (1, 2), 1, (12, 10)),
    (8, 32, (1, 1), (2, 2), (0, 0), (1, 1), 1, (8, 9)),
    (8, 8, (5, 3), (3, 3), (2, 1), (1, 1), 1, (14, 13)),
    (24, 24, (3, 3), (1, 1), (1, 1), (1, 1), 24, (7, 7)),
    (16, 32, (3, 3), (2, 2), (1, 1), (1, 1), 4, (8, 8)),
    (1, 1, (1, 1), (1, 1), (0, 0), (1, 1), 1, (1, 1)),
]

pytestmark = pytest.mark.skipif(not DTYPES, reason="torch was built without oneDNN")


def make(case, dtype, rows=3, seed=0):
    c, o, kernel, stride, padding, dilation, groups, side = case
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, c, *side, generator=made).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = (0.2 * torch.randn(o, c // groups, *kernel, generator=made)).to(dtype)
    return x, weight, torch.randn(o, generator=made).to(dtype), (stride, padding, dilation, groups)


def assert_near(found, wanted, dtype):
    """Sums may run in another order: within some roundings of the largest."""
    wanted = wanted.double()
    room = wanted.abs().max() * torch.finfo(dtype).eps
    assert found.dtype == dtype
    assert (found.double() - wanted).abs().max() <= 8 * room


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_convolution_and_its_input_gradient(case, dtype):
    x, weight, bias, settings = make(case, dtype)
    conv = packed.PackedConv(*settings)
    for rows in (3, 5):  # the weight is packed for the first
        x = make(case, dtype, rows, seed=rows)[0]
        y = conv.forward(x, weight, bias)
        exact = x.double().requires_grad_()
        wanted = F.conv2d(exact, weight.double(), bias.double(), *settings)
        assert_near(y, wanted.detach(), dtype)
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(dtype)
        wanted.backward(grad.double())
        found = conv.input_gradient(grad, weight, tuple(x.shape[2:]))
        assert found.shape == x.shape
        assert_near(found, exact.grad, dtype)
        spread = grad[:1].expand(rows, -1, -1, -1)
        torch.testing.assert_close(
            conv.input_gradient(spread, weight, tuple(x.shape[2:])),
            conv.input_gradient(spread.contiguous(), weight, tuple(x.shape[2:])),
            rtol=0,
            atol=0,
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_frozen_layer_uses_it_and_keeps_the_weight_only(dtype, monkeypatch):
    if cpu.WHY_NOT:
        pytest.fail(f"{cpu.WHY_NOT}; install the package again")
    layer = frozen.FrozenConv(torch.nn.Conv2d(16, 24, 3, padding=1, bias=False), dtype)
    x = make(CASES[0], dtype)[0].requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    y.backward(torch.ones_like(y))
    assert [t.data_ptr() for t in kept] == [layer.weight.data_ptr()]
    found = x.grad.clone()
    for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):  # our own bytes
        assert torch.equal(clone(x.detach()), y)
    x.grad = None
    monkeypatch.setattr(frozen, "supports", lambda dtype: False)
    plain = layer(x)
    plain.backward(torch.ones_like(y))
    assert_near(y.detach(), plain.detach().double(), dtype)
    assert_near(found, x.grad, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_changed_weight_is_packed_anew(dtype):
    layer = frozen.FrozenConv(torch.nn.Conv2d(16, 24, 3, padding=1, bias=False), dtype)
    x = make(CASES[0], dtype)[0].requires_grad_()

    def run():
        y = layer(x)
        return y.detach(), torch.autograd.grad(y.sum(), x)[0]

    before = run()
    layer.weight.mul_(2)
    for old, new in zip(before, run(), strict=True):
        assert torch.equal(2 * old, new)
    layer.weight = layer.weight / 2
    for old, new in zip(before, run(), strict=True):
        assert torch.equal(old, new)


def test_types_without_it():
    assert not packed.supports(torch.float64)
    assert not packed.supports(torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_bytes_are_counted(dtype):
    layer = frozen.FrozenConv(torch.nn.Conv2d(16, 32, 3, padding=1, bias=False), dtype)
    assert layer.packed_bytes == 0
    y = layer(make(CASES[0], dtype)[0].requires_grad_())
    assert layer.packed_bytes == layer.weight.nbytes
    y.sum().backward()
    assert layer.packed_bytes == 2 * layer.weight.nbytes
