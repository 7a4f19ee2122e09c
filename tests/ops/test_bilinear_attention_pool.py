"""The bilinear_attention_pool kernels against the reference: value, both gradients, layouts, hard inputs, compile."""

import pytest
import torch

from bench.numerics import check_kernel
from fd2fast import ops
from fd2fast.ops import bilinear_attention_pool as pool

LAST = torch.channels_last
# N, C, M, H, W: one tile and several, of channels (64, 128) and pixels (32, 64), with remainders
SIZES = [
    (1, 2, 3, 1, 1),
    (3, 11, 1, 2, 3),
    (2, 7, 3, 1, 2),
    (3, 63, 5, 3, 5),
    (2, 131, 17, 7, 7),
    (1, 65, 33, 1, 67),
    (2, 5, 64, 4, 4),
]


def _inputs(n, c, m, h, w, dtype=torch.float32, device="cpu"):
    # one sign for each channel: products next to 0, where the root is steep, are a case of their own
    sign = torch.where(torch.arange(c) % 3 == 0, -1.0, 1.0)[:, None, None]
    features = (torch.rand(n, c, h, w) + 0.1) * sign
    return features.to(device, dtype), (torch.rand(n, m, h, w) + 0.1).to(device, dtype)


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_reference(size, dtype, layout, device):
    inputs = [t.to(memory_format=layout) for t in _inputs(*size, dtype, device)]
    _, grads = check_kernel(pool, inputs, dtype, grads=(0, 1))
    assert all(g.is_contiguous(memory_format=layout) for g in grads)


@pytest.mark.parametrize("types", [(torch.float16, torch.float16), (torch.bfloat16, torch.float32)])
def test_other_types(types, device):
    features, attention = _inputs(2, 20, 4, 3, 3, device=device)
    check_kernel(pool, [features.to(types[0]), attention.to(types[1])], types[0], grads=(0, 1))


def test_layouts_differ_and_have_gaps(device):
    features, attention = _inputs(4, 20, 6, 6, 5, device=device)
    check_kernel(pool, [features.to(memory_format=LAST), attention], torch.float32, grads=(0, 1))
    check_kernel(pool, [features[1:3], attention[1:3]], torch.float32, grads=(0, 1))
    check_kernel(pool, [features[:, ::2, 1:], attention.transpose(2, 3)[:, :, :5, 1:]], torch.float32, grads=(0, 1))


def test_one_of_everything(device):
    # z is then all but independent of the attention, whose gradient is rounding
    check_kernel(pool, _inputs(1, 2, 1, 1, 1, device=device), torch.float32)
    features, attention = (t.requires_grad_() for t in _inputs(1, 1, 1, 1, 1, device=device))
    z = pool(features, attention, backend="triton")
    assert z.item() == -1
    z.sum().backward()
    assert abs(features.grad.item()) < 1e-6
    assert abs(attention.grad.item()) < 1e-6


@pytest.mark.parametrize("which", [0, 1])
def test_gradient_to_one_input(which, device):
    check_kernel(pool, _inputs(2, 5, 3, 2, 2, device=device), torch.float32, grads=(which,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_products_give_zero_and_no_gradient(dtype, device):
    features, attention = _inputs(3, 6, 4, 3, 3, dtype, device)
    features[0] = 0
    features[1, 2] = 0
    attention[1, 3] = 0
    z, (to_features, to_attention) = check_kernel(pool, [features, attention], dtype, grads=(0, 1))
    assert (z[0] == 0).all()
    assert (to_features[0] == 0).all()
    assert (to_attention[0] == 0).all()
    assert (to_features[1, 2] == 0).all()
    assert torch.linalg.vector_norm(z[1:], dim=1).sub(1).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_maps(dtype, device):
    """Every channel and every map alike: the gradient is the differences of equal numbers."""
    features, attention = (t[:, :1].expand(t.shape).contiguous() for t in _inputs(2, 5, 3, 3, 2, dtype, device))
    attention[1] = 0.5
    check_kernel(pool, [features, attention], dtype, grads=(0, 1))


def test_products_of_both_signs_next_to_zero(device):
    # float64 where the interpreter has it: the root's slope of 500 magnifies every rounding
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    features, attention = _inputs(2, 40, 3, 2, 2, dtype, device)
    features[:, ::2] *= 1e-6
    check_kernel(pool, [features, attention], dtype, grads=(0, 1))


def test_norm_below_its_floor():
    features, attention = _inputs(1, 3, 2, 2, 2, torch.float64)
    check_kernel(lambda *t, backend: pool(*t, eps=0.0, backend=backend), [1e-30 * features, attention], torch.float64)


def test_nan_is_not_hidden(device):
    features, attention = _inputs(2, 4, 2, 2, 2, device=device)
    features[1, 3, 0, 0] = float("nan")
    z = pool(features, attention, backend="triton")
    assert torch.isfinite(z[0]).all()
    assert z[1].isnan().any()


def test_no_samples(device):
    features, attention = (t.requires_grad_() for t in _inputs(0, 4, 2, 3, 3, device=device))
    z = pool(features, attention, backend="triton")
    assert z.shape == (0, 8)
    z.sum().backward()
    assert features.grad.shape == features.shape


def test_too_many_maps_are_left_to_the_reference(device):
    features, attention = _inputs(1, 2, 65, 1, 2, device=device)
    with pytest.raises(ValueError, match="65 maps, more than the kernel's 64"):
        pool(features, attention, backend="triton")
    assert pool(features, attention).shape == (1, 130)


def test_gradcheck_of_the_kernel():
    inputs = [t.requires_grad_() for t in _inputs(2, 3, 2, 1, 2, torch.float64)]
    assert torch.autograd.gradcheck(lambda *t: pool(*t, backend="triton"), inputs)


# opcheck itself reads the gradient of tensors that are no leaves
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_opcheck(device):
    features, attention = _inputs(2, 3, 2, 2, 2, device=device)
    inputs = (features.to(memory_format=LAST).requires_grad_(), attention.requires_grad_(), 1e-6)
    torch.library.opcheck(torch.ops.fd2fast.bilinear_attention_pool, inputs)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_whole_graph(backend, device):
    torch._dynamo.reset()
    features, attention = (t.requires_grad_() for t in _inputs(2, 5, 3, 2, 2, device=device))

    def loss(f, a):
        return ops.bilinear_attention_pool(2 * f, a, backend=backend).square().sum(1)[0] + a.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager" if device.type == "cpu" else "inductor")
    expected, actual = loss(features, attention), compiled(features, attention)
    torch.testing.assert_close(actual, expected)
    for a, e in zip(*(torch.autograd.grad(x, (features, attention)) for x in (actual, expected)), strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "size", [(100, 512, 8, 7, 7), (100, 2048, 32, 7, 7), (3, 1280, 64, 28, 28), (2, 1021, 13, 17, 13)]
)
def test_real_sizes_on_the_gpu(size, dtype, device):
    inputs = [t.to(memory_format=LAST) for t in _inputs(*size, dtype, device)]
    first = check_kernel(pool, inputs, dtype, grads=(0, 1))
    again = pool(*inputs, backend="triton")
    assert torch.equal(first[0], again)
