"""The shared crop, resize, flip and roll against torchvision, its adjoint, and its gradient."""

import pytest
import torch
import torchvision.transforms.v2.functional as tv

from fd2fast.reference import crop_flip_roll


def _torchvision(images, row, size):
    top, left, height, width, flip, down, right = row
    out = tv.resized_crop(images, top, left, height, width, [size, size], antialias=True)
    return torch.roll(tv.hflip(out) if flip else out, (down, right), (-2, -1))


def _random_row(height, width, shift):
    h, w = (int(torch.randint(1, n + 1, ())) for n in (height, width))
    top, left = int(torch.randint(0, height - h + 1, ())), int(torch.randint(0, width - w + 1, ()))
    return [top, left, h, w, *(int(torch.randint(0, n, ())) for n in (2, shift, shift))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("height", "width", "size"), [(32, 32, 32), (57, 64, 48), (64, 57, 80), (31, 64, 7), (5, 3, 16), (1, 1, 3)]
)
def test_equals_torchvision(height, width, size, dtype):
    images = torch.randn(2, 3, height, width, dtype=dtype)
    for _ in range(15):
        row = _random_row(height, width, 2 * size)
        out = crop_flip_roll(images, [row], [0, 2], size)
        expected = _torchvision(images, row, size)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12)


def test_equals_torchvision_at_224():
    images = torch.randn(1, 3, 224, 224)
    for row in ([0, 0, 224, 224, 0, 0, 0], [13, 40, 150, 141, 1, 31, 5], [100, 3, 65, 86, 0, 16, 32]):
        torch.testing.assert_close(
            crop_flip_roll(images, [row], [0, 1], 224), _torchvision(images, row, 224), rtol=0, atol=1e-5
        )


def test_whole_image_is_unchanged():
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(crop_flip_roll(images, [[0, 0, 8, 8, 0, 0, 0]], [0, 2], 8), images)


def test_by_hand():
    # one row 1 2 3 4: crop columns 1-3 (2 3 4), flip (4 3 2), roll right by 1 (2 4 3)
    image = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4).expand(1, 1, 3, 4)
    out = crop_flip_roll(image, [[0, 1, 3, 3, 1, 0, 1]], [0, 1], 3)
    assert out[0, 0, 0].tolist() == [2, 4, 3]


@pytest.mark.parametrize("segments", [[0, 1, 2, 3, 4, 5], [0, 2, 2, 5], [0, 4, 5], [0, 5]])
def test_each_segment_has_its_parameters(segments):
    images = torch.randn(5, 3, 9, 12, dtype=torch.float64)
    rows = [_random_row(9, 12, 10) for _ in segments[1:]]
    out = crop_flip_roll(images, torch.tensor(rows), torch.tensor(segments), 10)
    for row, a, b in zip(rows, segments, segments[1:], strict=False):
        if a < b:
            torch.testing.assert_close(out[a:b], _torchvision(images[a:b], row, 10))


@pytest.mark.parametrize("size", [5, 11])
def test_adjoint(size):
    x = torch.randn(3, 3, 8, 7, dtype=torch.float64, requires_grad=True)
    rows = [_random_row(8, 7, 6), _random_row(8, 7, 6)]
    out = crop_flip_roll(x, rows, [0, 1, 3], size)
    y = torch.randn_like(out)
    (adjoint,) = torch.autograd.grad(out, x, y)
    torch.testing.assert_close((out * y).sum(), (x * adjoint).sum())
    assert torch.autograd.gradcheck(lambda x: crop_flip_roll(x, rows, [0, 1, 3], size), (x,))


def test_any_layout_and_type():
    images = torch.randn(2, 3, 16, 16)
    row = [[1, 2, 9, 11, 1, 3, 4]]
    expected = crop_flip_roll(images, row, [0, 2], 16)
    last = crop_flip_roll(images.to(memory_format=torch.channels_last), row, [0, 2], 16)
    torch.testing.assert_close(last, expected)
    half = crop_flip_roll(images.half(), row, [0, 2], 16)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), expected, rtol=2e-3, atol=2e-3)
