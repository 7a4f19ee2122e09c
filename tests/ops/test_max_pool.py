"""The max pooling kernels against torch's own: values, places, gradients, memory orders, hard inputs."""

import math

import pytest
import torch

from bench.numerics import check_kernel
from fd2fast import ops, reference

WINDOWS = pytest.mark.parametrize(
    "window",
    [
        ((3, 3), (2, 2), (1, 1), (1, 1), False),
        ((3, 3), (2, 2), (1, 1), (1, 1), True),
        ((2, 4), (1, 3), (1, 2), (1, 1), True),
        ((3, 2), (2, 1), (1, 0), (2, 3), False),  # dilated
        ((1, 1), (2, 3), (0, 0), (1, 1), False),  # windows that leave pixels out
    ],
    ids=str,
)
LAYOUTS = pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["last", "first"])
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def _both(x, window):
    return [ops.max_pool(x, *window, backend=backend) for backend in ("triton", "reference")]


@WINDOWS
@LAYOUTS
@pytest.mark.parametrize(("shape", "dtype"), [*zip([(2, 3, 7, 8), (1, 19, 5, 5), (3, 1, 13, 6)], FLOATS, strict=True)])
def test_equals_torch(shape, dtype, layout, window, device):
    x = torch.randn(shape, device=device).relu().to(dtype).to(memory_format=layout).requires_grad_()  # half ties at 0
    own, wanted = _both(x, window)
    assert torch.equal(own, wanted)
    assert own.is_contiguous(memory_format=layout)
    grad = torch.randint(-3, 4, own.shape, device=device).to(dtype)  # sums are exact
    found, expected = (torch.autograd.grad(y, x, grad)[0] for y in (own, wanted))
    assert torch.equal(found, expected)
    assert found.is_contiguous(memory_format=layout)


@WINDOWS
def test_places_are_the_references(window, device):
    x = torch.randn(2, 5, 9, 8, device=device).mul(2).round()  # ties
    kernel, stride, padding, dilation, _ = window
    y, places = reference.max_pool(x, *window)
    found = torch.ops.fd2fast.max_pool(x, kernel, stride, padding, dilation, list(y.shape[2:]))
    assert torch.equal(found[0], y)
    assert torch.equal(found[1], places)


@LAYOUTS
def test_infinite_and_nan(layout, device):
    window = ((3, 3), (2, 2), (1, 1), (1, 1), False)
    x = torch.randn(2, 4, 7, 7, device=device)
    x[0, 0] = -math.inf
    x[0, 1, 2:4, 3] = math.nan
    x[1, 2, :, 0] = math.inf
    x = x.to(memory_format=layout).requires_grad_()
    own, wanted = _both(x, window)
    assert torch.equal(own.nan_to_num(7e7), wanted.nan_to_num(7e7))
    grads = [torch.autograd.grad(y, x, torch.ones_like(y))[0] for y in (own, wanted)]
    assert torch.equal(*grads)


@pytest.mark.parametrize("dtype", FLOATS)
def test_both_gates(dtype, device):
    x = torch.randn(1, 6, 5, 4, device=device).to(dtype)

    def call(x, backend):
        return ops.max_pool(x, (3, 3), (1, 1), (1, 1), backend=backend)  # sums of up to nine gradients

    check_kernel(call, (x,), dtype, grads=(0,))


def test_strided_maps_and_gradients(device):
    x = torch.randn(2, 3, 6, 12, device=device, requires_grad=True)
    own, wanted = _both(x[..., ::2], ((3, 3), (2, 2), (1, 1)))
    assert torch.equal(own, wanted)
    grad = torch.randn(1, 3, 1, 1, device=device).expand(wanted.shape)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, grad)[0] for y in (own, wanted)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="float64 kernels run in the interpreter only")
def test_gradcheck():
    x = torch.arange(6.0, dtype=torch.float64).view(1, 1, 2, 3).flip(3).requires_grad_()  # no ties
    assert torch.autograd.gradcheck(
        lambda x: ops.max_pool(x, (2, 2), (1, 1), (1, 1), ceil_mode=True, backend="triton"), (x,)
    )


def test_an_empty_batch(device):
    x = torch.randn(0, 3, 5, 5, device=device, requires_grad=True)
    y = ops.max_pool(x, (3, 3), (2, 2), backend="triton")
    assert y.shape == (0, 3, 2, 2)
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


def test_fake_kernels(device):
    x = torch.randn(2, 3, 7, 7, device=device).to(memory_format=torch.channels_last).requires_grad_()
    arguments = (x, [3, 3], [2, 2], [1, 1], [1, 1], [4, 4])
    torch.library.opcheck(torch.ops.fd2fast.max_pool, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(3, 5, 5)}, r"x must be \[N, C, H, W\], got \[3, 5, 5\]"),
        ({"x": torch.zeros(1, 1, 5, 5, dtype=torch.int32)}, "x must be float16.*got torch.int32"),
        ({"kernel": (3,)}, r"kernel must be two ints of at least 1, got \(3,\)"),
        ({"stride": (0, 1)}, "stride must be two ints of at least 1"),
        ({"padding": (-1, 0)}, "padding must be two ints of at least 0"),
        ({"kernel": (17, 17)}, r"at most 256 pixels, got \[17, 17\]"),
        ({"padding": (2, 0)}, r"at most half the kernel \[3, 3\], got \[2, 0\]"),
        ({"dilation": (3, 1)}, r"room for a window of \[3, 3\], got \[1, 1, 5, 5\]"),
    ],
)
def test_bad_input(arguments, message):
    given = {"x": torch.zeros(1, 1, 5, 5), "kernel": (3, 3), "stride": (1, 1), **arguments}
    with pytest.raises(ValueError, match=message):
        ops.max_pool(**given)


@pytest.mark.gpu
def test_the_first_map_of_a_resnet(device):
    x = torch.randn(100, 64, 112, 112, device=device, dtype=torch.bfloat16).relu()
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    own, wanted = _both(x, ((3, 3), (2, 2), (1, 1)))
    assert torch.equal(own, wanted)
    grad = torch.randint(-3, 4, own.shape, device=device).to(x.dtype)
    assert torch.equal(*(torch.autograd.grad(y, x, grad)[0] for y in (own, wanted)))
