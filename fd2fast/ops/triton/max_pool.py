"""max_pool by Triton's kernels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fd2fast.ops import _dispatch
from fd2fast.ops._layout import layout_of
from fd2fast.reference.max_pool import pooled_size


def _small_images(x: Tensor, *window: Any) -> str | None:
    elements = x.shape[1:].numel()
    return f"an image of x has {elements} elements, 2^31 or more" if elements >= 1 << 31 else None


def _kernels() -> Any:
    return _dispatch.kernels("max_pool")


def _empty(x: Tensor, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(*x.shape[:2], *size, dtype=dtype, device=x.device, memory_format=layout_of(x))


@torch.library.custom_op("fd2fast::max_pool", mutates_args=())
def _pool(
    x: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], size: list[int]
) -> tuple[Tensor, Tensor]:
    """y, and for the backward the places of the maxima in their windows."""
    y, places = _empty(x, size, x.dtype), _empty(x, size, torch.uint8)
    _kernels().max_pool_fwd(x, kernel, stride, padding, dilation, y, places)
    return y, places


@_pool.register_fake
def _(x, kernel, stride, padding, dilation, size):
    return _empty(x, size, x.dtype), _empty(x, size, torch.uint8)


@torch.library.custom_op("fd2fast::max_pool_backward", mutates_args=())
def _pool_backward(
    grad: Tensor,
    places: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    size: list[int],
) -> Tensor:
    grad_x = _empty(places, size, grad.dtype)
    _kernels().max_pool_bwd(grad, places, kernel, stride, padding, dilation, grad_x)
    return grad_x


@_pool_backward.register_fake
def _(grad, places, kernel, stride, padding, dilation, size):
    return _empty(places, size, grad.dtype)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, *window, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])
    ctx.window, ctx.size = window, list(x.shape[2:])


def _gradient(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple:
    if grad is None:
        return (None,) * 6
    return _pool_backward(grad, *ctx.saved_tensors, *ctx.window, ctx.size), None, None, None, None, None


_pool.register_autograd(_gradient, setup_context=_save)


def _by_triton(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> Tensor:
    window = kernel, stride, padding, dilation
    size = pooled_size(x.shape[2:], *window, ceil_mode)
    return _pool(x, *(list(values) for values in window), size)[0]


_dispatch.register_triton("max_pool", _by_triton, limits=_small_images)
