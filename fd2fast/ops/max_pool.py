"""The operation max_pool: max pooling whose backward keeps one byte for each output."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fd2fast import reference
from fd2fast.ops import _checks, _dispatch
from fd2fast.reference.max_pool import pooled_size


def _small_images(x: Tensor, *window: Any) -> str | None:
    elements = x.shape[1:].numel()
    return f"an image of x has {elements} elements, 2^31 or more" if elements >= 1 << 31 else None


def _kernels() -> Any:
    return _dispatch.kernels("max_pool")


def _order(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _empty(x: Tensor, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(*x.shape[:2], *size, dtype=dtype, device=x.device, memory_format=_order(x))


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


def _by_reference(x: Tensor, *window: Any) -> Tensor:
    return reference.max_pool(x, *window)[0]


_dispatch.register_triton("max_pool", _by_triton, limits=_small_images)
_dispatch.register("max_pool", "reference", _by_reference)


def max_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    ceil_mode: bool = False,
    *,
    backend: str = "auto",
) -> Tensor:
    """torch's max pooling; see fd2fast.reference.max_pool.

    x: float [N, C, H, W]; kernel, stride, padding, dilation: two ints each (height, width). Returns [N, C, h, w] in x's type
    and memory order. Differentiable in x: the gradient of a window goes to its first maximum. Raises ValueError for shapes and
    types that do not fit, windows of more than 256 pixels, padding above half a kernel, and maps smaller than a window.
    """
    _checks.shape("x", x, ("N", "C", "H", "W"))
    _checks.floating("x", x)
    window = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    for name, values in window.items():
        if len(values) != 2 or min(values) < (0 if name == "padding" else 1):
            raise ValueError(f"{name} must be two ints of at least {0 if name == 'padding' else 1}, got {values}")
    if kernel[0] * kernel[1] > 256:
        raise ValueError(f"kernel must have at most 256 pixels, got {list(kernel)}")
    if any(p > k // 2 for p, k in zip(padding, kernel, strict=True)):
        raise ValueError(f"padding must be at most half the kernel {list(kernel)}, got {list(padding)}")
    size = pooled_size(x.shape[2:], kernel, stride, padding, dilation, ceil_mode)
    if min(size) < 1:
        raise ValueError(f"x must have room for a window of {list(kernel)}, got {list(x.shape)}")
    y: Tensor = _dispatch.run("max_pool", backend, x, kernel, stride, padding, dilation, ceil_mode)
    return y
