"""The crop_flip_roll kernels against torchvision and the reference: values, adjoint, layouts, segments, scales."""

import sys

import pytest
import torch
import torchvision.transforms.v2.functional as tv

from bench.numerics import check_gradient, check_output
from fd2fast import ops

LAST, FIRST = torch.channels_last, torch.contiguous_format
LAYOUTS = pytest.mark.parametrize("layout", [LAST, FIRST], ids=["last", "first"])
# image height and width, output size: upsampling only, mixed, downsampling, single pixels, primes
SIZES = [(5, 6, 6), (3, 4, 7), (7, 5, 6), (7, 5, 3), (1, 1, 3), (3, 4, 1), (2, 9, 5)]


def _random_rows(height, width, size, count):
    rows = []
    for _ in range(count):
        h, w = (int(torch.randint(1, n + 1, ())) for n in (height, width))
        top, left = int(torch.randint(0, height - h + 1, ())), int(torch.randint(0, width - w + 1, ()))
        down, right = (int(v) for v in torch.randint(-size, 2 * size + 1, (2,)))
        rows.append([top, left, h, w, int(torch.randint(0, 2, ())), down, right])
    return rows


def _torchvision(images, row, size):
    top, left, height, width, flip, down, right = row
    out = tv.resized_crop(images, top, left, height, width, [size, size], antialias=True)
    return torch.roll(tv.hflip(out) if flip else out, (down, right), (-2, -1))


@LAYOUTS
@pytest.mark.parametrize(("height", "width", "size"), SIZES)
def test_equals_torchvision(height, width, size, layout, device):
    images = torch.randn(2, 3, height, width, device=device).to(memory_format=layout)
    for rows in ([[0, 0, height, width, 1, 1, 0]], *(_random_rows(height, width, size, 1) for _ in range(2))):
        out = ops.crop_flip_roll(images, rows, [0, 2], size, backend="triton")
        expected = _torchvision(images.double(), rows[0], size)
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("height", "width", "size"), [(3, 4, 5), (5, 4, 3)])
def test_both_gates(height, width, size, dtype, layout, device):
    rows, segments = _random_rows(height, width, size, 3), [0, 1, 1, 2]
    images = torch.randn(2, 3, height, width, device=device).to(dtype).to(memory_format=layout)
    outputs, gradients = [], []
    for backend, given in (("triton", images), ("reference", images.double()), ("reference", images)):
        given = given.detach().requires_grad_()
        out = ops.crop_flip_roll(given, rows, segments, size, backend=backend)
        torch.manual_seed(7)
        g = torch.randn(out.shape).to(dtype).to(out)
        outputs.append(out)
        gradients.append(torch.autograd.grad(out, given, g)[0])
    check_output(*outputs, dtype)
    check_gradient(*gradients, dtype)
    assert outputs[0].dtype == gradients[0].dtype == dtype


@pytest.mark.parametrize("segments", [[0, 5], [0, 1, 2, 3, 4, 5], [0, 0, 2, 2, 5, 5]])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_each_segment_has_its_parameters(segments, as_tensor, device):
    images = torch.randn(5, 3, 3, 4, device=device)
    rows = _random_rows(3, 4, 5, len(segments) - 1)
    params, bounds = rows, segments
    if as_tensor:
        params = torch.tensor(rows, dtype=torch.int32, device=device)
        bounds = torch.tensor(segments, dtype=torch.int32, device=device)
    out = ops.crop_flip_roll(images, params, bounds, 5, backend="triton")
    for row, a, b in zip(rows, segments, segments[1:], strict=False):
        if a < b:
            torch.testing.assert_close(out[a:b], _torchvision(images[a:b], row, 5), rtol=0, atol=1e-5)


@pytest.fixture
def few_rows(monkeypatch):
    """On the CPU only these rows of large images are made, because the interpreter takes a program for each."""
    if torch.cuda.is_available():
        return lambda rows, size: list(range(size))
    from triton.runtime import interpreter

    def choose(rows, size):
        def chosen(*bounds):
            launching = sys._getframe(1).f_code is interpreter.GridExecutor.__call__.__code__
            return [r % size for r in rows] if launching and bounds == (size,) else range(*bounds)

        monkeypatch.setattr(interpreter, "range", chosen, raising=False)
        return [r % size for r in rows]

    return choose


@pytest.mark.parametrize(
    ("height", "width", "size"), [(32, 32, 448), (448, 448, 32), (224, 224, 200), (200, 200, 224), (447, 224, 448)]
)
def test_sizes_of_real_images(height, width, size, few_rows, device):
    """Rows of the view equal torchvision's, and rows of the adjoint the reference's own gradient."""
    images, y = torch.randn(1, 3, height, width, device=device), torch.randn(1, 3, size, size, device=device)
    rows = [[0, 0, height, width, 1, 5, -3]]
    if height > 32:
        rows.append([height // 5, width // 3, height // 2, width // 2 + 1, 0, size // 2, 31])
    for row in rows:
        seen = few_rows([3 * size // 7, -1], size)
        out = ops.crop_flip_roll(images, [row], [0, 1], size, backend="triton")
        expected = _torchvision(images.cpu(), row, size)  # where taps are rounded step by step
        torch.testing.assert_close(out[:, :, seen].cpu(), expected[:, :, seen], rtol=0, atol=1e-5)

        x = images.clone().requires_grad_()
        (expected,) = torch.autograd.grad(ops.crop_flip_roll(x, [row], [0, 1], size, backend="reference"), x, y)
        seen = few_rows([row[0] + row[2] // 2] if height == 32 else [row[0], row[0] + row[2] // 2, -1], height)
        params, segments = torch.tensor([row], device=device), torch.tensor([0, 1], device=device)
        adjoint = torch.ops.fd2fast.crop_flip_roll_adjoint(y, params, segments, height, width, False)
        largest = expected.abs().max().item()
        torch.testing.assert_close(adjoint[:, :, seen], expected[:, :, seen], rtol=0, atol=1e-5 * max(1, largest))


@pytest.mark.skipif(torch.cuda.is_available(), reason="float64 kernels run in the interpreter only")
@LAYOUTS
@pytest.mark.parametrize(("height", "width", "size"), [(3, 4, 5), (5, 4, 3)])
def test_adjoint_is_exact(height, width, size, layout):
    x = torch.randn(2, 3, height, width, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    for _ in range(2):
        rows = _random_rows(height, width, size, 2)
        out = ops.crop_flip_roll(x, rows, [0, 1, 2], size, backend="triton")
        y = torch.randn_like(out)
        (adjoint,) = torch.autograd.grad(out, x, y)
        torch.testing.assert_close((out * y).sum(), (x * adjoint).sum(), rtol=1e-12, atol=1e-12)
        reference = ops.crop_flip_roll(x, rows, [0, 1, 2], size, backend="reference")
        torch.testing.assert_close(out, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(torch.cuda.is_available(), reason="float64 kernels run in the interpreter only")
@pytest.mark.parametrize("size", [3, 1])
def test_gradcheck(size):
    x = torch.randn(1, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    row = [[0, 0, 2, 2, 1, 1, 1]]
    assert torch.autograd.gradcheck(lambda x: ops.crop_flip_roll(x, row, [0, 1], size, backend="triton"), (x,))


def test_strided_images_and_gradients(device):
    wide = torch.randn(2, 3, 4, 8, device=device, requires_grad=True)
    rows = _random_rows(4, 4, 5, 1)
    results = []
    for backend in ("triton", "reference"):
        out = ops.crop_flip_roll(wide[..., ::2], rows, [0, 2], 5, backend=backend)
        g = torch.ones(1, 1, 5, 5, device=device).expand(2, 3, 5, 5)
        results.append((out, torch.autograd.grad(out, wide, g)[0]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_channels_last_stays(device):
    images = torch.randn(2, 3, 4, 4, device=device).to(memory_format=LAST).requires_grad_()
    out = ops.crop_flip_roll(images, [[0, 0, 4, 4, 0, 0, 0]], [0, 2], 4, backend="triton")
    assert torch.equal(out, images)
    assert out.is_contiguous(memory_format=LAST)
    assert torch.autograd.grad(out.square().sum(), images)[0].is_contiguous(memory_format=LAST)


@pytest.mark.parametrize("layout", [LAST, FIRST])
def test_views_in_another_type_and_layout(layout, device):
    images = torch.randn(2, 3, 4, 4, device=device).requires_grad_()
    settings = [[0, 0, 3, 4, 0, 1, 0]], [0, 2], 5
    out = ops.crop_flip_roll(images, *settings, dtype=torch.bfloat16, memory_format=layout, backend="triton")
    assert torch.equal(out, ops.crop_flip_roll(images, *settings, backend="triton").to(torch.bfloat16))
    assert out.is_contiguous(memory_format=layout)
    assert torch.autograd.grad(out.sum(), images)[0].dtype == images.dtype


def test_no_images(device):
    images = torch.zeros(0, 3, 6, 6, device=device)
    assert ops.crop_flip_roll(images, [[0, 0, 6, 6, 0, 0, 0]], [0, 0], 4, backend="triton").shape == (0, 3, 4, 4)


@LAYOUTS
def test_torch_compile_takes_the_kernels_whole(layout, device):
    torch._dynamo.reset()
    params = torch.tensor([[0, 1, 3, 3, 1, 0, 1], [1, 1, 4, 2, 0, 2, 0]], device=device)
    segments = torch.tensor([0, 1, 3], device=device)

    def function(x):
        return ops.crop_flip_roll(x, params, segments, 6, backend="triton") * 2

    x = torch.randn(3, 3, 5, 4, device=device).to(memory_format=layout).requires_grad_()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected, actual = function(x), compiled(x)
    torch.testing.assert_close(actual, expected)
    g = torch.randn_like(expected)
    torch.testing.assert_close(torch.autograd.grad(actual, x, g), torch.autograd.grad(expected, x, g))


def test_operator_passes_torch_library_checks(device):
    x = torch.randn(3, 3, 5, 5, device=device, requires_grad=True)
    params = torch.tensor([[0, 1, 3, 3, 1, 0, 1], [1, 1, 4, 2, 0, 2, 0]], device=device)
    arguments = (x, params, torch.tensor([0, 1, 3], device=device), 6)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.fd2fast.crop_flip_roll.default, arguments, test_utils=tests)
