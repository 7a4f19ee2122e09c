"""Addresses beyond 2^31 elements, without a GPU: the last program of each launch, on memory that is never touched."""

import os
import sys
from types import ModuleType

import pytest
import torch

from fd2fast import ops, reference

pytest.importorskip("triton")
# where only the last programs run, later launches read what no one wrote; integers overflow by another error
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered in [a-z]+$:RuntimeWarning")
LIMIT = 1 << 31
LAST, FIRST = torch.channels_last, torch.contiguous_format


@pytest.fixture(autouse=True)
def _poisoned_memory() -> None:
    """Instead of the poison: what is allocated here stays untouched and takes no memory."""


@pytest.fixture(autouse=True)
def interpreter(monkeypatch) -> ModuleType:
    if torch.cuda.is_available():
        pytest.skip("test_gpu.py holds such tensors on the GPU")
    if os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 10 << 30:
        pytest.skip("the system may refuse tensors of 8.6 GB, although they stay untouched")
    from triton.runtime import interpreter

    # 32-bit sums and products that overflow are errors
    monkeypatch.setattr(interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(debug=True))
    # what it would copy back is the same memory
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
    return interpreter


@pytest.fixture
def _last_programs_only(interpreter, monkeypatch) -> None:
    """Of each axis of a launch's grid only the last index runs."""

    def last(*bounds: int) -> range:
        launching = sys._getframe(1).f_code is interpreter.GridExecutor.__call__.__code__
        return range(bounds[0] - 1, bounds[0]) if launching else range(*bounds)

    monkeypatch.setattr(interpreter, "range", last, raising=False)


def _far_apart(small: torch.Tensor) -> torch.Tensor:
    """The same values in rows so far apart that the third begins beyond 2^31 elements."""
    stride = LIMIT // 2 + 16
    memory = torch.empty((len(small) - 1) * stride + small[0].numel(), dtype=small.dtype)
    wide = memory.as_strided(small.shape, (stride, *small.stride()[1:]))
    wide.copy_(small)
    return wide


def _large(tail: torch.Tensor) -> torch.Tensor:
    """More than 2^31 elements that end with `tail`, in its layout; the others are never touched."""
    layout = FIRST if tail.ndim < 4 or tail.is_contiguous() else LAST
    rows = LIMIT // tail[0].numel() + 1
    large = torch.empty(rows * tail[0].numel(), dtype=tail.dtype)
    n, c, h, w = (rows, *tail.shape[1:])
    large = large.view(n, h, w, c).permute(0, 3, 1, 2) if layout is LAST else large.view(n, c, h, w)
    large[-len(tail) :].copy_(tail)
    assert large.numel() > LIMIT
    assert large.is_contiguous(memory_format=layout)
    return large


def test_the_interpreter_would_notice():
    import triton
    import triton.language as tl

    @triton.jit
    def narrow_kernel(p_x, p_y, stride):
        row = tl.arange(0, 4)
        tl.store(p_y + row, tl.load(p_x + row * stride))

    with pytest.raises(Exception, match="overflow"):
        narrow_kernel[(1,)](_far_apart(torch.ones(4, 1).half()), torch.zeros(4), LIMIT // 2 + 16)


def test_prototype_loss():
    z, prototypes = torch.randn(4, 40).bfloat16(), torch.randn(4, 40).bfloat16()
    labels = torch.tensor([0, 3, 2, 1])
    results = []
    for a, b, backend in ((_far_apart(z), _far_apart(prototypes), "triton"), (z, prototypes, "reference")):
        a.requires_grad_()
        loss = ops.prototype_loss(a, b, labels, backend=backend)
        # the gradient's own tensor would be as large
        kernels = sys.modules["fd2fast.ops.triton.prototype_loss"]._kernels()
        if backend == "triton":
            _, pull, shrink = kernels.prototype_loss_fwd(a.detach(), b, labels, 0.5, 1e-6)
            gradient = kernels.prototype_loss_bwd(torch.ones(4), a.detach(), b, pull, shrink)
        else:
            (gradient,) = torch.autograd.grad(loss.sum(), a)
        results.append((loss, gradient))
    torch.testing.assert_close(*(r[0] for r in results), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*(r[1] for r in results), rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("size", [6, 3])
def test_crop_flip_roll_and_its_adjoint(size):
    from fd2fast.kernels import crop_flip_roll

    params, segments = torch.tensor([[0, 1, 4, 3, 1, 2, 1], [1, 0, 3, 4, 0, 1, 3]]), torch.tensor([0, 2, 3])
    images, grad = torch.randn(3, 3, 5, 4), torch.randn(3, 3, size, size)
    out = crop_flip_roll.crop_fwd(_far_apart(images.half()), params, segments, _far_apart(grad.half()))
    adjoint = crop_flip_roll.crop_bwd(_far_apart(grad.half()), params, segments, _far_apart(images.half()))
    images = images.half().requires_grad_()
    expected = ops.crop_flip_roll(images, params, segments, size, backend="reference")
    torch.testing.assert_close(out, expected, rtol=2e-3, atol=2e-3)
    (expected,) = torch.autograd.grad(expected, images, grad.half())
    torch.testing.assert_close(adjoint, expected, rtol=2e-3, atol=2e-3)


def test_max_pool_and_its_gradient():
    from fd2fast.kernels import max_pool

    window = (3, 3), (2, 2), (1, 1), (1, 1)
    x = torch.randn(3, 3, 5, 4).half().requires_grad_()
    expected, places = reference.max_pool(x, *window, False)
    y, found = _far_apart(torch.zeros_like(expected)), _far_apart(torch.zeros_like(places))
    max_pool.max_pool_fwd(_far_apart(x.detach()), *window, y, found)
    assert torch.equal(y, expected)
    assert torch.equal(found, places)
    grad = torch.randint(-3, 4, y.shape).half()
    grad_x = _far_apart(torch.zeros_like(x.detach()))
    max_pool.max_pool_bwd(_far_apart(grad), found, *window, grad_x)
    assert torch.equal(grad_x, torch.autograd.grad(expected, x, grad)[0])


@pytest.mark.parametrize("layout", [LAST, FIRST], ids=["last", "first"])
@pytest.mark.usefixtures("_last_programs_only")
def test_bn(layout, monkeypatch):
    from fd2fast.kernels import _configs

    monkeypatch.setattr(_configs, "BN_PROGRAMS", 1)
    channels = 64
    small = torch.randn(1, channels, 2, 2).bfloat16().to(memory_format=layout)
    constants = [torch.rand(channels) + 0.5 for _ in range(4)]
    residual = small.flip(1).contiguous(memory_format=layout)
    # programs of NCHW take one channel each, and only the last runs
    seen = slice(None) if layout is LAST else slice(-1, None)
    results = []
    for make, backend in ((_large, "triton"), (lambda t: t.clone(), "reference")):
        x, other = make(small).requires_grad_(), make(residual).requires_grad_()
        n = len(x)
        y, loss = ops.bn_act_matching(x, *constants, [0, n - 1, n], residual=other, backend=backend)
        # only of the activation: the loss of the other channels is not summed here
        gradients = torch.autograd.grad(y, (x, other), make(small)) if layout is FIRST else ()
        if layout is LAST:
            gradients = torch.autograd.grad([y, loss], (x, other), [make(small), torch.full((2,), 3.0)])
        results.append([t[-1:, seen] for t in (y.detach(), *gradients)])
        if layout is LAST:
            results[-1].append(loss.detach()[-1:])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.usefixtures("_last_programs_only")
def test_bn_of_one_large_image(monkeypatch):
    from fd2fast.kernels import _configs

    monkeypatch.setattr(_configs, "BN_PROGRAMS", 1)
    small = torch.randn(1, 1, 64, 64).bfloat16()
    constants = [torch.rand(1) + 0.5 for _ in range(4)]
    results = []
    for channels, backend in ((LIMIT // 4096 + 1, "triton"), (1, "reference")):
        x = torch.empty(1, channels, 64, 64, dtype=torch.bfloat16)
        x[:, -1:] = small
        x.requires_grad_()
        y = ops.bn_act(x, *(c.expand(channels) for c in constants), backend=backend)
        (gradient,) = torch.autograd.grad(y, x, x.detach())
        mean, var = ops.segment_statistics(x.detach(), [0, 1], backend=backend)
        results.append([t[:, -1] for t in (y.detach(), gradient, mean, var)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("layout", [LAST, FIRST], ids=["last", "first"])
@pytest.mark.usefixtures("_last_programs_only")
def test_adam_clamp(layout):
    small = [torch.randn(2, 3, 32, 16).bfloat16().to(memory_format=layout) for _ in range(4)]
    small[3] = small[3].square()
    settings = {"lr": 0.25, "betas": (0.5, 0.9), "eps": 1e-8, "low": [-1.0, -0.9, -0.8], "high": [1.0, 1.1, 1.2]}
    large = [_large(t) for t in small]
    ops.adam_clamp_(*large, 3, **settings, backend="triton")
    ops.adam_clamp_(*small, 3, **settings, backend="reference")
    # the last program writes the elements past the last whole block of 1024
    order = (0, 2, 3, 1) if layout is LAST else (0, 1, 2, 3)
    for index in (0, 2, 3):
        count = (large[index].numel() - 1) % 1024 + 1
        actual, expected = (t[-2:].permute(order).reshape(-1)[-count:] for t in (large[index], small[index]))
        torch.testing.assert_close(actual, expected, rtol=3e-2, atol=2e-2)


@pytest.mark.usefixtures("_last_programs_only")
def test_bilinear_attention_pool():
    # features beyond the limit, and their pooled vectors beyond it
    for channels, maps, pixels in ((64, 3, 16), (16, 64, 1)):
        features = torch.rand(1, channels, 1, pixels).bfloat16() + 0.1
        attention = torch.rand(1, maps, 1, pixels).bfloat16() + 0.1
        rows = LIMIT // (channels * max(pixels, maps)) + 1
        grad = torch.randn(1, maps * channels)
        results = []
        for n, backend in ((rows, "triton"), (1, "reference")):
            f, a = (torch.empty(n, *t.shape[1:], dtype=t.dtype) for t in (features, attention))
            g = torch.empty(n, maps * channels)
            for whole, part in ((f, features), (a, attention), (g, grad)):
                whole[-1:] = part
            f.requires_grad_()
            a.requires_grad_()
            z = ops.bilinear_attention_pool(f, a, backend=backend)
            assert n == 1 or max(f.numel(), z.numel()) > LIMIT
            results.append([t[-1:] for t in (z.detach(), *torch.autograd.grad(z, (f, a), g))])
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=2e-2, atol=1e-4)


@pytest.mark.usefixtures("_last_programs_only")
def test_attention_similarity_loss():
    attention, prior = (torch.rand(1, 16, 16, 8).bfloat16() for _ in range(2))
    results = []
    for make, backend in ((_large, "triton"), (lambda t: t.clone(), "reference")):
        a, p = make(attention).requires_grad_(), make(prior)
        loss = ops.attention_similarity_loss(a, p, torch.arange(len(a) + 1), backend=backend)
        (gradient,) = torch.autograd.grad(loss, a, torch.ones_like(loss))
        # the last program of the backward has the last 1024 elements
        results.append((loss.detach()[-1:], gradient[-1].flatten()[-1024:]))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-5)
