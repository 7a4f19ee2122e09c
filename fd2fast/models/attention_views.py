"""Attention crop and drop: which part of a training image its own attention maps say to enlarge, and which to hide (CAL)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

CROP_THETA = (0.4, 0.6)  # threshold of the crop, share of the map's maximum
DROP_THETA = (0.2, 0.5)  # threshold of the drop
PADDING = 0.1  # margin of the crop, share of the side


@torch.no_grad()
def crop_and_drop(attention: Tensor, draws: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Where to crop and what to drop: boxes (top, left, height, width) int64 [N, 4] and the kept pixels bool [N, 1, H, W].

    attention [N, M, h, w], post-ReLU; size (H, W) of the images. draws: uniform [0, 1) [N, 4] = (map of the crop, map of the
    drop, threshold of the crop, threshold of the drop).
    """
    draws = draws.to(attention.device, torch.float32)
    maps = choose_maps(attention.float(), draws[:, :2])
    crop_theta = CROP_THETA[0] + (CROP_THETA[1] - CROP_THETA[0]) * draws[:, 2]
    drop_theta = DROP_THETA[0] + (DROP_THETA[1] - DROP_THETA[0]) * draws[:, 3]
    boxes = crop_boxes(attended(maps[:, 0], crop_theta, size))
    return boxes, ~attended(maps[:, 1], drop_theta, size)[:, None]


def choose_maps(attention: Tensor, uniform: Tensor) -> Tensor:
    """[N, M, h, w] -> [N, D, h, w]: D maps of each image, drawn with replacement by the uniform numbers [N, D].

    Map m is drawn with probability proportional to sqrt(sum_hw A_m + 1e-6).
    """
    weights = (attention.sum((2, 3)) + 1e-6).sqrt().double()
    cumulative = weights.cumsum(1)
    target = uniform.double() * cumulative[:, -1:]
    chosen = (cumulative[:, None, :] <= target[:, :, None]).sum(2).clamp(max=attention.shape[1] - 1)
    return attention.gather(1, chosen[:, :, None, None].expand(-1, -1, *attention.shape[2:]))


def attended(maps: Tensor, theta: Tensor, size: tuple[int, int]) -> Tensor:
    """Where the map [N, h, w], enlarged to `size` (bilinear), reaches theta [N] times its maximum before: bool [N, H, W]."""
    large = F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
    return large >= (theta * maps.flatten(1).amax(1))[:, None, None]


def crop_boxes(mask: Tensor, padding: float = PADDING) -> Tensor:
    """Boxes (top, left, height, width) int64 [N, 4] around the true pixels of each mask [N, H, W].

    Rows max(int(first - padding H), 0) to min(int(last + padding H), H), end exclusive, columns alike; the whole image
    where the mask is empty.
    """
    height, width = mask.shape[1:]
    mask = mask | ~mask.flatten(1).any(1)[:, None, None]
    top, rows = _extent(mask.any(2), padding, height)
    left, columns = _extent(mask.any(1), padding, width)
    return torch.stack([top, left, rows, columns], 1)


def _extent(line: Tensor, padding: float, side: int) -> tuple[Tensor, Tensor]:
    at = torch.arange(side, device=line.device)
    first = torch.where(line, at, side).amin(1).double()
    last = torch.where(line, at, -1).amax(1).double()
    start = (first - padding * side).long().clamp(min=0)
    end = (last + padding * side).long().clamp(max=side)
    return start, (end - start).clamp(min=1)
