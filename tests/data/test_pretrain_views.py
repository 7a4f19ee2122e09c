"""Augmentation: each part equals torchvision's on fixed parameters, the random draws have its distribution."""

import pytest
import torch
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as tv

from fd2fast.data import pretrain_views as augment
from fd2fast.data.crops import random_resized_crops
from fd2fast.settings.config import PretrainConfig


def pictures(count: int, size: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("ours", "theirs", "factors"),
    [
        (augment.adjust_brightness, tv.adjust_brightness, (0.0, 0.7, 1.0, 1.3)),
        (augment.adjust_contrast, tv.adjust_contrast, (0.0, 0.7, 1.0, 1.3)),
        (augment.adjust_saturation, tv.adjust_saturation, (0.0, 0.7, 1.0, 1.3)),
        (augment.adjust_hue, tv.adjust_hue, (-0.5, -0.1, 0.0, 0.33)),
    ],
)
def test_colour_parts_equal_torchvision(ours, theirs, factors) -> None:
    images = pictures(len(factors))
    images[:, :, :4] = 0.5  # grey pixels have no hue
    images[:, :, 4:6] = images[:, :, 4:6].round()
    got = ours(images, torch.tensor(factors, dtype=torch.float64).view(-1, 1, 1, 1))
    for n, factor in enumerate(factors):
        torch.testing.assert_close(got[n], theirs(images[n], factor), atol=1e-6, rtol=0)


def test_colour_jitter_follows_each_samples_order_and_switches() -> None:
    images = pictures(3)
    factors = torch.tensor([[0.8, 1.2, 0.7, 0.1], [1.2, 0.9, 1.3, -0.1], [1.1, 1.1, 0.8, 0.05]], dtype=torch.float64)
    order = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]])
    parts = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    for active in ((True, True, True, True), (True, False, True, False)):
        got = augment.color_jitter(images, factors, order, active)
        for n in range(3):
            expected = images[n]
            for part in order[n].tolist():
                if active[part]:
                    expected = parts[part](expected, factors[n, part].item())
            torch.testing.assert_close(got[n], expected, atol=1e-6, rtol=0)


def test_rotation_equals_torchvision() -> None:
    degrees = [-14.0, -3.3, 0.0, 7.7, 90.0]
    images = pictures(len(degrees), 33)
    got = augment.rotate(images, torch.tensor(degrees))
    assert torch.equal(got[2], images[2])
    for n, angle in enumerate(degrees):
        expected = tv.rotate(images[n], angle)
        same = (got[n] == expected).all(0).double().mean()  # nearest: a tie may fall to either side
        assert same > 0.99, (angle, same)
    with pytest.raises(ValueError, match="square"):
        augment.rotate(torch.zeros(1, 3, 4, 5), torch.zeros(1))


def test_crop_equals_resized_crop() -> None:
    boxes = torch.tensor([[0, 0, 24, 24], [3, 5, 7, 11], [20, 2, 4, 22], [0, 23, 24, 1]])
    images = pictures(len(boxes))
    got = augment.crop_resize(images, boxes)
    for n, (top, left, height, width) in enumerate(boxes.tolist()):
        expected = tv.resized_crop(images[n], top, left, height, width, [24, 24], antialias=False)
        torch.testing.assert_close(got[n], expected, atol=1e-6, rtol=0)


def test_crop_boxes_have_torchvisions_distribution() -> None:
    count, size, scale, ratio = 4000, 32, (0.3, 1.0), (3 / 4, 4 / 3)
    draws = torch.rand(count, 22, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours = random_resized_crops(draws[:, 2:].unflatten(1, (-1, 2)), draws[:, :2], (size, size), scale, ratio).double()
    torch.manual_seed(0)
    image = torch.zeros(1, size, size)
    theirs = torch.tensor(
        [RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(count)]
    ).double()
    assert ours[:, 2:].min() >= 1
    assert (ours[:, :2] + ours[:, 2:]).max() <= size
    for column in range(4):
        error = ours[:, column].std() / count**0.5 * 2**0.5
        assert abs(ours[:, column].mean() - theirs[:, column].mean()) < 4 * error
        torch.testing.assert_close(ours[:, column].std(), theirs[:, column].std(), rtol=0.06, atol=0)
    impossible = torch.full((2, 20), 1.0, dtype=torch.float64)  # area of all, widest ratio: never fits
    whole = random_resized_crops(
        impossible.unflatten(1, (-1, 2)), torch.rand(2, 2).double(), (size, size), (1.0, 1.0), (2.0, 3.0)
    )
    assert whole.tolist() == [[8, 0, 16, 32]] * 2


def test_views_are_seeded_in_range_and_differ_per_sample() -> None:
    images = pictures(1).float().expand(16, 3, 24, 24)
    config = PretrainConfig(min_crop=0.5)
    one = augment.pretrain_views(images, config, torch.Generator().manual_seed(3))
    two = augment.pretrain_views(images, config, torch.Generator().manual_seed(3))
    other = augment.pretrain_views(images, config, torch.Generator().manual_seed(4))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert one.dtype == torch.float32
    assert 0 <= one.min() <= one.max() <= 1
    assert len({view.numpy().tobytes() for view in one}) == 16
    with pytest.raises(ValueError, match=r"float \[N, 3, S, S\]"):
        augment.pretrain_views(images.to(torch.uint8), config, torch.Generator())


def test_everything_off_is_the_identity_and_takes_the_same_draws() -> None:
    images = pictures(4)
    still = PretrainConfig(flip=0.0, color_jitter=(0.0, 0.0, 0.0, 0.0), rotation=0.0)
    first, second = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    assert torch.equal(augment.pretrain_views(images, still, first), images)
    augment.pretrain_views(images, PretrainConfig(min_crop=0.3), second)
    assert torch.equal(first.get_state(), second.get_state())


def test_flip_rate_and_jitter_ranges() -> None:
    images = torch.zeros(2000, 3, 8, 8)
    images[:, :, :, 0] = 0.5
    config = PretrainConfig(flip=0.3, color_jitter=(0.4, 0.0, 0.0, 0.0), rotation=0.0)
    views = augment.pretrain_views(images, config, torch.Generator().manual_seed(0))
    flipped = views[:, 0, 0, 7] > 0
    assert abs(flipped.float().mean() - 0.3) < 4 * (0.3 * 0.7 / 2000) ** 0.5
    factors = torch.where(flipped, views[:, 0, 0, 7], views[:, 0, 0, 0]) / 0.5
    assert 0.6 <= factors.min() < 0.61
    assert 1.39 < factors.max() <= 1.4
    assert abs(factors.mean() - 1) < 4 * 0.8 / 12**0.5 / 2000**0.5
