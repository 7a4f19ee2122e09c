"""Winograd's convolution against the plain sums: values, input gradient, edges, channels, threads, a changed weight."""

import pytest
import torch
import torch.nn.functional as F

from fd2fast.models import winograd
from fd2fast.ops.cpu import native

# channels in, out, rows, side, padding: whole and cut tiles, single vectors, channels behind the last vector
CASES = [
    (16, 16, 2, (8, 8), (1, 1)),
    (32, 48, 3, (9, 7), (1, 1)),
    (19, 21, 1, (4, 13), (1, 1)),
    (8, 64, 2, (3, 3), (0, 0)),
    (24, 8, 2, (5, 6), (2, 0)),
    (40, 33, 5, (1, 1), (1, 1)),
    (64, 32, 30, (5, 5), (1, 1)),
    (8, 8, 1, (37, 6), (2, 2)),
]


@pytest.fixture(autouse=True)
def _built():
    if native.WHY_NOT:
        pytest.fail(f"{native.WHY_NOT}; install the package again")


def make(case, dtype):
    c, o, rows, side, padding = case
    torch.manual_seed(c + o)
    x = torch.randn(rows, c, *side).to(dtype).contiguous(memory_format=torch.channels_last)
    return x, (torch.randn(o, c, 3, 3) / (9 * c) ** 0.5).to(dtype), torch.randn(o).to(dtype), padding


def relative(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_the_convolution_and_its_input_gradient(case, dtype, with_bias):
    x, weight, bias, padding = make(case, dtype)
    bias = bias if with_bias else None
    conv = winograd.WinogradConv(padding)
    exact = x.double().requires_grad_()
    wanted = F.conv2d(exact, weight.double(), None if bias is None else bias.double(), 1, padding)
    y = conv.forward(x, weight, bias)
    assert y.shape == wanted.shape
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    # the rounding of the result in bf16; in fp32 a few times that of the plain sums
    limit = 3e-6 if dtype == torch.float32 else 2.5e-3
    assert relative(y, wanted.detach()) < limit
    grad = torch.randn(y.shape).to(dtype)
    wanted.backward(grad.double())
    found = conv.input_gradient(grad, weight, tuple(x.shape[2:]))
    assert found.shape == x.shape
    assert relative(found, exact.grad) < limit


def test_large_values_and_nan_stay_where_they_are():
    """No tile leaks into its neighbour, and NaN is not hidden."""
    weight = torch.zeros(8, 8, 3, 3)
    weight[range(8), range(8), 1, 1] = 1.0
    x = torch.zeros(1, 8, 12, 12).to(memory_format=torch.channels_last)
    x[0, 3, 5, 5] = 1e20
    y = winograd.WinogradConv((1, 1)).forward(x, weight, None)
    assert y[0, 3, 5, 5] == pytest.approx(1e20, rel=1e-5)
    assert (y[0, 3, 8:] == 0).all()
    x[0, 3, 5, 5] = torch.nan
    assert winograd.WinogradConv((1, 1)).forward(x, weight, None)[0, 3, 5, 5].isnan()


@pytest.mark.parametrize(("rows", "side"), [(1, 5), (40, 16)])  # fewer and more blocks than threads
def test_the_result_does_not_depend_on_threads(rows, side):
    x, weight, bias, padding = make((32, 40, rows, (side, side), (1, 1)), torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(winograd.WinogradConv(padding).forward(x, weight, bias))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_images_do_not_feel_each_other():
    x, weight, bias, padding = make((16, 24, 7, (9, 9), (1, 1)), torch.float32)
    conv = winograd.WinogradConv(padding)
    y = conv.forward(x, weight, bias)
    for n in range(len(x)):
        alone = x[n : n + 1].contiguous(memory_format=torch.channels_last)
        assert torch.equal(conv.forward(alone, weight, bias)[0], y[n])


def test_a_changed_weight_is_transformed_anew():
    x, weight, _, padding = make(CASES[0], torch.float32)
    conv = winograd.WinogradConv(padding)
    y = conv.forward(x, weight, None)
    weight.mul_(2)
    assert torch.equal(conv.forward(x, weight, None), 2 * y)
    assert conv.nbytes == 4 * 16 * 16 * 36
    conv.forget()
    assert conv.nbytes == 0


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({}, True),
        ({"dtype": torch.bfloat16}, True),
        ({"dtype": torch.float64}, False),
        ({"dtype": torch.float16}, False),
        ({"kernel": (1, 1)}, False),
        ({"stride": (1, 2)}, False),
        ({"dilation": (2, 2)}, False),
        ({"groups": 2}, False),
        ({"padding": (3, 1)}, False),
        ({"channels": (3, 64)}, False),
    ],
)
def test_which_convolutions_it_takes(change, taken):
    pair = (1, 1)
    settings = {
        "dtype": torch.float32,
        "kernel": (3, 3),
        "stride": pair,
        "padding": pair,
        "dilation": pair,
        "groups": 1,
    }
    assert winograd.supports(**{**settings, "channels": (8, 16), **change}) is taken
