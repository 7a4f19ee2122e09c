"""crop_flip_roll by Triton's kernels."""

from typing import Any

import torch
from torch import Tensor

from fd2fast.ops import _dispatch
from fd2fast.ops._layout import converted, is_channels_last
from fd2fast.reference._offsets import Offsets, device_offsets


def _new(like: Tensor, height: int, width: int, last: bool) -> Tensor:
    layout = torch.channels_last if last else torch.contiguous_format
    shape = (*like.shape[:2], height, width)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


@torch.library.custom_op("fd2fast::crop_flip_roll", mutates_args=())
def _crop(images: Tensor, params: Tensor, segments: Tensor, size: int) -> Tensor:
    out = _new(images, size, size, is_channels_last(images))
    return _dispatch.kernels("crop_flip_roll").crop_fwd(images, params, segments, out)


@_crop.register_fake
def _(images, params, segments, size):
    return _new(images, size, size, is_channels_last(images))


@torch.library.custom_op("fd2fast::crop_flip_roll_adjoint", mutates_args=())
def _adjoint(grad: Tensor, params: Tensor, segments: Tensor, height: int, width: int, last: bool) -> Tensor:
    out = _new(grad, height, width, last)
    return _dispatch.kernels("crop_flip_roll").crop_bwd(grad, params, segments, out)


@_adjoint.register_fake
def _(grad, params, segments, height, width, last):
    return _new(grad, height, width, last)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    images, params, segments, _ = inputs
    ctx.save_for_backward(params, segments)
    ctx.size, ctx.last = images.shape[2:], is_channels_last(images)


def _gradient(ctx: Any, grad: Tensor) -> tuple:
    return _adjoint(grad, *ctx.saved_tensors, *ctx.size, ctx.last), None, None, None


_crop.register_autograd(_gradient, setup_context=_save)


def _by_triton(
    images: Tensor,
    params: Tensor,
    segments: Offsets,
    size: int,
    dtype: torch.dtype | None,
    memory_format: torch.memory_format | None,
) -> Tensor:
    params = params.to(images.device, non_blocking=True).contiguous()
    return converted(_crop(images, params, device_offsets(segments, images.device), size), dtype, memory_format)


_dispatch.register_triton("crop_flip_roll", _by_triton)
