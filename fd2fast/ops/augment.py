"""The operation crop_flip_roll: shared crop, resize, flip and roll of each segment."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch  # before _crop, so that both share one OpenMP runtime
from torch import Tensor

from fd2fast import reference
from fd2fast.ops import _checks, _dispatch
from fd2fast.reference._offsets import Offsets, device_offsets

_native: ModuleType | None
try:
    from fd2fast import _crop as _native
except ImportError as error:
    _native, WHY_NOT = None, f"the C++ kernels are not built: {error}"
else:
    WHY_NOT = ""

_dispatch.register("crop_flip_roll", "fd2fast.kernels.augment")


def _new(like: Tensor, height: int, width: int, last: bool) -> Tensor:
    layout = torch.channels_last if last else torch.contiguous_format
    shape = (*like.shape[:2], height, width)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def _is_last(images: Tensor) -> bool:
    return images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()


def _layout(images: Tensor) -> torch.memory_format:
    return torch.channels_last if _is_last(images) else torch.contiguous_format


@torch.library.custom_op("fd2fast::crop_flip_roll", mutates_args=())
def _crop(images: Tensor, params: Tensor, segments: Tensor, size: int) -> Tensor:
    out = _new(images, size, size, _is_last(images))
    return _dispatch.kernels("crop_flip_roll").crop_fwd(images, params, segments, out)


@_crop.register_fake
def _(images, params, segments, size):
    return _new(images, size, size, _is_last(images))


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
    ctx.size, ctx.last = images.shape[2:], _is_last(images)


def _gradient(ctx: Any, grad: Tensor) -> tuple:
    return _adjoint(grad, *ctx.saved_tensors, *ctx.size, ctx.last), None, None, None


_crop.register_autograd(_gradient, setup_context=_save)


class _OnHost(torch.autograd.Function):
    """The C++ kernels: fp32 or bf16 on the CPU, crops that are not larger than the view.

    Measured on an EPYC with AVX-512, 10 images of 224 x 224 in fp32, forward and backward, one thread: 37 ms by the
    reference's products, 14 ms by slices and F.interpolate, 5 ms here. Writing the
    views as the network reads them: 20 images of 64 x 64, bf16 channels_last, 0.26 and 0.33 ms, converted after 0.62 and 0.48.
    """

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        rows: list[list[int]],
        segments: tuple[int, ...],
        size: int,
        dtype: torch.dtype,
        layout: torch.memory_format,
    ) -> Tensor:
        assert _native is not None
        ctx.settings = images.dtype == torch.bfloat16, dtype == torch.bfloat16, segments, rows
        ctx.like = images.shape, images.dtype, _layout(images)
        out = torch.empty((*images.shape[:2], size, size), dtype=dtype, memory_format=layout)
        _native.forward(*ctx.settings, *_described(images), *_described(out), torch.get_num_threads())
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        assert _native is not None
        shape, dtype, layout = ctx.like
        out = torch.empty(shape, dtype=dtype, memory_format=layout)
        _native.backward(*ctx.settings, *_described(grad), *_described(out), torch.get_num_threads())
        return out, None, None, None, None, None


def _described(tensor: Tensor) -> tuple[Sequence[int], Sequence[int], int]:
    return tensor.shape, tensor.stride(), tensor.data_ptr()


def _host_rows(
    images: Tensor, params: Tensor, segments: Offsets, size: int, dtype: torch.dtype | None
) -> list[list[int]] | None:
    """The parameters for the C++ kernels, or None where those do not apply."""
    on_host = images.device.type == params.device.type == "cpu" and type(images) is Tensor
    if _native is None or torch.compiler.is_compiling() or not on_host or isinstance(segments, Tensor):
        return None
    types = {images.dtype, images.dtype if dtype is None else dtype}
    if not types <= {torch.float32, torch.bfloat16} or images.numel() == 0:
        return None
    rows = params.tolist()
    return rows if all(row[2] <= size and row[3] <= size for row in rows) else None


def crop_flip_roll(
    images: Tensor,
    params: Tensor | Sequence[Sequence[int]],
    segments: Offsets,
    size: int,
    *,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    backend: str = "auto",
) -> Tensor:
    """Crop, antialiased bilinear resize, horizontal flip and roll; see fd2fast.reference.crop_flip_roll.

    images: float [N, C, h, w]; params: int [S, 7] rows (top, left, height, width, flip, roll_down,
    roll_right); segments: int row offsets [S+1] (tensor, list or tuple) from 0 to N; size: pixels. Returns
    [N, C, size, size] in `dtype` and `memory_format` (None: those of the images). Differentiable in images.
    Raises ValueError for shapes, types, devices or offsets that do not fit, and for a crop that leaves the image
    (on a GPU only with FD2FAST_CHECK_VALUES=1). On the CPU "auto" takes C++ kernels where the crops only upsample.
    """
    _checks.shape("images", images, ("N", "C", "h", "w"))
    _checks.floating("images", images)
    segments = _checks.offsets("segments", segments, images.shape[0], "the rows of images")
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"size must be an int >= 1, got {size!r}")
    count = (segments.numel() if isinstance(segments, Tensor) else len(segments)) - 1
    if not isinstance(params, Tensor):
        params = torch.tensor(params, dtype=torch.int64).reshape(len(params), -1)
    _checks.shape("params", params, (count, 7))
    if params.dtype not in _checks.INTEGERS:
        raise ValueError(f"params must be int32 or int64, got {params.dtype}")
    if count and _checks.reads_values(params):
        _check_crops(params, images.shape[2], images.shape[3])
    if _dispatch.choose("crop_flip_roll", (images,), backend) == "triton":
        params = params.to(images.device, non_blocking=True).contiguous()
        return _as(_crop(images, params, device_offsets(segments, images.device), size), dtype, memory_format)
    rows = _host_rows(images, params, segments, size, dtype) if backend == "auto" else None
    if rows is not None:
        layout = _layout(images) if memory_format is None else memory_format
        return _OnHost.apply(images, rows, segments, size, images.dtype if dtype is None else dtype, layout)
    with torch.autocast(images.device.type, enabled=False):
        return _as(reference.crop_flip_roll(images, params, segments, size), dtype, memory_format)


def _as(views: Tensor, dtype: torch.dtype | None, memory_format: torch.memory_format | None) -> Tensor:
    if dtype is None and memory_format is None:
        return views
    return views.to(views.dtype if dtype is None else dtype, memory_format=memory_format or torch.preserve_format)


def _check_crops(params: Tensor, height: int, width: int) -> None:
    for s, (top, left, h, w, flip, *_) in enumerate(params.tolist()):
        if top < 0 or left < 0 or h < 1 or w < 1 or top + h > height or left + w > width:
            raise ValueError(
                f"params[{s}] must be a crop inside images of {height} x {width}, "
                f"got top {top}, left {left}, height {h}, width {w}"
            )
        if flip not in (0, 1):
            raise ValueError(f"params[{s}] must have flip 0 or 1, got {flip}")
