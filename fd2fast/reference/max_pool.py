"""Plain-torch specification of max pooling that tells where in its window each maximum lies."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def pooled_size(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> list[int]:
    """Height and width of the pooled map, as torch has them; all arguments by axis (height, width)."""
    sizes = []
    for side, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True):
        span = side + 2 * p - d * (k - 1) - 1
        found = (-(-span // s) if ceil_mode else span // s) + 1
        # with ceil_mode, a window that would start in the padding behind the map is left out
        sizes.append(found - 1 if ceil_mode and (found - 1) * s >= side + p else found)
    return sizes


def max_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[Tensor, Tensor]:
    """torch's max pooling of x [N, C, H, W]: y [N, C, h, w], and places uint8 [N, C, h, w].

    A place is row * kernel width + column, within the window, of the first maximum (of the last NaN, where there is one):
    y = x at row top + row * dilation, with top = output row * stride - padding, and columns alike. Windows of at most 256
    pixels. Differentiable in x.
    """
    k, s, p, d = (tuple(values) for values in (kernel, stride, padding, dilation))
    y, indices = F.max_pool2d(x, k, s, p, d, ceil_mode=ceil_mode, return_indices=True)
    down = torch.arange(y.shape[-2], device=x.device)[:, None] * stride[0] - padding[0]
    right = torch.arange(y.shape[-1], device=x.device) * stride[1] - padding[1]
    row = torch.div(torch.div(indices, x.shape[-1], rounding_mode="floor") - down, dilation[0], rounding_mode="floor")
    column = torch.div(indices % x.shape[-1] - right, dilation[1], rounding_mode="floor")
    return y, (row * kernel[1] + column).to(torch.uint8)
