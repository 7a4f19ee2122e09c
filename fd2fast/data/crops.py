"""Random resized crops from uniform draws, many at once; those of the optimised images are the planner's, counter by counter."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Tries of a crop, and its aspect ratios (torchvision's).
TRIES = 10
RATIO = (3 / 4, 4 / 3)


def random_resized_crops(
    tries: Tensor,
    corner: Tensor,
    shape: Sequence[int],
    scale: tuple[float, float],
    ratio: tuple[float, float] = RATIO,
) -> Tensor:
    """Boxes int64 [N, 4] = (top, left, height, width) as torchvision's RandomResizedCrop draws them.

    tries: floats [N, T, 2] in [0, 1): of T attempts the area share, within `scale`, and the logarithm of the aspect ratio, within
    `ratio`; sides are rounded. The first attempt that fits the image of `shape` (height, width) is taken, and where none does the
    largest centred box of an allowed ratio. corner: [N, 2], where the box lies (down, right), or [N, T, 2], for each attempt.
    """
    height, width = int(shape[0]), int(shape[1])
    area = height * width * (scale[0] + tries[..., 0] * (scale[1] - scale[0]))
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    aspect = torch.exp(log_low + tries[..., 1] * (log_high - log_low))
    w = torch.sqrt(area * aspect).round().long()
    h = torch.sqrt(area / aspect).round().long()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(1, keepdim=True)
    w, h, any_fits = w.gather(1, first)[:, 0], h.gather(1, first)[:, 0], fits.any(1)
    if corner.ndim == 3:
        corner = corner.gather(1, first[..., None].expand(-1, -1, 2))[:, 0]
    fallback = torch.tensor(largest_centred(height, width, ratio))
    h, w = torch.where(any_fits, h, fallback[2]), torch.where(any_fits, w, fallback[3])
    top = (corner[:, 0] * (height - h + 1)).floor().long()
    left = (corner[:, 1] * (width - w + 1)).floor().long()
    return torch.where(any_fits[:, None], torch.stack([top, left, h, w], 1), fallback)


def largest_centred(height: int, width: int, ratio: tuple[float, float]) -> list[int]:
    """(top, left, height, width) of the largest centred box of an allowed aspect ratio."""
    whole = width / height
    h = round(width / ratio[0]) if whole < ratio[0] else height
    w = round(height * ratio[1]) if whole > ratio[1] else width
    return [(height - h) // 2, (width - w) // 2, h, w]
