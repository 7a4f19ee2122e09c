"""The operation bilinear_attention_pool."""

from torch import Tensor

from fd2fast import reference
from fd2fast.ops import _checks, _dispatch

_dispatch.register(
    "bilinear_attention_pool", "reference", _dispatch.without_autocast(reference.bilinear_attention_pool)
)


def bilinear_attention_pool(features: Tensor, attention: Tensor, *, eps: float = 1e-6, backend: str = "auto") -> Tensor:
    """Unit-norm, sign-square-rooted bilinear pooling; see fd2fast.reference.bilinear_attention_pool.

    features: float [N, C, H, W]; attention: float [N, M, H, W]; returns [N, M*C] (entry m*C + c) in float32
    (float64 for float64). Differentiable in both. Raises ValueError for shapes, types or devices that do not
    fit.
    """
    _checks.shape("features", features, ("N", "C", "H", "W"))
    n, _, h, w = features.shape
    _checks.shape("attention", attention, (n, "M", h, w))
    if h * w == 0:
        raise ValueError(f"features must have at least one pixel, got {list(features.shape)}")
    _checks.floating("features", features)
    _checks.floating("attention", attention)
    _checks.same_device("attention", attention, "features", features)
    z: Tensor = _dispatch.run("bilinear_attention_pool", backend, features, attention, eps=eps)
    return z
