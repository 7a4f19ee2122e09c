"""Training views of real images: per-sample crop, flip, colour jitter and rotation, vectorised over the batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fd2fast.data.crops import TRIES, random_resized_crops
from fd2fast.settings.config import PretrainConfig

GREY = (0.2989, 0.587, 0.114)


def pretrain_views(images: torch.Tensor, config: PretrainConfig, generator: torch.Generator) -> torch.Tensor:
    """One random view of each image: [N, 3, S, S] in [0, 1] to the same, on the images' device.

    Order and distributions as torchvision's RandomResizedCrop (only if config.min_crop < 1), RandomHorizontalFlip,
    ColorJitter (its four parts in random order, sample by sample) and RandomRotation (nearest, fill 0). All draws come from
    `generator` (CPU), as many for every batch of N images, whatever the settings' values.
    """
    if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"images must be float [N, 3, S, S], got {images.dtype} {list(images.shape)}")
    count, device = len(images), images.device
    draws = torch.rand(count, 8 + 2 * TRIES, generator=generator, dtype=torch.float64)
    order = torch.rand(count, 4, generator=generator).argsort(1)
    if config.min_crop < 1:
        boxes = random_resized_crops(
            draws[:, 8:].unflatten(1, (-1, 2)), draws[:, 6:8], images.shape[-2:], (config.min_crop, 1.0)
        )
        images = crop_resize(images, boxes)
    if config.flip > 0:
        flipped = (draws[:, 0] < config.flip).to(device).view(-1, 1, 1, 1)
        images = torch.where(flipped, images.flip(-1), images)
    if any(config.color_jitter):
        b, c, s, h = config.color_jitter
        factors = torch.stack([_spread(draws[:, 1 + i], v) for i, v in enumerate((b, c, s))], 1)
        hue = (draws[:, 4] * 2 - 1) * h
        images = color_jitter(images, torch.cat([factors, hue[:, None]], 1), order, active=(b > 0, c > 0, s > 0, h > 0))
    if config.rotation > 0:
        images = rotate(images, (draws[:, 5] * 2 - 1) * config.rotation)
    return images


def _spread(uniform: torch.Tensor, amount: float) -> torch.Tensor:
    low = max(0.0, 1 - amount)
    return low + uniform * (1 + amount - low)


def crop_resize(images: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Each image's box (top, left, height, width) enlarged to the whole image, bilinear: equals resized_crop."""
    count, _, height, width = images.shape
    boxes = boxes.to(images.device, images.dtype)

    def axis(start: torch.Tensor, extent: torch.Tensor, full: int) -> torch.Tensor:  # source pixel, [N, full]
        centre = torch.arange(full, device=images.device, dtype=images.dtype) + 0.5
        inside = (centre * (extent[:, None] / full) - 0.5).clamp(min=0)
        return start[:, None] + torch.minimum(inside, extent[:, None] - 1)

    y = (axis(boxes[:, 0], boxes[:, 2], height) * 2 + 1) / height - 1
    x = (axis(boxes[:, 1], boxes[:, 3], width) * 2 + 1) / width - 1
    where = torch.stack(
        [x[:, None, :].expand(count, height, width), y[:, :, None].expand(count, height, width)], -1
    )  # [N, H, W, 2]
    return F.grid_sample(images, where, mode="bilinear", padding_mode="border", align_corners=False)


def rotate(images: torch.Tensor, degrees: torch.Tensor) -> torch.Tensor:
    """Turn square images [N, 3, S, S] counter-clockwise by degrees [N] about the centre; nearest, outside is 0."""
    if images.shape[-1] != images.shape[-2]:
        raise ValueError(f"images must be square, got {list(images.shape)}")
    angle = torch.deg2rad(degrees.double())
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    theta = torch.stack([torch.stack([cos, -sin, zero], -1), torch.stack([sin, cos, zero], -1)], 1)
    where = F.affine_grid(theta.to(images.device, images.dtype), list(images.shape), align_corners=False)
    return F.grid_sample(images, where, mode="nearest", padding_mode="zeros", align_corners=False)


def color_jitter(
    images: torch.Tensor,
    factors: torch.Tensor,
    order: torch.Tensor,
    active: tuple[bool, bool, bool, bool] = (True, True, True, True),
) -> torch.Tensor:
    """Brightness, contrast, saturation and hue of each image; factors [N, 4], order [N, 4] holds 0..3 in each row."""
    parts = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
    factors = factors.to(images.device, images.dtype)
    result = images.clone()
    for position in range(4):
        for which in range(4):
            rows = (order[:, position] == which).nonzero()[:, 0].to(images.device)
            if active[which] and len(rows):
                result[rows] = parts[which](result[rows], factors[rows, which].view(-1, 1, 1, 1))
    return result


def _grey(images: torch.Tensor) -> torch.Tensor:
    return (images * images.new_tensor(GREY).view(3, 1, 1)).sum(1, keepdim=True)


def adjust_brightness(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """factor * x, clamped; factor [N, 1, 1, 1]."""
    return (images * factor).clamp(0, 1)


def adjust_contrast(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """factor * x + (1 - factor) * mean grey of the image, clamped."""
    return (images * factor + (1 - factor) * _grey(images).mean((1, 2, 3), keepdim=True)).clamp(0, 1)


def adjust_saturation(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """factor * x + (1 - factor) * grey of the pixel, clamped."""
    return (images * factor + (1 - factor) * _grey(images)).clamp(0, 1)


def adjust_hue(images: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Hue turned by `shift` (in circles, [-0.5, 0.5]); saturation and value of HSV stay."""
    value, top = images.max(1, keepdim=True)
    chroma = value - images.amin(1, keepdim=True)
    safe = torch.where(chroma > 0, chroma, torch.ones_like(chroma))
    red, green, blue = images.split(1, 1)
    hue = torch.where(
        top == 0, (green - blue) / safe, torch.where(top == 1, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    )  # in sixths of a circle
    hue = hue + 6 * shift
    sixth = torch.cat([hue + 5, hue + 3, hue + 1], 1) % 6
    return value - chroma * torch.minimum(sixth, 4 - sixth).clamp(0, 1)
