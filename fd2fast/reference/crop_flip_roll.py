"""Plain-torch specification of the shared crop, resize, flip and roll of each segment."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fd2fast.reference._offsets import (
    Offsets,
    accumulation_dtype,
    device_offsets,
    equal_length,
    host_offsets,
    row_owner,
)


def _axis_matrix(
    first: Tensor, length: Tensor, flip: Tensor, roll: Tensor, size: int, extent: int, dtype: torch.dtype
) -> Tensor:
    """[S, size, extent]: antialiased bilinear weights from one image axis to one output axis, per segment.

    first, length: the crop along this axis; flip: 0 or 1; roll: forward shift of the output. All int64 [S].
    """
    device = first.device
    source = (torch.arange(size, device=device) - roll[:, None]) % size  # [S, size]: before the roll
    source = torch.where(flip[:, None] != 0, size - 1 - source, source)  # and before the flip
    scale = (length.to(dtype) / size)[:, None]  # [S, 1]; rounded in the same places as torch's own resize
    centre = ((source + 0.5) * scale)[:, :, None]  # in crop pixels
    pixel = torch.arange(extent, device=device) - first[:, None]  # [S, extent], crop coordinates
    inside = (pixel >= 0) & (pixel < length[:, None])
    # the triangle filter; its support grows with the scale when the crop is larger than the output
    distance = ((pixel + 0.5)[:, None, :] - centre).abs() / scale[:, :, None].clamp_min(1.0)
    weight = (1.0 - distance).clamp_min(0.0) * inside[:, None, :]
    return weight / weight.sum(dim=2, keepdim=True)


def crop_flip_roll(images: Tensor, params: Tensor | Sequence[Sequence[int]], segments: Offsets, size: int) -> Tensor:
    """Crop, resize to size x size, flip horizontally and roll; one set of parameters per segment.

    images: [N, C, h, w]; params: int [S, 7] rows (top, left, height, width, flip, roll_down, roll_right);
    segments: int row offsets [S+1] from 0 to N. Returns [N, C, size, size] in the images' type. Equals
    torchvision's resized_crop (bilinear, antialias=True), hflip where flip is 1, torch.roll by (roll_down,
    roll_right).

    Each image is Wy X Wx^T with one interpolation matrix per axis and segment, rows permuted by flip and
    roll: W[o, i] = t((i + .5 - first) - scale (p(o) + .5)) / sum, t the triangle of half-width max(scale, 1),
    scale = length / size. The adjoint is Wy^T Y Wx.
    """
    dtype = accumulation_dtype(images)
    rows, channels, height, width = images.shape
    p = torch.as_tensor(params, device=images.device).long()
    none = torch.zeros_like(p[:, 4])
    down = _axis_matrix(p[:, 0], p[:, 2], none, p[:, 5], size, height, dtype)  # [S, size, h]
    right = _axis_matrix(p[:, 1], p[:, 3], p[:, 4], p[:, 6], size, width, dtype)  # [S, size, w]
    length = equal_length(host_offsets(segments))
    if length is None:
        owner = row_owner(device_offsets(segments, images.device), rows)
        down, right, length = down.index_select(0, owner), right.index_select(0, owner), 1
    batches = down.shape[0]
    lines = images.to(dtype).reshape(batches, length * channels * height, width)
    wide = torch.bmm(lines, right.transpose(1, 2))  # [S, L*C*h, size]
    columns = wide.view(batches, length * channels, height, size).transpose(2, 3)
    tall = torch.bmm(columns.reshape(batches, -1, height), down.transpose(1, 2))  # [S, L*C*size, size]
    out = tall.view(rows, channels, size, size).transpose(2, 3)
    return out.contiguous().to(images.dtype)
