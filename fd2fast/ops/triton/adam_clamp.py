"""adam_clamp_ by Triton's kernel."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fd2fast.ops import _dispatch
from fd2fast.ops._layout import dense_format, dense_like
from fd2fast.reference.adam_clamp import channel_bounds


def _dense_alike(
    image: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *_: Any, **settings: Any
) -> str | None:
    layout = dense_format(image)
    if layout is None:
        return f"image has strides {list(image.stride())}, neither contiguous nor channels_last"
    for name, tensor in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if not tensor.is_contiguous(memory_format=layout):
            return f"{name} has strides {list(tensor.stride())}, image {list(image.stride())}"
    return None


@torch.library.custom_op("fd2fast::adam_clamp", mutates_args=("image", "exp_avg", "exp_avg_sq"))
def _adam_clamp(
    image: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    low: Tensor,
    high: Tensor,
    step: Tensor | None,
    lr: Tensor | None,
    step_number: int,
    rate: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    _dispatch.kernels("adam_clamp").adam_clamp(
        image,
        grad,
        exp_avg,
        exp_avg_sq,
        step_number if step is None else step,
        rate if lr is None else lr,
        (beta1, beta2),
        eps,
        low,
        high,
    )


def _by_triton(
    image: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int | Tensor,
    lr: float | Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    low: Tensor | Sequence[float],
    high: Tensor | Sequence[float],
) -> None:
    step_tensor, lr_tensor = (v if isinstance(v, Tensor) else None for v in (step, lr))
    with torch.no_grad():
        _adam_clamp(
            image,
            dense_like(grad, image),
            exp_avg,
            exp_avg_sq,
            channel_bounds(low, image),
            channel_bounds(high, image),
            step_tensor,
            lr_tensor,
            0 if isinstance(step, Tensor) else step,
            0.0 if isinstance(lr, Tensor) else lr,
            *betas,
            eps,
        )


_dispatch.register_triton("adam_clamp_", _by_triton, tensors=4, limits=_dense_alike)
