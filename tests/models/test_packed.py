"""Convolutions with packed weights against torch's own: the same values, other shapes than the packed one, copies."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from distill_tools import tiny_teacher

from fd2fast.models import frozen_layers as frozen
from fd2fast.models import packed_convolution as packed
from fd2fast.models.fused import fuse
from fd2fast.ops.cpu import native

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
def test_a_copy_packs_for_itself(dtype):
    x, weight, bias, settings = make(CASES[0], dtype)
    conv = packed.PackedConv(*settings)
    y = conv.forward(x, weight, bias)
    for clone in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):  # our own bytes
        assert clone.nbytes == 0
        assert torch.equal(clone.forward(x, weight, bias), y)


class Recorder:
    """torch.ops.mkldnn that remembers for which shape each weight was packed, and refuses another."""

    def __init__(self, real):
        self._real, self.shapes, self.used = real, {}, 0

    def __getattr__(self, name):
        real = getattr(self._real, name)
        if name.startswith("_reorder_convolution"):

            def reorder(weight, *settings):
                found = real(weight, *settings)
                self.shapes[id(found)] = (found, tuple(settings[-1]))
                return found

            return reorder
        if name.startswith("_convolution"):

            def convolve(x, weight, *settings):
                assert self.shapes[id(weight)][1] == tuple(x.shape), "a weight packed for another shape"
                self.used += 1
                return real(x, weight, *settings)

            return convolve
        return real


def test_a_packed_weight_serves_only_the_shape_it_was_packed_for(monkeypatch):
    """Whole teachers, checked by `fuse` at its own size, then at those of steps, phases and a last smaller step."""
    if native.WHY_NOT:
        pytest.fail(f"{native.WHY_NOT}; install the package again")
    recorder = Recorder(torch.ops.mkldnn)
    monkeypatch.setattr(packed.torch.ops, "mkldnn", recorder)
    # sharing equal orders among shapes is the one exception, tested below
    monkeypatch.setattr(packed, "_shared", lambda form, held: form)
    teacher = fuse(tiny_teacher("MobileNetV2", size=64, dtype=torch.float32), torch.float32)
    for rows, side in ((4, 64), (3, 64), (4, 48), (4, 64), (10, 32)):
        x = torch.randn(rows, 3, side, side, requires_grad=True)
        out, bn = teacher(x, (0, rows))
        (out.logits.sum() + bn.sum()).backward()
    assert recorder.used > 5 * 2 * 50


@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_share_a_form_only_where_its_order_is_the_very_same(dtype):
    describe = getattr(torch.ops.mkldnn, "_get_mkldnn_serialized_md", None)
    if describe is None:
        pytest.skip("this torch does not describe packed weights")
    weight, settings = make((512, 512, (3, 3), (1, 1), (1, 1), (1, 1), 1, (1, 1)), dtype)[1], ((1, 1),) * 3
    conv = packed.PackedConv(*settings, 1)
    for rows, side in ((10, 7), (2, 2), (10, 4), (64, 7)):
        x = torch.randn(rows, 512, side, side).to(dtype).contiguous(memory_format=torch.channels_last)
        conv.forward(x, weight, None)
        own = torch.ops.mkldnn._reorder_convolution_weight(weight, *settings, 1, list(x.shape))
        used = list(conv._forward.values())[-1]
        assert torch.equal(describe(used), describe(own))
    assert weight.nbytes <= conv.nbytes <= 4 * weight.nbytes


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_oldest_shapes_are_forgotten(dtype):
    x, weight, bias, settings = make(CASES[0], dtype)
    conv = packed.PackedConv(*settings)
    for side in range(4, 4 + 2 * packed._MOST_SHAPES):
        conv.forward(torch.randn(1, 16, side, side).to(dtype).to(memory_format=torch.channels_last), weight, bias)
    assert len(list(conv._forward.values())) == packed._MOST_SHAPES


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_changed_weight_is_packed_anew(dtype):
    layer = frozen.FrozenConv(torch.nn.Conv2d(16, 24, 3, stride=2, padding=1, bias=False), dtype)
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
    layer = frozen.FrozenConv(torch.nn.Conv2d(16, 32, 1, bias=False), dtype)
    assert layer.packed_bytes == 0
    y = layer(make(CASES[0], dtype)[0].requires_grad_())
    assert layer.packed_bytes == layer.weight.nbytes
    y.sum().backward()
    assert layer.packed_bytes == 2 * layer.weight.nbytes
