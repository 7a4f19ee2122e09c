"""The gates of bench/numerics.py reject the errors that kernels make, and accept rounding."""

import pytest
import torch

from bench.numerics import RELATIVE_RMS, check_gradient, check_output, relative_rms

DTYPES = list(RELATIVE_RMS)


def _case(dtype):
    expected = torch.randn(1000, dtype=torch.float64)
    plain = expected.to(dtype)
    return expected, plain


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_passes(dtype):
    expected, plain = _case(dtype)
    check_gradient(plain.clone(), expected, plain, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "spoil",
    [
        lambda g: -g,
        lambda g: 1.05 * g,
        lambda g: torch.zeros_like(g),
        lambda g: torch.full_like(g, float("nan")),
        lambda g: torch.where(torch.arange(len(g)) == 7, float("inf"), g),
        lambda g: torch.where(torch.arange(len(g)) < 500, g, 0),
        lambda g: g.roll(1),
    ],
    ids=["sign", "scaled", "zeroed", "nan", "one inf", "half zero", "shifted"],
)
def test_wrong_gradients_fail(dtype, spoil):
    expected, plain = _case(dtype)
    with pytest.raises(AssertionError):
        check_gradient(spoil(plain.clone()), expected, plain, dtype)


def test_missing_gradient_fails():
    expected, plain = _case(torch.float32)
    with pytest.raises(AssertionError, match="no gradient"):
        check_gradient(None, expected, plain, torch.float32)


def test_second_gate_sees_one_wrong_element():
    expected = torch.ones(1_000_000, dtype=torch.float64)
    plain = expected.float()
    actual = plain.clone()
    actual[3] += 0.005
    assert relative_rms(actual, expected) < RELATIVE_RMS[torch.float32]
    with pytest.raises(AssertionError, match="twice plain torch"):
        check_output(actual, expected, plain, torch.float32)


def test_first_gate_sees_an_error_that_plain_torch_makes_too():
    expected = torch.ones(100, dtype=torch.float64)
    plain = expected.float() * 1.01
    with pytest.raises(AssertionError, match="relative RMS"):
        check_output(plain.clone(), expected, plain, torch.float32)


def test_zero_is_equal_to_zero_only():
    zero = torch.zeros(5, dtype=torch.float64)
    check_gradient(zero.float(), zero, zero.float(), torch.float32)
    with pytest.raises(AssertionError):
        check_gradient(zero.float() + 1e-20, zero, zero.float(), torch.float32)


def test_shape_must_match():
    expected, plain = _case(torch.float32)
    with pytest.raises(AssertionError, match="shape"):
        check_output(plain[:1], expected, plain, torch.float32)
