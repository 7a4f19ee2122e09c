"""max_pool by the C++ kernels, keeping one byte for each output."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fd2fast.ops import _dispatch
from fd2fast.ops.cpu import native
from fd2fast.reference.max_pool import pooled_size

# kernel, stride, padding, dilation
Window = tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int]]


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, window: Window, ceil_mode: bool) -> Tensor:
        y, places = native.max_pool_forward(x, window, pooled_size(x.shape[2:], *window, ceil_mode))
        ctx.save_for_backward(places)
        ctx.window, ctx.shape = window, tuple(x.shape)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        _dispatch.only_once()
        (places,) = ctx.saved_tensors
        return native.max_pool_backward(grad, places, ctx.window, ctx.shape), None, None


def _by_cpu(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> Tensor:
    y: Tensor = _MaxPool.apply(x, (kernel, stride, padding, dilation), ceil_mode)
    return y


def _off_cpu(x: Tensor, *window: Any) -> str | None:
    return native.why_not(x)


_dispatch.register("max_pool", "cpu", _by_cpu, _off_cpu, native.missing)
