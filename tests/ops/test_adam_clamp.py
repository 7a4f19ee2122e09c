"""The adam_clamp_ kernel against torch.optim.Adam in float64 and float32: values, bounds, layouts, half types."""

import pytest
import torch

from bench.numerics import check_output
from fd2fast import ops
from fd2fast.ops import _dispatch
from fd2fast.ops.cpu import adam_clamp

LOW, HIGH = [-2.1, -2.0, -1.8], [2.2, 2.4, 2.6]
LAST = torch.channels_last


def _problem(shape, dtype, device, layout=torch.contiguous_format):
    image = (2 * torch.randn(shape, dtype=dtype)).to(device).to(memory_format=layout)
    return image, torch.zeros_like(image), torch.zeros_like(image)


def _run(state, grads, backend, *, as_tensor=False, lr=0.25, betas=(0.5, 0.9)):
    for step, grad in enumerate(grads, start=1):
        t, rate = step, lr
        if as_tensor:
            t = torch.tensor(step, device=grad.device)
            rate = torch.tensor(lr, device=grad.device, dtype=torch.float64)
        ops.adam_clamp_(
            state[0], grad, *state[1:], t, lr=rate, betas=betas, eps=1e-8, low=LOW, high=HIGH, backend=backend
        )


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 3, 13, 17), (3, 3, 16, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_reference(shape, dtype, layout, as_tensor, device):
    if dtype == torch.float64 and device.type == "cuda":
        pytest.skip("float64 on a GPU is left to the reference")
    image, m, v = _problem(shape, dtype, device, layout)
    grads = [torch.randn_like(image) for _ in range(4)]
    kernel, exact, plain = ([t.clone() for t in (image, m, v)] for _ in range(3))
    exact = [t.double() for t in exact]
    _run(kernel, grads, "triton", as_tensor=as_tensor)
    _run(exact, [g.double() for g in grads], "reference")
    _run(plain, grads, "reference")
    for name, k, e, p in zip(("image", "exp_avg", "exp_avg_sq"), kernel, exact, plain, strict=True):
        assert k.dtype == dtype
        check_output(k, e, p, dtype, name=name)
    if image.numel() > 3:
        for c in range(3):
            assert (kernel[0][:, c] == torch.tensor(LOW[c], dtype=dtype)).any()
            assert (kernel[0][:, c] == torch.tensor(HIGH[c], dtype=dtype)).any()


def test_more_than_one_block_and_odd_sizes(device, monkeypatch):
    image, m, v = _problem((7, 3, 29, 31), torch.float32, device)
    grads = [torch.randn_like(image)]
    kernel, plain = ([t.clone() for t in (image, m, v)] for _ in range(2))
    _run(kernel, grads, "triton")
    _run(plain, grads, "reference")
    for k, p in zip(kernel, plain, strict=True):
        torch.testing.assert_close(k, p, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("grad_type", [torch.bfloat16, torch.float16])
def test_half_gradients_and_other_layouts(grad_type, device):
    image, m, v = _problem((2, 3, 8, 8), torch.float32, device, LAST)
    grad = torch.randn(2, 3, 8, 8, device=device).to(grad_type)
    kernel, plain = ([t.clone() for t in (image, m, v)] for _ in range(2))
    _run(kernel, [grad], "triton")
    _run(plain, [grad.float()], "reference")
    for k, p in zip(kernel, plain, strict=True):
        torch.testing.assert_close(k, p, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_bf16_moments(as_tensor, layout, device):
    """Both gates, with moments that a double-precision Adam would have; images stay float32."""
    image, m, v = _problem((2, 3, 8, 8), torch.float32, device, layout)
    grads = [torch.randn_like(image) for _ in range(2)]
    kernel, plain = ([image.clone(), m.bfloat16(), v.bfloat16()] for _ in range(2))
    exact = [t.double() for t in (image, m, v)]
    _run(kernel, grads, "triton", as_tensor=as_tensor)
    _run(plain, grads, "reference", as_tensor=as_tensor)
    _run(exact, [g.double() for g in grads], "reference")
    for name, k, e, p in zip(("image", "exp_avg", "exp_avg_sq"), kernel, exact, plain, strict=True):
        assert k.dtype == p.dtype == (torch.float32 if name == "image" else torch.bfloat16)
        check_output(k, e, p, torch.bfloat16, name=name)


def test_ten_steps_of_bf16_moments_are_adam(device):
    """The images after ten steps differ from those of moments in float32 by less than 1 % of what they moved."""
    image, m, v = _problem((2, 3, 16, 16), torch.float32, device)
    image *= 0.1
    drift = torch.randn_like(image)
    grads = [drift + 0.5 * torch.randn_like(image) for _ in range(10)]
    full, half = [image.clone(), m, v], [image.clone(), m.bfloat16(), v.bfloat16()]
    _run(full, grads, "triton", lr=0.05)
    _run(half, grads, "triton", lr=0.05)
    moved = (full[0] - image).square().mean().sqrt()
    assert (half[0] - full[0]).square().mean().sqrt() < 0.01 * moved


def test_values_on_the_bounds(device):
    """A value on its bound stays there without a gradient, and under one that pushes it out; it leaves under the other."""
    low, high = (torch.tensor(b, device=device).view(1, 3, 1, 1) for b in (LOW, HIGH))
    for bound, other, outward in ((low, high, 1.0), (high, low, -1.0)):
        image = bound.expand(2, 3, 3, 3).contiguous()
        for gradient in (0.0, outward, -outward):
            state = [image.clone(), torch.zeros_like(image), torch.zeros_like(image)]
            plain = [t.clone() for t in state]
            grad = torch.full_like(image, gradient)
            _run(state, [grad], "triton")
            _run(plain, [grad], "reference")
            torch.testing.assert_close(state[0], plain[0], rtol=1e-6, atol=0)
            assert torch.equal(state[0], image) == (gradient in (0.0, outward))
            assert torch.equal(grad, torch.full_like(image, gradient))
        state = [image.clone(), torch.zeros_like(image), torch.zeros_like(image)]
        _run(state, [torch.full_like(image, -outward)], "triton", lr=100.0)
        assert torch.equal(state[0], other.expand_as(image))


def test_operator_passes_torch_library_checks(device):
    image, m, v = _problem((2, 3, 2, 2), torch.float32, device)
    low, high = torch.tensor(LOW, device=device), torch.tensor(HIGH, device=device)
    given = (image, torch.randn_like(image), m, v, low, high, None, None, 3, 0.1, 0.5, 0.9, 1e-8)
    torch.library.opcheck(torch.ops.fd2fast.adam_clamp.default, given, test_utils=("test_schema", "test_faketensor"))


def test_nan_stays_nan(device):
    image, m, v = _problem((1, 3, 2, 2), torch.float32, device)
    grad = torch.zeros_like(image)
    grad[0, 1, 0, 1] = float("nan")
    _run([image, m, v], [grad], "triton")
    assert image.isnan().sum() == 1


def test_autograd_notices_the_write(device):
    image, m, v = _problem((1, 3, 2, 2), torch.float32, device)
    image.requires_grad_()
    loss = image.square().sum()
    _run([image, m, v], [torch.ones_like(image)], "triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_other_strides_are_refused_by_name(device):
    image, m, v = _problem((2, 3, 4, 4), torch.float32, device)
    with pytest.raises(ValueError, match="exp_avg has strides"):
        _run([image, m.to(memory_format=LAST), v], [torch.ones_like(image)], "triton")
    with pytest.raises(ValueError, match="image has strides"):
        _run([image[:, :, ::2], m[:, :, ::2], v[:, :, ::2]], [torch.ones_like(image[:, :, ::2])], "triton")


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 3, 13, 17), (3, 3, 150, 151)])
def test_on_the_host(shape):
    """The C++ kernel: the reference's values, and each element's bits free of what lies beside it."""
    if adam_clamp.WHY_NOT:
        pytest.fail(f"{adam_clamp.WHY_NOT}; install the package again")
    state = _problem(shape, torch.float32, torch.device("cpu"))
    grads = [torch.randn(shape) for _ in range(4)]
    whole, slow, exact, rows = ([t.clone() for t in state] for _ in range(4))
    exact = [t.double() for t in exact]
    _run(whole, grads, "cpu")
    _run(slow, grads, "reference")
    _run(exact, [g.double() for g in grads], "reference")
    for name, k, e, p in zip(("image", "exp_avg", "exp_avg_sq"), whole, exact, slow, strict=True):
        check_output(k, e, p, torch.float32, name=name)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for n in range(shape[0]):  # alone, and not on the boundary of a vector
            part = [torch.empty(t[n : n + 1].numel() + 1)[1:].view(1, *shape[1:]).copy_(t[n]) for t in rows]
            _run(part, [g[n : n + 1].clone() for g in grads], "cpu")
            for k, alone in zip(whole, part, strict=True):
                assert torch.equal(k[n : n + 1], alone)
    finally:
        torch.set_num_threads(before)


def test_on_the_host_nan_stays_and_autograd_notices():
    image, m, v = _problem((2, 3, 4, 5), torch.float32, torch.device("cpu"))
    grad = torch.randn_like(image)
    grad[1, 2, 3, 4] = float("nan")
    weight = torch.ones_like(image).requires_grad_()
    product = (image * weight).sum()
    _run([image, m, v], [grad], "cpu")
    assert image.isnan().nonzero().tolist() == [[1, 2, 3, 4]]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda state: [t.double() for t in state], "torch.float64"),
        (lambda state: [t.to(memory_format=LAST) for t in state], "image has strides"),
        (lambda state: [state[0].requires_grad_(), *state[1:]], None),
        (lambda state: [torch.nn.Parameter(state[0], requires_grad=False), *state[1:]], "a Parameter"),
    ],
)
def test_what_the_host_kernel_takes(change, reason):
    """ "auto" takes the reference for the rest; by name they are refused."""
    state, grad = change(list(_problem((2, 3, 4, 5), torch.float32, torch.device("cpu")))), torch.randn(2, 3, 4, 5)
    settings = {"betas": (0.5, 0.9), "eps": 1e-8, "low": LOW, "high": HIGH}
    arguments = (state[0], grad.to(state[0].dtype), *state[1:], 1, 0.1)
    assert _dispatch.choose("adam_clamp_", arguments, "auto", **settings) == ("cpu" if reason is None else "reference")
    if reason is not None:
        with pytest.raises(ValueError, match=f"adam_clamp_: backend cpu was asked for, but .*{reason}"):
            _run(state, [arguments[1]], "cpu")


def test_the_host_kernel_wants_numbers():
    with pytest.raises(ValueError, match="step and lr must be numbers"):
        _run(
            _problem((2, 3, 4, 5), torch.float32, torch.device("cpu")), [torch.ones(2, 3, 4, 5)], "cpu", as_tensor=True
        )
