"""The prototype_loss kernels against the reference: value, gradient, samples at their prototypes, splits, compile."""

from functools import partial

import pytest
import torch

from bench.numerics import check_gradient, check_kernel, check_output, relative_rms
from fd2fast import ops
from fd2fast.ops import _dispatch, prototype_loss

# N, K, D: below, at and above the tiles of 32, one class, one column, prime sizes, several splits of D
SIZES = [(1, 1, 1), (1, 2, 1), (5, 7, 131), (32, 3, 33), (3, 32, 64), (33, 65, 7), (3, 5, 601)]


def _inputs(n, k, d, dtype=torch.float32, device="cpu"):
    z, prototypes = torch.randn(n, d), torch.randn(k, d)
    if d == 1:
        # numbers of opposite signs are all at distance 1, with a gradient of eps
        z, prototypes = z.abs(), prototypes.abs()
    return z.to(device, dtype), prototypes.to(device, dtype), torch.randint(k, (n,)).to(device)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_reference(size, dtype, device):
    check_kernel(prototype_loss, _inputs(*size, dtype, device), dtype)


@pytest.mark.parametrize("types", [(torch.float16, torch.float16), (torch.float32, torch.bfloat16)])
def test_other_types(types, device):
    z, prototypes, labels = _inputs(4, 5, 40, device=device)
    check_kernel(prototype_loss, [z.to(types[0]), prototypes.to(types[1]), labels.int()], types[0])


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("eps", [0.0, 0.5])
def test_weights(beta, eps, device):
    check_kernel(partial(prototype_loss, beta=beta, eps=eps), _inputs(4, 5, 20, device=device), torch.float32)


@pytest.mark.parametrize("distance", [1e-2, 1e-4])
def test_next_to_a_prototype_the_digits_stay(distance, device):
    z, prototypes, labels = _inputs(6, 4, 300, device=device)
    prototypes = torch.nn.functional.normalize(prototypes)
    z = prototypes[labels] + distance * torch.randn_like(z) / 300**0.5
    # beta 1: the loss is the own distance and nothing else
    own, _ = check_kernel(partial(prototype_loss, beta=1.0), [z, prototypes, labels], torch.float32)
    check_kernel(prototype_loss, [z, prototypes, labels], torch.float32)
    # that the input is hard: the expanded square loses the digits here
    expanded = (z.square().sum(1) + prototypes.square().sum(1)[labels] - 2 * (z * prototypes[labels]).sum(1)).clamp(0)
    sizes = z.norm(dim=1) + prototypes[labels].norm(dim=1)
    assert relative_rms(expanded.sqrt() / sizes, own) > (1e-1 if distance == 1e-4 else 1e-5)


def test_at_a_prototype_the_gradient_is_zero(device):
    z, prototypes, labels = _inputs(4, 5, 50, device=device)
    z[:2] = prototypes[labels[:2]]
    loss, (grad,) = check_kernel(partial(prototype_loss, beta=1.0), [z, prototypes, labels], torch.float32)
    assert (loss[:2] == 0).all()
    assert (grad[:2] == 0).all()
    assert (grad[2:] != 0).all()
    check_kernel(prototype_loss, [z, prototypes, labels], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_vectors_and_equal_prototypes(dtype, device):
    z, prototypes, labels = _inputs(6, 7, 30, dtype, device)
    z[0] = 0
    z[1] = 0
    prototypes[3] = 0
    prototypes[4] = prototypes[5]
    labels = torch.tensor([3, 0, 3, 4, 5, 5], device=device)
    z[5] = prototypes[4]
    check_kernel(prototype_loss, [z, prototypes, labels], dtype)


def test_gaps_between_rows_and_columns(device):
    z, prototypes, labels = _inputs(8, 12, 90, device=device)
    check_kernel(prototype_loss, [z[::2, 5:], prototypes[::3, :85], labels[::2] % 4], torch.float32)
    check_kernel(prototype_loss, [z.T[:12].T, prototypes[:, ::8][:, :12], labels], torch.float32)


def test_all_equal_grad_output(device):
    z, prototypes, labels = _inputs(3, 4, 10, device=device)
    grads = []
    for backend in ("triton", "reference"):
        leaf = z.clone().requires_grad_()
        prototype_loss(leaf, prototypes, labels, backend=backend).mean().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)


def test_no_samples(device):
    z, prototypes, labels = _inputs(0, 4, 10, device=device)
    z.requires_grad_()
    loss = prototype_loss(z, prototypes, labels, backend="triton")
    assert loss.shape == (0,)
    loss.sum().backward()
    assert z.grad.shape == (0, 10)


def test_gradcheck_of_the_kernel():
    z, prototypes, labels = _inputs(2, 3, 5, torch.float64)
    assert torch.autograd.gradcheck(
        lambda t: prototype_loss(t, prototypes, labels, beta=0.3, backend="triton"), z.requires_grad_()
    )


# opcheck itself reads the gradient of tensors that are no leaves
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_opcheck(device):
    z, prototypes, labels = _inputs(3, 4, 6, device=device)
    torch.library.opcheck(torch.ops.fd2fast.prototype_loss, (z.requires_grad_(), prototypes, labels, 0.5, 1e-6))


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_whole_graph(backend, device):
    torch._dynamo.reset()
    z, prototypes, labels = _inputs(3, 4, 6, device=device)
    z.requires_grad_()

    def loss(t):
        return ops.prototype_loss(2 * t, prototypes, labels, backend=backend).mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager" if device.type == "cpu" else "inductor")
    expected, actual = loss(z), compiled(z)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, z), torch.autograd.grad(expected, z))


@pytest.mark.parametrize(("rows", "classes", "dims"), [(3, 5, 8), (4, 7, 64), (5, 6, 203), (2, 2, 1024)])
def test_by_cpp(rows, classes, dims):
    """Both gates; a sample at its prototype has distance 0 and no gradient from it."""
    z, normalize = torch.randn(rows, dims), torch.nn.functional.normalize
    z, prototypes, labels = normalize(z), normalize(torch.randn(classes, dims)), torch.arange(rows) % classes
    prototypes[0] = z[0]
    near = prototypes[1] = z[1] * (1 + 1e-5)
    assert (near != z[1]).any()
    weights, results = torch.randn(rows), []
    for backend, dtype in (("cpu", torch.float32), ("reference", torch.float64), ("reference", torch.float32)):
        leaf = z.to(dtype).requires_grad_()
        loss = prototype_loss(leaf, prototypes.to(dtype), labels, backend=backend)
        results.append((loss, torch.autograd.grad((loss * weights.to(dtype)).sum(), leaf)[0]))
    check_output(*(r[0] for r in results), torch.float32, name="loss")
    check_gradient(*(r[1] for r in results), torch.float32)
    leaf = z.clone().requires_grad_()
    loss = prototype_loss(leaf, prototypes, labels)  # "auto" takes it
    assert torch.equal(loss, results[0][0])
    assert torch.equal(torch.autograd.grad((loss * weights).sum(), leaf)[0], results[0][1])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda z, prototypes: (z, prototypes[:1]), "no other class"),
        (lambda z, prototypes: (z.double(), prototypes), "torch.float64"),
        (lambda z, prototypes: (z, prototypes.bfloat16()), "torch.bfloat16"),
        (lambda z, prototypes: (z[:, ::2], prototypes[:, ::2].contiguous()), "z has strides"),
    ],
)
def test_the_rest_is_left_to_the_reference(change, reason):
    z, prototypes = change(torch.randn(3, 8), torch.randn(4, 8))
    labels = torch.zeros(3, dtype=torch.int64)
    assert _dispatch.choose("prototype_loss", (z, prototypes, labels), "auto") == "reference"
    expected = prototype_loss(z, prototypes, labels, backend="reference")
    assert torch.equal(prototype_loss(z, prototypes, labels), expected)
    with pytest.raises(ValueError, match=f"prototype_loss: backend cpu was asked for, but .*{reason}"):
        prototype_loss(z, prototypes, labels, backend="cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(100, 200, 4096), (100, 200, 65536), (512, 120, 16384), (7, 21841, 4096)])
def test_real_sizes_on_the_gpu(size, device):
    z, prototypes, labels = _inputs(*size, device=device)
    z, prototypes = torch.nn.functional.normalize(z), torch.nn.functional.normalize(prototypes)
    z[::2] = prototypes[labels[::2]] + 1e-4 * z[::2]
    first, _ = check_kernel(prototype_loss, [z, prototypes, labels], torch.float32)
    assert torch.equal(first, prototype_loss(z, prototypes, labels, backend="triton"))
