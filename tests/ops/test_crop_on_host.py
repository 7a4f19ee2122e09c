"""The C++ kernels behind crop_flip_roll on the CPU against the fp64 reference: both gates, layouts, segments, threads."""

import pytest
import torch

from bench.numerics import check_gradient, check_output
from fd2fast import ops
from fd2fast.ops.cpu import crop_flip_roll as augment

LAST, FIRST = torch.channels_last, torch.contiguous_format
SIZES = [(5, 6, 6), (3, 4, 7), (1, 2, 3), (2, 9, 9), (33, 31, 48), (24, 24, 24)]


@pytest.fixture(autouse=True)
def _built() -> None:
    if augment.WHY_NOT:
        pytest.fail(f"{augment.WHY_NOT}; install the package again")


def rows_for(height: int, width: int, size: int, count: int) -> list[list[int]]:
    rows = []
    for _ in range(count):
        h, w = (int(torch.randint(1, n + 1, ())) for n in (height, width))
        top, left = int(torch.randint(0, height - h + 1, ())), int(torch.randint(0, width - w + 1, ()))
        down, right = (int(v) for v in torch.randint(-size, 2 * size + 1, (2,)))
        rows.append([top, left, h, w, int(torch.randint(0, 2, ())), down, right])
    return rows


@pytest.mark.parametrize("layouts", [(FIRST, FIRST), (LAST, LAST), (FIRST, LAST), (LAST, FIRST)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("height", "width", "size"), SIZES)
def test_both_gates(height, width, size, dtype, layouts, monkeypatch):
    """Several segments, one of them empty; the view's gradient in a layout of its own."""
    calls = []
    apply = augment._OnHost.apply
    monkeypatch.setattr(augment._OnHost, "apply", lambda *args: calls.append(1) or apply(*args))
    segments = [0, 1, 1, 4]
    for rows in (rows_for(height, width, size, 3), [[0, 0, height, width, 1, 1, -2]] * 3):
        images = torch.randn(4, 3, height, width).to(dtype).to(memory_format=layouts[0])
        weights = torch.randn(4, 3, size, size).to(dtype).to(memory_format=layouts[1])
        outputs, gradients = [], []
        for backend, given in (("cpu", images), ("reference", images.double()), ("reference", images)):
            given = given.detach().requires_grad_()
            out = ops.crop_flip_roll(given, rows, segments, size, backend=backend)
            outputs.append(out)
            gradients.append(torch.autograd.grad(out, given, weights.to(out.dtype))[0])
        check_output(*outputs, dtype)
        check_gradient(*gradients, dtype)
        assert outputs[0].dtype == gradients[0].dtype == dtype
        assert outputs[0].is_contiguous(memory_format=layouts[0])
        assert gradients[0].is_contiguous(memory_format=layouts[0])
    assert len(calls) == 2


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 9])
def test_any_number_of_channels(channels):
    images, rows = torch.randn(3, channels, 12, 10), rows_for(12, 10, 13, 2)
    weights, results = torch.randn(3, channels, 13, 13), []
    for backend in ("cpu", "reference"):
        given = images.clone().requires_grad_()
        out = ops.crop_flip_roll(given, rows, [0, 1, 3], 13, backend=backend)
        results.append((out, torch.autograd.grad(out, given, weights)[0]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("layout", [LAST, FIRST, None])
@pytest.mark.parametrize(("given", "dtype"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", "float64")])
def test_views_in_another_type_and_layout_are_those_converted(given, dtype, layout, backend):
    images, dtype = torch.randn(3, 3, 12, 10).to(getattr(torch, given)), getattr(torch, dtype)
    weights, rows = torch.randn(3, 3, 13, 13).to(dtype), rows_for(12, 10, 13, 2)
    at_once, after = images.clone().requires_grad_(), images.clone().requires_grad_()
    views = ops.crop_flip_roll(at_once, rows, [0, 1, 3], 13, dtype=dtype, memory_format=layout, backend=backend)
    fine = ops.crop_flip_roll(after.float(), rows, [0, 1, 3], 13, backend=backend)
    assert views.dtype == dtype
    assert views.is_contiguous(memory_format=layout or FIRST)
    if backend == "auto" and dtype != torch.float64:  # that is the reference's
        assert torch.equal(views, fine.to(dtype))
    tolerance = 1e-5 if dtype == torch.float64 else 1e-2
    torch.testing.assert_close(views, fine.to(dtype), rtol=tolerance, atol=tolerance)
    gradients = [
        torch.autograd.grad(out, leaf, g)[0]
        for out, leaf, g in ((views, at_once, weights), (fine, after, weights.to(fine.dtype)))
    ]
    assert gradients[0].dtype == images.dtype
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)


def test_the_adjoint_is_the_adjoint():
    """<y, A x> = <A' y, x>, also for a gradient without a memory of its own."""
    rows, segments = rows_for(20, 30, 32, 2), [0, 2, 3]
    x, y = torch.randn(3, 3, 20, 30, requires_grad=True), torch.randn(3, 3, 32, 32)
    view = ops.crop_flip_roll(x, rows, segments, 32)
    (grad,) = torch.autograd.grad(view, x, y, retain_graph=True)
    torch.testing.assert_close(
        (y.double() * view.double()).sum(), (grad.double() * x.double()).sum(), rtol=1e-5, atol=1e-4
    )
    (ones,) = torch.autograd.grad(view.sum(), x)
    (wanted,) = torch.autograd.grad(ops.crop_flip_roll(x, rows, segments, 32), x, torch.ones_like(y))
    assert torch.equal(ones, wanted)


def test_threads_do_not_change_the_bytes():
    x, rows = torch.randn(5, 3, 40, 40, requires_grad=True), rows_for(40, 40, 40, 2)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            view = ops.crop_flip_roll(x, rows, [0, 2, 5], 40)
            found.append((view, torch.autograd.grad(view.square().sum(), x)[0]))
    finally:
        torch.set_num_threads(before)
    for view, grad in found[1:]:
        assert torch.equal(view, found[0][0])
        assert torch.equal(grad, found[0][1])


@pytest.mark.parametrize(
    ("images", "row", "segments", "reason"),
    [
        (torch.randn(2, 3, 9, 9, dtype=torch.float64), [0, 0, 4, 4, 0, 0, 0], (0, 2), "torch.float64"),
        (torch.randn(2, 3, 9, 9), [0, 0, 9, 4, 0, 0, 0], (0, 2), "larger than its view"),
    ],
)
def test_the_rest_is_left_to_the_reference(images, row, segments, reason, monkeypatch):
    monkeypatch.setattr(augment._OnHost, "apply", None)
    out = ops.crop_flip_roll(images, [row], segments, 8)
    assert torch.equal(out, ops.crop_flip_roll(images, [row], segments, 8, backend="reference"))
    with pytest.raises(ValueError, match=f"crop_flip_roll: backend cpu was asked for, but .*{reason}"):
        ops.crop_flip_roll(images, [row], segments, 8, backend="cpu")


def test_crops_are_checked_where_nothing_else_does():
    images, out = torch.randn(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)
    for row in ([1, 0, 8, 8, 0, 0, 0], [0, -1, 8, 8, 0, 0, 0], [0, 0, 0, 8, 0, 0, 0]):
        with pytest.raises(ValueError, match="crop 0 must lie inside the image"):
            augment._native.forward(
                False, False, [0, 1], [row], *augment._described(images), *augment._described(out), 1
            )
    assert not out.any()
