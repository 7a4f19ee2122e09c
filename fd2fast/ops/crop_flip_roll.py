"""The operation crop_flip_roll: shared crop, resize, flip and roll of each segment."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fd2fast import reference
from fd2fast.ops import _checks, _dispatch
from fd2fast.ops._layout import converted
from fd2fast.reference._offsets import Offsets


def _by_reference(
    images: Tensor,
    params: Tensor,
    segments: Offsets,
    size: int,
    dtype: torch.dtype | None,
    memory_format: torch.memory_format | None,
) -> Tensor:
    return converted(reference.crop_flip_roll(images, params, segments, size), dtype, memory_format)


_dispatch.register("crop_flip_roll", "reference", _dispatch.without_autocast(_by_reference))


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
    (on a GPU only with FD2FAST_CHECK_VALUES=1). The C++ kernels (cpu) take crops that only upsample.
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
    views: Tensor = _dispatch.run("crop_flip_roll", backend, images, params, segments, size, dtype, memory_format)
    return views


def _check_crops(params: Tensor, height: int, width: int) -> None:
    for s, (top, left, h, w, flip, *_) in enumerate(params.tolist()):
        if top < 0 or left < 0 or h < 1 or w < 1 or top + h > height or left + w > width:
            raise ValueError(
                f"params[{s}] must be a crop inside images of {height} x {width}, "
                f"got top {top}, left {left}, height {h}, width {w}"
            )
        if flip not in (0, 1):
            raise ValueError(f"params[{s}] must have flip 0 or 1, got {flip}")
