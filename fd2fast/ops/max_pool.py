"""The operation max_pool: max pooling whose backward keeps one byte for each output."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fd2fast import reference
from fd2fast.ops import _checks, _dispatch
from fd2fast.reference.max_pool import pooled_size


def _by_reference(x: Tensor, *window: Any) -> Tensor:
    return reference.max_pool(x, *window)[0]


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
