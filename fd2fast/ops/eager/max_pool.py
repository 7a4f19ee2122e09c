"""max_pool in torch's operations, keeping one byte for each output."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fd2fast.ops import _dispatch
from fd2fast.ops._layout import is_channels_last
from fd2fast.ops.eager import why_not


class _MaxPool(torch.autograd.Function):
    """Max pooling that keeps, for each output, the place of the maximum within its window (one byte)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil: bool) -> Tensor:
        y, indices = torch.ops.aten.max_pool2d_with_indices(x, kernel, stride, padding, dilation, ceil)
        ctx.settings = kernel, stride, padding, dilation, ceil
        ctx.shape, ctx.dense = tuple(x.shape), is_channels_last(x)
        width = x.shape[-1]
        down, right = _window_starts(y, stride, padding)
        row = torch.div(indices // width - down, dilation[0], rounding_mode="floor")
        column = torch.div(indices % width - right, dilation[1], rounding_mode="floor")
        ctx.save_for_backward((row * kernel[1] + column).to(torch.uint8))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (places,) = ctx.saved_tensors
        kernel, stride, padding, dilation, ceil = ctx.settings
        down, right = _window_starts(places, stride, padding)
        places = places.to(torch.int64)
        row = down + torch.div(places, kernel[1], rounding_mode="floor") * dilation[0]
        column = right + places % kernel[1] * dilation[1]
        order = torch.channels_last if ctx.dense else torch.contiguous_format
        shape_only = torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=order)
        found = torch.ops.aten.max_pool2d_with_indices_backward(
            grad, shape_only, kernel, stride, padding, dilation, ceil, row * ctx.shape[-1] + column
        )
        return found, *(None,) * 5


def _window_starts(y: Tensor, stride: Sequence[int], padding: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Input row [h, 1] and column [w] of each output's first window pixel (negative in the padding)."""
    down = torch.arange(y.shape[-2], device=y.device) * stride[0] - padding[0]
    right = torch.arange(y.shape[-1], device=y.device) * stride[1] - padding[1]
    return down[:, None], right


def _by_torch(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> Tensor:
    y: Tensor = _MaxPool.apply(x, kernel, stride, padding, dilation, ceil_mode)
    return y


_dispatch.register("max_pool", "eager", _by_torch, why_not)
