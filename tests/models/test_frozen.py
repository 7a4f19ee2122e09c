"""Frozen layers against plain autograd: outputs, gradients, ties, saved bytes, C++ kernels against torch in fp64."""

import pytest
import torch
from timm.layers import Conv2dSame
from timm.layers.pool2d_same import MaxPool2dSame
from torch import nn
from torch.nn import functional as F

from bench.numerics import check_gradient, check_output
from fd2fast import ops, reference
from fd2fast.models import convolution
from fd2fast.models import frozen_layers as frozen
from fd2fast.ops import _dispatch
from fd2fast.ops._segments import statistics
from fd2fast.ops.cpu import native
from fd2fast.reference.activation import ACTIVATIONS

SEGMENTS = (0, 1, 1, 4, 6)
CHANNELS = (1, 3, 8, 24, 58)


@pytest.fixture(params=["native", "torch"])
def backend(request, monkeypatch):
    """The C++ kernels, or the torch form of the same function."""
    if request.param == "torch":
        monkeypatch.setattr(native, "why_not", lambda x: "the test wants torch's operations")
    elif native.WHY_NOT:
        pytest.fail(f"{native.WHY_NOT}; install the package again")
    return request.param


def make_layer(channels: int, dtype: torch.dtype, activation: str) -> frozen.FrozenBatchNorm:
    layer = nn.BatchNorm2d(channels).eval().requires_grad_(False)
    for tensor in (layer.weight, layer.bias, layer.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(layer.running_var, 0.2, 3.0)
    if activation == "relu6":
        layer.weight.mul_(5)
    return frozen.FrozenBatchNorm(layer, activation, 0, dtype)


def plain(layer: frozen.FrozenBatchNorm, x, segments, residual, dtype):
    """fd2fast.reference in `dtype`, from x's values."""
    constants = [t.to(dtype) for t in (layer.weight, layer.bias, layer.running_mean, layer.running_var)]
    return reference.bn_act_matching(
        x, *constants, segments, residual=residual, activation=layer.activation, eps=layer.eps
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_batch_norm_equals_the_reference_in_every_type(backend, dtype, activation, with_residual):
    for channels in CHANNELS:
        layer = make_layer(channels, dtype, activation)
        shape = (6, channels, 5, 7)
        x = (torch.randn(shape) * 2 + 1).to(dtype).to(memory_format=torch.channels_last)
        r = torch.randn(shape).to(dtype).to(memory_format=torch.channels_last) if with_residual else None
        weights_y, weights_loss = torch.randn(shape), torch.randn(len(SEGMENTS) - 1)

        def run(function, to, x=x, r=r, weights_y=weights_y, weights_loss=weights_loss):
            inputs = [t.to(to).detach().requires_grad_() for t in (x, r) if t is not None]
            y, loss = function(*inputs)
            grads = torch.autograd.grad((y * weights_y.to(y)).sum() + (loss.double() * weights_loss).sum(), inputs)
            return y, loss, grads

        own = run(lambda x, r=None: layer(x, SEGMENTS, r), dtype)  # noqa: B023
        exact = run(lambda x, r=None: plain(layer, x, SEGMENTS, r, torch.float64), torch.float64)  # noqa: B023
        near = run(lambda x, r=None: plain(layer, x, SEGMENTS, r, torch.float32), dtype)  # noqa: B023
        assert own[0].dtype == dtype
        check_output(own[0], exact[0], near[0], dtype, name="y")
        check_output(own[1], exact[1], near[1], torch.float32 if dtype != torch.float64 else dtype, name="loss")
        for name, a, e, p in zip(("x", "residual"), own[2], exact[2], near[2], strict=False):
            check_gradient(a, e, p, dtype, name=name)


def test_ties_pass_no_gradient(backend):
    """At exactly 0 and 6 autograd's ReLU and ReLU6 are closed."""
    layer = make_layer(9, torch.float32, "relu6")
    for name in ("scale", "weight"):
        getattr(layer, name).fill_(1.0)
    for name in ("shift", "bias", "running_mean"):
        getattr(layer, name).zero_()
    values = torch.arange(-1.0, 8.0)[None, :, None, None].expand(2, 9, 1, 3)
    for residual in (None, torch.zeros(2, 9, 1, 3)):
        x = values.clone(memory_format=torch.channels_last).requires_grad_()
        y, _ = layer(x, (0, 2), residual)
        assert torch.equal(y, values.clamp(0, 6))
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert grad[0, :, 0, 0].tolist() == [0, 0, 1, 1, 1, 1, 1, 0, 0]


def test_kernels_give_the_same_bytes_whatever_the_threads():
    layer = make_layer(40, torch.float32, "relu")
    x = torch.randn(5, 40, 33, 31).to(memory_format=torch.channels_last)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            one = x.clone(memory_format=torch.channels_last).requires_grad_()
            y, loss = layer(one, (0, 2, 5))
            (grad,) = torch.autograd.grad(y.square().sum() * 1e-3 + loss.sum(), one)
            found.append((y, loss, grad))
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_statistics_survive_a_large_mean(backend):
    """Sums of squares about 0 would lose every digit here."""
    x = torch.randn(4, 16, 20, 20) + 3000
    mean, var = frozen.map_statistics(x.to(memory_format=torch.channels_last), (0, 1, 4))
    exact = statistics(x.double(), (0, 1, 4))
    assert torch.allclose(mean.double(), exact[0], rtol=1e-6)
    assert torch.allclose(var.double(), exact[1], rtol=1e-3)


def test_nan_is_not_hidden(backend):
    layer = make_layer(24, torch.float32, "relu")
    x = torch.randn(2, 24, 3, 3).to(memory_format=torch.channels_last)
    x[1, 20, 1, 1] = float("nan")
    y, loss = layer(x, (0, 1, 2))
    assert y[1, 20, 1, 1].isnan()
    assert y.isnan().sum() == 1
    assert loss.isnan().tolist() == [False, True]


def test_bf16_is_rounded_to_the_nearest():
    """Products of two bf16 are exact in fp32, so that only the rounding is left to differ: ties, both ways, inf, NaN."""
    if native.WHY_NOT:
        pytest.fail(f"{native.WHY_NOT}; install the package again")
    x = torch.randn(2, 27, 8, 8).bfloat16().contiguous(memory_format=torch.channels_last)
    x[0, ::5, 0, 0], x[0, ::4, 0, 1], x[1, :, 2, 2] = float("inf"), float("nan"), 1.0078125
    slope = torch.randn(1, 27).bfloat16().float()
    slope[0, ::3] = 1.5  # 1.0078125 times this lies between two bf16
    # by 128 pixels of two images: 2 grad_var / 128 = slope, without rounding
    grad = torch.stack((torch.zeros(1, 27), slope * 64))
    y = native.statistics_backward(x, torch.zeros(2, 1, 27), grad, (0, 2))
    wanted = (x.float() * slope[0, :, None, None]).bfloat16()
    assert wanted.isnan().any()
    assert (wanted.float() != x.float() * slope[0, :, None, None]).any()
    torch.testing.assert_close(y, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_joined_maps_equal_a_concatenation(backend, dtype):
    maps = [torch.randn(5, c, 4, 3, dtype=dtype).to(memory_format=torch.channels_last) for c in (3, 24, 8, 1)]
    layers = [make_layer(36, dtype, "relu"), make_layer(27, dtype, "identity")]
    joins = []
    for layer in layers:
        join = frozen.FrozenJoin(nn.BatchNorm2d(1), layer.activation, 0, dtype)
        join._buffers = layer._buffers
        joins.append(join)

    def value(outputs):
        return sum((y.square().sum() * 0.1 + (loss * torch.arange(1, 3)).sum()) for y, loss in outputs)

    inputs = [m.clone(memory_format=torch.channels_last).requires_grad_() for m in maps]
    known = [frozen.map_statistics(m, (0, 2, 5)) for m in inputs]
    outputs = [join(inputs[:n], known[:n], (0, 2, 5)) for join, n in zip(joins, (4, 2), strict=True)]
    grads = torch.autograd.grad(value(outputs), inputs)

    wide = [m.double().requires_grad_() for m in maps]
    wanted = [
        plain(layer, torch.cat(wide[:n], 1), (0, 2, 5), None, torch.float64)
        for layer, n in zip(layers, (4, 2), strict=True)
    ]
    exact = torch.autograd.grad(value(wanted), wide)
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    for (y, loss), (y_exact, loss_exact) in zip(outputs, wanted, strict=True):
        torch.testing.assert_close(y.double(), y_exact, **tolerance)
        torch.testing.assert_close(loss.double(), loss_exact, **tolerance)
    for a, b in zip(grads, exact, strict=True):
        torch.testing.assert_close(a.double(), b, **tolerance)


def test_gradcheck_of_the_functions():
    def checked(function, *inputs):
        assert torch.autograd.gradcheck(function, inputs)

    layer = make_layer(3, torch.float64, "relu")
    x, r = (torch.randn(3, 3, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    checked(lambda x, r: layer(x, (0, 1, 3), r), x, r)
    checked(lambda x: layer(x, (0, 1, 3)), x)
    checked(lambda x: frozen.map_statistics(x, (0, 1, 3)), x)
    checked(lambda x, r: ops.bilinear_attention_pool(x, r, backend="eager"), x, r)


def test_attention_pooling_equals_the_reference():
    f, a = torch.randn(3, 6, 4, 4), torch.randn(3, 2, 4, 4).relu()
    a[0] = 0  # G is 0 everywhere
    f[1, 2] = 0  # and in one row
    results = []
    for backend in ("cpu", "eager", "reference"):
        f.requires_grad_(), a.requires_grad_()
        z = ops.bilinear_attention_pool(f, a, backend=backend)
        grads = torch.autograd.grad((z * torch.linspace(-1, 1, z.numel()).view_as(z)).sum(), (f, a))
        results.append((z, *grads))
    for own in results[:-1]:
        for x, y in zip(own, results[-1], strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("activation", ["relu", "relu6"])
@pytest.mark.parametrize("shape", [(2, 8, 3, 5), (3, 5, 3, 3), (4, 7)])
def test_masked_activation_keeps_bits(activation, shape):
    x = torch.randint(-2, 9, shape).float()
    if len(shape) == 4:
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = ops.activation(x, activation)
    assert [t.numel() * t.element_size() for t in kept] == [-(-x.numel() // 8)]
    weights = torch.randn(shape)
    (grad,) = torch.autograd.grad((y * weights).sum(), x)
    plain = x.detach().requires_grad_()
    wanted = reference.activation(plain, activation)
    assert torch.equal(y, wanted)
    assert torch.equal(grad, torch.autograd.grad((wanted * weights).sum(), plain)[0])


CONVOLUTIONS = [
    nn.Conv2d(3, 5, 7, stride=2, padding=3, bias=False),
    nn.Conv2d(3, 5, 3, stride=2, padding=1),
    nn.Conv2d(3, 4, 3, stride=3),
    nn.Conv2d(2, 4, (3, 2), stride=2, padding=(1, 0)),
    nn.Conv2d(6, 4, 1, bias=False),
    nn.Conv2d(6, 6, 3, padding=1, groups=6),
    nn.Conv2d(6, 4, 3, dilation=2, padding="same"),
    Conv2dSame(3, 4, 3, stride=2),
    Conv2dSame(6, 6, 5, stride=2, groups=6),
]


@pytest.mark.parametrize("index", range(len(CONVOLUTIONS)))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("side", [13, 16])
def test_convolution_keeps_its_weight_only(index, dtype, side):
    layer = CONVOLUTIONS[index].to(dtype).requires_grad_(False)
    own = frozen.FrozenConv(layer, dtype, same=isinstance(layer, Conv2dSame))
    x = torch.randn(2, layer.in_channels, side, side, dtype=dtype).to(memory_format=torch.channels_last)
    x.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = own(x)
    known = {t.data_ptr() for t in own.buffers()}
    assert all(t.data_ptr() in known for t in kept)
    wanted = layer(x)
    weights = torch.randn_like(wanted)
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(y, wanted, **tolerance)
    grads = [torch.autograd.grad((out * weights).sum(), x)[0] for out in (y, wanted)]
    torch.testing.assert_close(*grads, **tolerance)
    assert grads[0].is_contiguous(memory_format=torch.channels_last) or own.phases is not None


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": (2, 5), "stride": (1, 3), "padding": (0, 2)},
        {"kernel_size": 3, "stride": 2, "padding": 2, "dilation": 2, "bias": False},
        {"kernel_size": (3, 4), "stride": 4, "dilation": (3, 1)},  # windows that leave pixels out
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": 2, "stride": 2, "padding": "valid"},
    ],
    ids=lambda settings: "-".join(f"{v}" for v in settings.values()),
)
@pytest.mark.parametrize("channels", [3, 27, 48])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_depthwise_gradient(settings, channels, dtype, monkeypatch):
    """Both gates, on dense and on other gradients; only the filters are kept."""
    called = []
    real = native.depthwise_backward
    monkeypatch.setattr(native, "depthwise_backward", lambda *a: called.append(1) or real(*a))
    layer = nn.Conv2d(channels, channels, groups=channels, **settings).requires_grad_(False)
    own = frozen.FrozenConv(layer, dtype)
    x = torch.randn(3, channels, 12, 11).to(dtype).to(memory_format=torch.channels_last).requires_grad_()
    y = own(x)
    rounded = layer.weight.to(dtype)
    for grad in (torch.randn_like(y), torch.randn(y.shape[::-1]).to(dtype).permute(3, 2, 1, 0)):
        (found,) = torch.autograd.grad(y, x, grad, retain_graph=True)
        assert found.is_contiguous(memory_format=torch.channels_last)
        wanted = []
        for kind in (torch.float64, dtype):
            given = x.detach().to(kind).requires_grad_()
            out = F.conv2d(given, rounded.to(kind), None, own.stride, own.padding, own.dilation, channels)
            wanted.append(torch.autograd.grad(out, given, grad.to(kind))[0])
        check_gradient(found, *wanted, dtype)
    assert len(called) == 2


def test_depthwise_gradient_is_torchs_where_that_is_faster_or_the_window_is_large(monkeypatch):
    monkeypatch.setattr(native, "depthwise_backward", None)
    for layer in (nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 17, 2, groups=4), nn.Conv2d(4, 8, 3, 2, groups=4)):
        x = torch.randn(2, 4, 19, 19).to(memory_format=torch.channels_last).requires_grad_()
        own = frozen.FrozenConv(layer.requires_grad_(False), torch.float32)(x)
        grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in (own, layer(x))]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "layer",
    [
        nn.MaxPool2d(3, 2, 1),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        nn.MaxPool2d((2, 3), (1, 2), dilation=(2, 1)),
        MaxPool2dSame(3, 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_max_pooling_keeps_one_byte_per_output(backend, layer, dtype):
    x = torch.randn(2, 19, 11, 8).relu().to(dtype).to(memory_format=torch.channels_last)  # half of it ties at 0
    x.requires_grad_()
    own = frozen.FrozenMaxPool(layer, same=isinstance(layer, MaxPool2dSame))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = own(x)
    wanted = layer(x)
    assert torch.equal(y, wanted)
    assert [(t.dtype, t.numel()) for t in kept] == [(torch.uint8, y.numel())]
    weights = torch.randint(-3, 4, y.shape).to(dtype)  # sums are exact
    own_grad, plain_grad = (torch.autograd.grad((out * weights).sum(), x)[0] for out in (y, wanted))
    assert torch.equal(own_grad, plain_grad)


def test_max_pooling_by_the_kernel(monkeypatch):
    """Where the dispatch takes it, as on a GPU."""
    pytest.importorskip("triton")
    monkeypatch.setattr(_dispatch, "choose", lambda name, arguments, backend, **settings: "triton")
    layer = nn.MaxPool2d(3, 2, 1, ceil_mode=True)
    x = torch.randn(2, 5, 8, 7).to(memory_format=torch.channels_last).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = frozen.FrozenMaxPool(layer)(x)
    wanted = layer(x)
    assert torch.equal(y, wanted)
    assert [(t.dtype, t.numel()) for t in kept] == [(torch.uint8, y.numel())]
    assert torch.equal(*(torch.autograd.grad(out.sum(), x)[0] for out in (y, wanted)))


@pytest.mark.parametrize(
    "layer", [nn.AvgPool2d(2), nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False)], ids=str
)
def test_average_pooling_keeps_nothing(layer):
    x = torch.randn(2, 5, 9, 8).to(memory_format=torch.channels_last).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = frozen.FrozenAvgPool(layer)(x)
    assert kept == []
    wanted = layer(x)
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), x)[0] for out in (y, wanted)))


def test_phases_take_any_kernel_and_stride():
    for kernel, stride, padding, side in ((7, 2, 3, 15), (5, 3, 0, 14), (2, 3, 0, 12), (4, 4, 0, 17), (3, 2, 2, 8)):
        weight = torch.randn(4, 3, kernel, kernel, dtype=torch.float64)
        x = torch.randn(2, 3, side, side, dtype=torch.float64, requires_grad=True)
        y = F.conv2d(x, weight, None, stride, padding)
        grad = torch.randn_like(y)
        strides = stride, stride
        found = convolution.input_gradient_by_phases(
            grad, convolution.phase_weight(weight, strides), strides, (padding, padding), x.shape
        )
        torch.testing.assert_close(found, torch.autograd.grad(y, x, grad)[0])


def test_freed_memory_is_kept_unless_settings_say_otherwise(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert native.keep_memory.__wrapped__() is False
    monkeypatch.delenv("MALLOC_ARENA_MAX")
    monkeypatch.setattr(native.ctypes, "CDLL", lambda name: object())  # no mallopt
    assert native.keep_memory.__wrapped__() is False
    asked = []

    class Library:
        @staticmethod
        def mallopt(option, value):
            asked.append((option, value))
            return 1

    monkeypatch.setattr(native.ctypes, "CDLL", lambda name: Library)
    assert native.keep_memory.__wrapped__() is True
    assert asked == [(-1, 2**31 - 1), (-4, 0), (-2, 1 << 28)]
