"""The operation normalized_l2: symmetrically normalised Euclidean distance."""

import torch
from torch import Tensor

from fd2fast import reference
from fd2fast.ops import _checks, _dispatch

_dispatch.register("normalized_l2", "reference", reference.normalized_l2)


def normalized_l2(u: Tensor, v: Tensor, *, eps: float = 1e-6, backend: str = "auto") -> Tensor:
    """|u - v| / (|u| + |v| + eps) over the last dimension; see fd2fast.reference.normalized_l2.

    u, v: float [..., D] that broadcast; returns [...] in float32 (float64 for float64). Differentiable in
    both; the gradient is 0 at u = v. Raises ValueError for shapes, types or devices that do not fit.
    """
    for name, tensor in (("u", u), ("v", v)):
        if tensor.ndim < 1:
            raise ValueError(f"{name} must be [..., D], got {list(tensor.shape)}")
        _checks.floating(name, tensor)
    _checks.same_device("v", v, "u", u)
    if u.shape[-1] != v.shape[-1]:
        raise ValueError(f"v must be [..., D] with D = {u.shape[-1]} as u, got {list(v.shape)}")
    try:
        torch.broadcast_shapes(u.shape, v.shape)
    except RuntimeError:
        raise ValueError(f"u and v must broadcast, got {list(u.shape)} and {list(v.shape)}") from None
    distance: Tensor = _dispatch.run("normalized_l2", backend, u, v, eps=eps)
    return distance
